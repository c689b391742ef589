"""`python -m quantlab`: the command line."""

from quantlab.cli import main

main()
