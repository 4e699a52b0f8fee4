"""`python -m sheer` is the `sheer` command."""

from sheer.cli import main

main()
