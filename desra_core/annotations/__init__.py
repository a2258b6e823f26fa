"""Export masks to labelling tools, import the corrected ones as human masks, and review regions.

Gives `annotations.export.export_workspace`, and `read_corrections`, `publish_corrections` and `undo_import` of
`annotations.corrections`, and `Review` of `annotations.review`.
"""
