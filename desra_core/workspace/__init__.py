"""The directory that holds everything that a corpus's runs produce.

Gives `Workspace` (paths, publishing, the lock), `DATASET` and `read_table`.
"""

from desra_core.workspace.paths import DATASET, Workspace, read_table

__all__ = ["DATASET", "Workspace", "read_table"]
