"""Masks on their way to people and back: export to labelling tools, import of what people corrected.

`desra_core.annotations.export` writes an export of a workspace, `desra_core.annotations.corrections` reads what came of
it and publishes it as masks by people; see `desra_core.workspace.human_masks` for what prefers them.
"""
