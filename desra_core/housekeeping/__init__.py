"""Sizes of what a workspace holds, and deleting what no run needs any more."""
