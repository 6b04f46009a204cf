"""`python -m labelmint_client` is the command line."""

from labelmint_client.cli import main

main()
