"""The routes: thin. Each reads, asks the file that knows, and answers."""
