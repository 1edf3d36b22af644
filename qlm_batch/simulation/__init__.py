"""The service on a virtual clock: the real scheduler over simulated engines."""
