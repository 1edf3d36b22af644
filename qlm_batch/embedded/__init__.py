"""PostgreSQL and Valkey from wheels, and all processes of the service under one supervisor."""
