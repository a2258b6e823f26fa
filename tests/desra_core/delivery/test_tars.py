"""Tar files of delivered pictures: whole at any moment, and as WebDataset reads them."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from desra_core.delivery import tars as module
from desra_core.delivery.tars import Tars
from desra_core.errors import TransientError, UsageError
from desra_core.files import checksum
from desra_core.images.scanning import image_files
from desra_core.workspace import Workspace

Row = dict[str, Any]


def sample_of(row: Row) -> tuple[str, str]:
    if row["path"].startswith("trust_maps/"):
        return row["image"], ".trust_map.png"
    return os.path.splitext(row["path"])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    made.create()
    return made


def tars(workspace: Workspace) -> Tars:
    return Tars(workspace, "k" * 32, workspace.root.parent / "out/all.tar", None, sample_of)


def staged(workspace: Workspace, **content: bytes) -> list[Row]:
    """Put pictures to be packed, by their paths with _ for / and without .png; returns their rows."""
    rows = []
    for name, data in content.items():
        path = f"{name.replace('__', '/')}.png"
        file = workspace.unpacked("k" * 32) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        image = path.removeprefix("trust_maps/")[:-4]
        rows.append({"image": image, "path": path, "key": "key", "checksum": checksum(data)})
    return rows


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file()]


def test_what_is_new_joins_what_was_packed(workspace: Workspace) -> None:
    packing = tars(workspace)
    rows = staged(workspace, a=b"a" * 700, sub__b=b"b", trust_maps__a=b"map")
    packing.pack(3, rows)
    path = workspace.root.parent / "out/all-000003.tar"
    assert contents(path) == {"a.png": b"a" * 700, "a.trust_map.png": b"map", "sub/b.png": b"b"}
    assert files(workspace.unpacked("k" * 32)) == []
    packed = tars(workspace).packed(3)
    assert packed is not None
    assert packed.checksums == {row["path"]: row["checksum"] for row in rows}
    before = path.stat().st_mtime_ns
    tars(workspace).pack(3, rows)
    assert path.stat().st_mtime_ns == before, "nothing is written twice"

    changed = staged(workspace, sub__b=b"B" * 9, c=b"c")
    begun = rows[0] | {"key": None}  # its write may not have ended: what was packed stays
    (workspace.unpacked("k" * 32) / "a.png").write_bytes(b"half")
    tars(workspace).pack(3, [begun, rows[2], *changed])
    assert contents(path) == {"a.png": b"a" * 700, "a.trust_map.png": b"map", "c.png": b"c", "sub/b.png": b"B" * 9}
    found = image_files(path.parent / "*.tar").files.sort_by("path")
    assert found["name"].to_pylist() == ["all-000003.tar/a", "all-000003.tar/c", "all-000003.tar/sub/b"]

    tars(workspace).pack(3, [row for row in rows if row["image"] == "a"])
    assert set(contents(path)) == {"a.png", "a.trust_map.png"}, "what belongs to another shard is left out"
    tars(workspace).pack(3, [])
    assert contents(path) == {}
    assert image_files(path.parent / "*.tar").files.num_rows == 0


def test_dots_in_names_do_not_end_them(workspace: Workspace) -> None:
    rows = staged(workspace, **{"v1.0__a.b": b"1", "v1.0__a_b": b"2", "a": b"3"})
    tars(workspace).pack(0, rows)
    path = workspace.root.parent / "out/all-000000.tar"
    assert contents(path) == {"a.png": b"3", "v1.0/a_b.png": b"2", "v1.0/a_b_.png": b"1"}
    assert image_files(path).files.num_rows == 3


def test_the_parts_of_a_sample_are_adjacent(workspace: Workspace) -> None:
    """As readers of WebDataset need it: they read once through a tar file."""
    rows = staged(workspace, **{"a": b"1", "trust_maps__a": b"2", "a.q__b": b"3", "a-b": b"4", "trust_maps__a-b": b"5"})
    tars(workspace).pack(0, rows)
    names = list(contents(workspace.root.parent / "out/all-000000.tar"))
    assert names == ["a.png", "a.trust_map.png", "a-b.png", "a-b.trust_map.png", "a.q/b.png"]


def test_a_tar_file_of_somebody_else_stays(workspace: Workspace) -> None:
    path = workspace.root.parent / "out/all-000000.tar"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    rows = staged(workspace, a=b"a")
    with pytest.raises(UsageError, match=r"all-000000\.tar: is in the way: .*; move it, or name another --output"):
        tars(workspace).pack(0, rows)
    assert path.read_bytes() == b"mine"
    path.unlink()
    tars(workspace).pack(0, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"x" + whole[1025:])  # of the same size
    with pytest.raises(UsageError, match="is in the way"):
        tars(workspace).pack(0, [*rows, *staged(workspace, b=b"b")])
    path.write_bytes(whole[:2000])
    with pytest.raises(UsageError, match="is in the way"):
        tars(workspace).packed(0)
    path.unlink()
    assert tars(workspace).packed(0) is None
    assert not list(path.parent.iterdir())


def test_a_picture_that_was_changed_before_it_was_packed_is_made_anew(workspace: Workspace) -> None:
    rows = staged(workspace, a=b"a", b=b"b")
    (workspace.unpacked("k" * 32) / "a.png").write_bytes(b"A")
    with pytest.raises(TransientError, match=r"a\.png: is not as it was written; run again"):
        tars(workspace).pack(0, rows)
    assert [Path(path).name for path in files(workspace.unpacked("k" * 32))] == ["b.png"]
    assert not list((workspace.root.parent / "out").iterdir())


def test_after_a_power_cut_the_note_knows_the_tar_file(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each move is on its disk before the next: the note of both, the tar file, and the note of the new one alone."""
    steps, moved, synced = list[str](), Path.replace, os.fsync

    def replace(path: Path, target: Path) -> Path:
        steps.append(target.name)
        return moved(path, target)

    def fsync(descriptor: int) -> None:
        synced(descriptor)
        if (place := Path(os.readlink(f"/proc/self/fd/{descriptor}"))).is_dir():
            steps.append(f"{place.name}/")

    rows = staged(workspace, a=b"a")
    tars(workspace).pack(0, rows)
    rows += staged(workspace, b=b"b")
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    tars(workspace).pack(0, rows)
    note = ["00000000.json", "k" * 32 + "/"]
    assert steps == [*note, "all-000000.tar", "out/", *note]


