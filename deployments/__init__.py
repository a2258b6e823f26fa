"""How people start runs: the command line, and the servers that it needs."""
