"""`python -m server` is the command `grok-server`."""

from server.cli import main

main()
