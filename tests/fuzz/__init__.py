"""Coverage-guided fuzzing, for as long as one likes; the suite has its own generated cases."""
