"""`python -m qlm_cli` is `qlm`."""

from qlm_cli.main import main

main()
