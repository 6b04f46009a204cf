"""Runs the command line as `python -m labelmint_client`."""

from labelmint_client.cli import main

main()
