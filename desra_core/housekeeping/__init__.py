"""Measure the files of a workspace, and delete those that no run needs any more.

Gives `housekeeping.contents.sizes`, `housekeeping.garbage.find_garbage` and `housekeeping.garbage.sweep`.
"""