def test_no_file_beside_a_tar_file_is_touched(workspace: Workspace) -> None:
    folder = workspace.root.parent / "out"
    folder.mkdir()
    (folder / "mine").write_bytes(b"mine")
    (folder / ".all-000000.tar.unfinished").symlink_to(folder / "mine")
    left = folder / f".all-000000.tar.{'0' * 32}.unfinished"
    left.write_bytes(b"of a killed run")
    tars(workspace).pack(0, staged(workspace, a=b"a"))
    assert (folder / "mine").read_bytes() == b"mine"
    assert (folder / ".all-000000.tar.unfinished").is_symlink()
    assert not left.exists()


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do some work in another process that dies at its n-th step of files; returns whether it did not come to that."""
    pid = os.fork()
    if pid == 0:
        left = step

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return function(*arguments, **named)

            return call

        Path.replace = dying(Path.replace)  # type: ignore[method-assign]
        Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
        os.fsync = dying(os.fsync)
        tarfile.TarFile.addfile = dying(tarfile.TarFile.addfile)  # type: ignore[method-assign]
        module.file_checksum = dying(module.file_checksum)  # type: ignore[attr-defined]
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_killed_at_any_moment(workspace: Workspace) -> None:
    root = workspace.root.parent
    first = staged(workspace, a=b"a" * 600, b=b"b")
    tars(workspace).pack(0, first)
    rows = [first[0], *staged(workspace, b=b"B", c=b"c" * 600)]
    path, kept = root / "out/all-000000.tar", root.with_name(f"{root.name}-kept")
    shutil.copytree(root, kept)
    old = path.read_bytes()
    tars(workspace).pack(0, rows)
    new = path.read_bytes()
    assert len(old) == len(new), "the note has to tell them apart by more than their size"
    step, states = 0, set()
    while True:
        shutil.rmtree(root)
        shutil.copytree(kept, root)
        done = killed_at(step, lambda: tars(workspace).pack(0, rows))
        states.add(path.read_bytes())
        packed = tars(workspace).packed(0)
        assert packed is not None
        assert packed.checksum == checksum(path.read_bytes())
        tars(workspace).pack(0, rows)
        assert path.read_bytes() == new
        assert files(workspace.unpacked("k" * 32)) == []
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        if done:
            break
        step += 1
    assert step >= 8
    assert states == {old, new}
    shutil.rmtree(kept)
