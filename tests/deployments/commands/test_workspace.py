"""``desra gc`` and the sizes of ``desra status`` as a user meets them."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.commands.workspace import bytes_in_words
from desra_core.settings import Mining
from desra_core.workspace import Workspace
from tests.conftest import assert_told_in_help, refusal
from tests.in_process import process


@pytest.fixture(scope="module")
def place(make_models: Callable, make_photos: Callable, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A workspace that keeps less than it did at first."""
    root = tmp_path_factory.mktemp("housekeeping")
    make_photos(root / "photos", 6)
    mse, gan = make_models(root / "models")
    for keep in ("maps", "artifacts"):
        process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws", keep=keep))
    command = ["mine", root / "photos", "--mse-model", mse, "--gan-model", gan]
    return SimpleNamespace(root=root, command=command)


@pytest.fixture
def ws(place: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.root / "ws", tmp_path / "ws", symlinks=True))


def files(ws: Path) -> dict[str, bytes]:
    return {str(path.relative_to(ws)): path.read_bytes() for path in ws.rglob("*") if path.is_file()}


def test_dry_run_then_apply_then_nothing(place: SimpleNamespace, ws: Path, desra_here) -> None:
    (ws / "notes.txt").write_text("mine")
    before = files(ws)
    dry = desra_here("gc", "--workspace", ws, "--list")
    assert dry.returncode == 0, dry.stderr
    assert files(ws) == before
    *listed, kind, total, unknown = dry.stdout.splitlines()
    assert all(line.split()[0] == "maps" and line.split()[-1].startswith("maps/") for line in listed)
    assert len(listed) == 2 * 2  # two clean photos: the map, and the file of its group
    assert kind.split()[:2] == ["maps", "6"]
    assert kind.endswith("  that --keep artifacts and the other settings do not keep")
    assert total.endswith(" would go: --apply drops them")
    assert unknown == "unknown, left: notes.txt (4 B)"
    applied = desra_here("gc", "--workspace", ws, "--apply")
    assert applied.returncode == 0, applied.stderr
    assert applied.stdout.splitlines()[-2] == "dropped " + total.removesuffix(" would go: --apply drops them")
    gone = before.keys() - files(ws).keys()
    assert gone
    assert all(path.startswith("maps/") for path in gone)
    freed = sum(len(before[path]) for path in gone)
    assert f"dropped {len(gone)} files, {bytes_in_words(freed)}" in applied.stdout
    again = desra_here("gc", "--workspace", ws, "--apply")
    assert again.stdout.splitlines()[0] == "nothing to drop"
    mined = desra_here(*place.command, "--workspace", ws)
    assert mined.returncode == 0, mined.stderr
    assert mined.stdout.startswith("nothing to do: 6 of 6 images done, 0 failed before")


def test_vanished_images_and_the_report(place: SimpleNamespace, ws: Path, desra_here, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(place.root / "photos", tmp_path / "photos"))
    command = ["mine", photos, *place.command[2:], "--workspace", ws]
    assert desra_here(*command).returncode == 0
    (photos / "set1/photo001.png").unlink()
    assert "vanished: 1 image, whose outputs stay" in desra_here(*command).stderr
    kept = desra_here("gc", "--workspace", ws, "--apply")
    assert Workspace(ws).mask("set1/photo001").exists()
    assert "vanished" not in kept.stdout
    gone = desra_here("gc", "--workspace", ws, "--apply", "--vanished")
    assert "of images that have vanished" in gone.stdout
    assert not Workspace(ws).mask("set1/photo001").exists()
    report = (ws / "report.html").read_bytes()
    desra_here("report", "--workspace", ws)
    assert (ws / "report.html").read_bytes() == report
    status = desra_here("status", "--workspace", ws).stdout
    assert "vanished ones" not in status
    assert "images     5\n" in status
    again = desra_here(*command)
    assert again.stdout.startswith("nothing to do: 5 of 5 images done")


def test_a_workspace_in_use_is_left_alone(ws: Path, desra_here) -> None:
    (ws / "tmp").mkdir(exist_ok=True)
    (ws / "tmp/half").touch()
    with (ws / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"host": "far", "pid": 7, "started": "then"}))
        lock.flush()
        before = files(ws)
        for more in ((), ("--apply",)):
            run = desra_here("gc", "--workspace", ws, *more)
            line = f"error: {ws}: is in use by process 7 on far, started then; wait until it has ended"
            assert refusal(run) == line
        assert files(ws) == before


