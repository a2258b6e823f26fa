"""A workspace to be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from desra_core.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace
