"""Export masks to labelling tools, and import the corrected ones as human masks.

`desra_core.annotations.export` writes an export of a workspace, `desra_core.annotations.corrections` reads corrected
masks, and `desra_core.annotations.publication` publishes them as human masks.
"""
