"""Everything that must survive, in Postgres or in memory."""
