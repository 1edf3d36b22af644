"""Who runs what, where and when: pure functions of a snapshot, a seed and a budget of moves."""
