"""A service of real processes that is broken on purpose, and the proof that nothing was lost."""
