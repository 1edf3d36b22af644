"""The `qlm` command."""
