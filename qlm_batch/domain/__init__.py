"""The vocabulary: what a job is, which changes are allowed, and the ports at the edges."""
