"""Export masks to labelling tools, and import the corrected ones as human masks.

Gives `annotations.export.export_workspace`, and `read_corrections`, `publish_corrections` and `undo_import` of
`annotations.corrections`.
"""
