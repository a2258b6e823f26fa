"""The tables of a corpus."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from desra_core.planning.tables import REGIONS, worst_regions
from desra_core.workspace import Workspace


def test_the_worst_regions_are_none_with_a_severity_below_zero(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    rows = [
        {"image": name, "severity": severity} for name, severity in (("a", -3.0), ("b", 2.0), ("c", 0.0), ("d", 9.0))
    ]
    workspace.publish_table(workspace.regions, pa.Table.from_pylist(rows, REGIONS))
    assert worst_regions(workspace, 10)["image"].to_pylist() == ["d", "b", "c"]
    assert worst_regions(workspace, 1)["image"].to_pylist() == ["d"]
