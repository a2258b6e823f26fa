"""Measure and check the files of a workspace, and delete those that no run needs any more.

Gives `housekeeping.contents.sizes`, `housekeeping.garbage.find_garbage`, `housekeeping.garbage.sweep`, and
`housekeeping.verify`.
"""
