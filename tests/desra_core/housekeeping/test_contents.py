"""The sizes of the parts of a workspace."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from desra_core.errors import UsageError
from desra_core.housekeeping.contents import FOLDERS, Size, entries, images_contents, size_of, sizes
from desra_core.workspace import Workspace


def write(root: Path, files: dict[str, int]) -> Workspace:
    for path, size in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(bytes(size))
    return Workspace(root)


def test_sizes_by_kind_largest_first(tmp_path: Path) -> None:
    files = {"masks/a.png": 3, "masks/sub/b.png": 4, "maps/00/x.zarr/similarity/c/0/0": 100, "manifest.parquet": 20,
             "report.html": 30, "mine/a": 5, "mine/b": 6, "human/a.png": 0}  # fmt: skip
    workspace = write(tmp_path / "ws", files)
    (tmp_path / "elsewhere").write_bytes(bytes(1000))
    (workspace.masks / "link.png").symlink_to(tmp_path / "elsewhere")
    (workspace.root / "dataset").symlink_to(tmp_path)
    (workspace.masks / "linked").symlink_to(tmp_path / "ws/maps")
    (workspace.root / "journal").mkdir()
    links = (workspace.masks / "link.png", workspace.masks / "linked", workspace.root / "dataset")
    link = [path.lstat().st_size for path in links]
    found = sizes(workspace)
    assert found == {"maps": Size(1, 100), "tables": Size(3, 50 + link[2]), "masks": Size(4, 7 + link[0] + link[1]),
                     "other": Size(2, 11), "human": Size(1, 0)}  # fmt: skip
    assert [size.bytes for size in found.values()] == sorted((size.bytes for size in found.values()), reverse=True)
    assert sum(size.files for size in found.values()) == len(files) + 3
    assert size_of(workspace.root / "gone") == Size(0, 0)


def test_every_part_of_a_workspace_is_known(tmp_path: Path) -> None:
    """All files and folders that `Workspace` names are in `FOLDERS`."""
    patterns = [below.pattern for below in vars(Workspace).values() if hasattr(below, "pattern")]
    assert len(patterns) > 20
    paths = [
        path if "." in path or path in ("lock", "format") else f"{path}/"
        for path in (re.sub(r"\{.*?\}", "x", pattern) for pattern in patterns)
    ]
    for path in paths:
        place = tmp_path / "ws" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            place.mkdir(exist_ok=True)
        else:
            place.touch()
    assert {path.partition("/")[0] for path in paths if "/" in path} == set(FOLDERS)
    table = [item._asdict() for item in images_contents(Workspace(tmp_path / "ws"))]
    assert [row["path"] for row in table if row["kind"] == "unknown" and "/" not in row["path"]] == []


def test_files_that_cannot_be_looked_at_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that this user may list, but not enter."""
    (tmp_path / "file").write_bytes(b"12")
    look = os.lstat

    def refused(path: Any) -> os.stat_result:
        if str(path).endswith("file"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr("os.lstat", refused)
    assert size_of(tmp_path) == size_of(tmp_path / "file") == Size(0, 0)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(UsageError, match=r"ws: cannot be read \(Permission denied\); check its permissions"):
        list(entries(tmp_path / "ws"))
    assert size_of(tmp_path) == Size(0, 0)  # `desra status` shows the rest