def test_a_folder_that_is_no_workspace_is_refused(desra_here, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").touch()
    for folder in (tmp_path, tmp_path / "none"):
        for more in ((), ("--apply",)):
            line = refusal(desra_here("gc", "--workspace", folder, *more))
            assert line == f"error: {folder}: is no workspace with a run in it; name one, or run desra mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "masks"]


def test_files_that_cannot_be_deleted_are_named(ws: Path, desra_here, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "none.png":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    (ws / "masks/none.png").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        run = desra_here("gc", "--workspace", ws, "--apply")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith(
        "cannot be deleted (Permission denied); check its permissions and run again"
    )
    assert desra_here("gc", "--workspace", ws, "--apply").stdout.splitlines()[-1].startswith("dropped ")


def test_status_tells_sizes(ws: Path, desra_here) -> None:
    (ws / "pages").mkdir()
    (ws / "pages/a.html").write_bytes(bytes(12_345))
    (ws / "prefect").mkdir()
    (ws / "prefect/prefect.db").write_bytes(bytes(10**7))
    found = files(ws)
    lines = desra_here("status", "--workspace", ws, "--sizes").stdout.splitlines()
    [line] = [line for line in lines if line.startswith("size ")]
    total, by_kind = line.removeprefix("size       ").split(": ")
    assert total == f"{bytes_in_words(sum(map(len, found.values())))} in {len(found)} files"
    assert by_kind.startswith("prefect 10 MB, ")
    assert "pages 12.3 kB" in by_kind
    dataset = sum(len(data) for path, data in found.items() if path.startswith("dataset/"))
    assert f"dataset {bytes_in_words(dataset)}" in by_kind
    without = desra_here("status", "--workspace", ws).stdout.splitlines()
    assert without == [each for each in lines if each != line]


def test_gc_as_json(ws: Path, desra_here) -> None:
    (ws / "notes.txt").write_text("mine")
    told = desra_here("gc", "--workspace", ws, "--list").stdout.splitlines()
    run = desra_here("gc", "--workspace", ws, "--list", "--json")
    found = json.loads(run.stdout)
    assert (run.returncode, run.stderr, found["applied"], found["workspace"]) == (0, "", False, str(ws))
    *listed, _, total, unknown = told
    assert [f"{p['kind']:<12} {bytes_in_words(p['bytes']):>8}  {p['path']}" for p in found["paths"]] == listed
    [group] = found["groups"]
    assert told[-3].split()[:2] == [group["kind"], str(group["files"])]
    assert told[-3].endswith(f"{bytes_in_words(group['bytes'])}  {group['reason']}")
    assert total.startswith(f"{found['files']} files, {bytes_in_words(found['bytes'])} would go")
    [left] = found["unknown"]
    assert unknown == f"unknown, left: {left['path']} ({left['bytes']} B)"
    applied = json.loads(desra_here("gc", "--workspace", ws, "--apply", "--json").stdout)
    assert applied == found | {"applied": True, "paths": None}
    again = json.loads(desra_here("gc", "--workspace", ws, "--apply", "--json").stdout)
    assert (again["files"], again["bytes"], again["groups"]) == (0, 0, [])
    assert_told_in_help(desra_here, "gc", found | group)


def test_status_as_json(place: SimpleNamespace, ws: Path, desra_here, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(place.root / "photos", tmp_path / "photos"))
    (photos / "set1/photo001.png").unlink()
    (photos / "set1/photo003.png").write_bytes(b"no PNG")
    (photos / "set1/notes.txt").touch()
    mse, gan = place.root / "models/mse.pth", place.root / "models/gan.pth"
    process(Mining(photos=photos, mse_model=str(mse), gan_model=gan, workspace=ws))
    told = desra_here("status", "--workspace", ws, "--sizes", "--failures")
    run = desra_here("status", "--workspace", ws, "--sizes", "--json")
    found = json.loads(run.stdout)
    assert (run.returncode, run.stderr) == (0, "")
    parts = ", ".join(f"{kind} {bytes_in_words(size['bytes'])}" for kind, size in found["size"]["by_kind"].items())
    assert told.stdout.splitlines() == [
        f"workspace  {found['workspace']}",
        "run        none at present",
        f"reference  {found['reference']}",
        f"images     {found['images']}, and {found['vanished']} vanished ones, whose outputs stay",
        f"done       {found['done']}",
        f"pending    {found['pending']}",
        f"failed     {found['failed']}",
        "passed over 1 .txt",
        f"size       {bytes_in_words(found['size']['bytes'])} in {found['size']['files']} files: {parts}",
    ]
    assert (found["run"], found["model"], found["retried"]) == (None, None, 0)
    assert (found["images"], found["done"], found["failed"], found["passed_over"]) == (5, 4, 1, {".txt": 1})
    [failure] = found["failures"]
    assert told.stderr == f"failed: {failure['subject']}: {failure['reason']}; {failure['remedy']}\n"
    assert json.loads(desra_here("status", "--workspace", ws, "--json").stdout) == found | {"size": None}
    assert_told_in_help(desra_here, "status", found)


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
     (3_170_000_000, "3.17 GB"), (10**18, "1e+03 PB")],
)  # fmt: skip
def test_bytes(count: int, told: str) -> None:
    assert bytes_in_words(count) == told
