"""Sizes of what a workspace holds, and deleting what no run needs any more.

Gives `housekeeping.contents.sizes`, `housekeeping.garbage.find_garbage` and `housekeeping.garbage.sweep`.
"""
