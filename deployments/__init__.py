"""The command line by which people start runs, and the servers that it needs."""
