"""What takes how much of a workspace, and what no run needs any more."""
