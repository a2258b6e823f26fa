"""Switching the current model: promotions and rollbacks happen as a whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from desra_core.errors import TransientError, UsageError
from desra_core.files import content_key, digest, read_document
from desra_core.gate.model_registry import current_model, history, promote, rollback
from desra_core.workspace import Workspace

# The calls by which a switch changes the disk.
TAKING_SPACE = ("mkdir", "copyfile", "fsync", "symlink", "rename", "replace")
CLEANING_UP = ("unlink", "rmtree")

Action = Callable[[Workspace], Path]


class Killed(BaseException):
    """The end of the process: from then on no call reaches the disk, not even to clean up."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def checkpoint(workspace: Workspace, name: str) -> Path:
    path = workspace.root.parent / f"{name}.pth"
    path.write_bytes(name.encode() * 1000)
    return path


def promoted(workspace: Workspace, name: str, parent: str) -> Path:
    files = checkpoint(workspace, name), checkpoint(workspace, parent)
    return promote(workspace, files[0], parent=files[1], record={"made": name}, verdict={"removal": 0.75})


def chain(workspace: Workspace, *names: str) -> None:
    for parent, name in itertools.pairwise(names):
        promoted(workspace, name, parent)


def current(workspace: Workspace) -> str | None:
    """Read what the current model repeats, if there is one."""
    path = current_model(workspace)
    if path is None:
        return None
    content = path.read_text()
    name = content[: len(content) // 1000]
    assert content == name * 1000
    return name


def tree(folder: Path) -> dict[str, bytes | str]:
    """Read everything below a folder: content of files, targets of links."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def intercept(patch: pytest.MonkeyPatch, names: Iterable[str], before: Callable[[str, Any], None]) -> list[str]:
    """Do something before each call of these functions of os and shutil; returns the growing list of calls."""
    passed: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before(name, arguments)
            result = function(*arguments, **keywords)
            passed.append(name)
            return result

        return call

    for name in names:
        module = os if hasattr(os, name) else shutil
        patch.setattr(module, name, wrap(name, getattr(module, name)))
    return passed


def origin(entry: Path) -> dict[str, Any]:
    """What model.json says, but for the checksum of the history."""
    return {name: value for name, value in read_document(entry / "model.json").items() if name != "history"}


def check_entries(workspace: Workspace) -> None:
    """Check that every folder holds a whole entry, also an entry that nothing refers to."""
    for entry in (workspace.root / "models").glob("0*"):
        assert sorted(os.listdir(entry)) == ["history.json", "model.json", "model.pth"]
        events = json.loads((entry / "history.json").read_bytes())
        assert events[-1]["number"] == int(entry.name)
        assert events[-1]["model"] == content_key(entry / "model.pth")


def promote_first(workspace: Workspace) -> Path:
    return promoted(workspace, "one", "stock")


def promote_third(workspace: Workspace) -> Path:
    return promoted(workspace, "three", "two")


ACTIONS = [
    pytest.param((), promote_first, "one", id="first promotion"),
    pytest.param(("stock", "one", "two"), promote_third, "three", id="later promotion"),
    pytest.param(("stock", "one", "two"), rollback, "one", id="rollback"),
]


def test_nothing_was_promoted(workspace: Workspace, tmp_path: Path) -> None:
    for nothing in (workspace, Workspace(tmp_path / "nowhere")):
        assert current_model(nothing) is None
        assert history(nothing) == []
        with pytest.raises(UsageError, match="no model was promoted yet") as caught:
            rollback(nothing)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()
    assert not (workspace.root / "models").exists()


def test_the_first_promotion_keeps_the_origin_too(workspace: Workspace) -> None:
    models = workspace.root / "models"
    entry = promoted(workspace, "one", "stock")
    assert entry == models / "0001"
    assert current_model(workspace) == models / "0001/model.pth"
    assert os.readlink(models / "current") == "0001"
    stock, one = checkpoint(workspace, "stock"), checkpoint(workspace, "one")
    assert (models / "0000/model.pth").read_bytes() == stock.read_bytes()
    assert (models / "0001/model.pth").read_bytes() == one.read_bytes()
    assert origin(models / "0000") == {"source": str(stock)}
    assert origin(models / "0001") == {"made": "one"}
    events = history(workspace)
    assert json.loads((models / "0000/history.json").read_bytes()) == events[:1]
    for event in events:
        made = datetime.fromisoformat(event.pop("time"))
        assert made.tzinfo is not None
        assert abs((datetime.now().astimezone() - made).total_seconds()) < 60
    assert events == [
        {"number": 0, "kind": "origin", "model": content_key(stock), "source": str(stock)},
        {"number": 1, "kind": "promotion", "model": content_key(one), "source": str(one), "verdict": {"removal": 0.75}},
    ]
    assert list((workspace.root / "tmp").iterdir()) == []


def test_each_promotion_adds_to_the_history_and_changes_no_entry(workspace: Workspace) -> None:
    promoted(workspace, "one", "stock")
    first = history(workspace)
    before = tree(workspace.root / "models")
    held = current_model(workspace)
    assert promoted(workspace, "two", "one") == workspace.root / "models/0002"
    assert current(workspace) == "two"
    assert history(workspace)[:2] == first
    assert [event["kind"] for event in history(workspace)] == ["origin", "promotion", "promotion"]
    after = tree(workspace.root / "models")
    assert before | {"current": "0002"} == {path: content for path, content in after.items() if path in before}
    assert held is not None
    assert held.read_bytes() == checkpoint(workspace, "one").read_bytes()


def test_the_entry_is_the_parent_of_the_next(workspace: Workspace) -> None:
    """Do as a run that starts from `current_model`."""
    chain(workspace, "stock", "one")
    parent = current_model(workspace)
    assert parent is not None
    promote(workspace, checkpoint(workspace, "two"), parent=parent, record={}, verdict={})
    assert current(workspace) == "two"


def test_promoting_the_current_model_again_does_nothing(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    before = tree(workspace.root)
    gone = workspace.root.parent / "gone.pth"
    again = checkpoint(workspace, "two")
    assert promote(workspace, again, parent=gone, record={}, verdict={}) == workspace.root / "models/0002"
    assert tree(workspace.root) == before


def test_models_that_cannot_be_promoted(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match=r"stock\.pth: is the very model that it was to replace"):
        promoted(workspace, "stock", "stock")
    assert not (workspace.root / "models").exists()
    chain(workspace, "stock", "one", "two")
    before = tree(workspace.root)
    with pytest.raises(UsageError, match=r"one\.pth: has another content than the current model, .*0002/model\.pth; "):
        promoted(workspace, "three", "one")
    missing = workspace.root.parent / "missing.pth"
    for model, parent in ((missing, "two"), (checkpoint(workspace, "three"), "missing")):
        with pytest.raises(UsageError, match=r"missing\.pth: does not exist"):
            promote(workspace, model, parent=workspace.root.parent / f"{parent}.pth", record={}, verdict={})
    three, two = checkpoint(workspace, "three"), checkpoint(workspace, "two")
    with pytest.raises(TypeError):
        promote(workspace, three, parent=two, record={"path": three}, verdict={})
    assert tree(workspace.root) == before


def test_a_model_that_changes_while_it_is_copied(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(workspace, "stock", "one")
    before = tree(workspace.root)
    copyfile = shutil.copyfile

    def grow(source: Path, target: Path) -> None:
        copyfile(source, target)
        with target.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(shutil, "copyfile", grow)
    with pytest.raises(TransientError, match=r"two\.pth: changed while it was copied; run again"):
        promoted(workspace, "two", "one")
    assert tree(workspace.root) == before


def test_rolling_back_goes_further_back_each_time(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    models = workspace.root / "models"
    assert rollback(workspace) == models / "0003"
    assert current(workspace) == "one"
    assert origin(models / "0003") == {"made": "one"}
    assert rollback(workspace) == models / "0004"
    assert current(workspace) == "stock"
    before = tree(workspace.root)
    with pytest.raises(UsageError, match="there is no earlier model; promote another one"):
        rollback(workspace)
    assert tree(workspace.root) == before
    events = history(workspace)
    assert [event["number"] for event in events] == [0, 1, 2, 3, 4]
    assert [event["kind"] for event in events] == ["origin", "promotion", "promotion", "rollback", "rollback"]
    assert [event["restores"] for event in events[3:]] == [1, 0]
    assert [event["source"] for event in events[3:]] == [str(models / f"000{n}/model.pth") for n in (1, 0)]
    assert [event["model"] for event in events[3:]] == [events[1]["model"], events[0]["model"]]


def test_rolling_back_passes_over_what_was_undone(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    rollback(workspace)
    with pytest.raises(UsageError, match="has another content"):
        promoted(workspace, "three", "two")
    promoted(workspace, "three", "one")
    promoted(workspace, "two", "three")
    expected = ["three", "one", "stock"]
    for name in expected:
        rollback(workspace)
        assert current(workspace) == name
    with pytest.raises(UsageError, match="no earlier model"):
        rollback(workspace)
    promoted(workspace, "two", "stock")
    assert current(workspace) == "two"
    assert [event["number"] for event in history(workspace)] == list(range(10))
    rollback(workspace)
    assert current(workspace) == "stock"


@pytest.mark.parametrize(("names", "action", "result"), ACTIONS)
def test_a_kill_at_any_moment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], action: Action, result: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them take seconds
    chain(workspace, *names)
    before, model, past = tree(workspace.root), current(workspace), history(workspace)
    backup = workspace.root.parent / "backup"
    shutil.copytree(workspace.root, backup, symlinks=True)
    killed = {False: 0, True: 0}
    for moment in itertools.count():
        calls = itertools.count()

        def die(name: str, arguments: Any, calls: Iterator[int] = calls, moment: int = moment) -> None:
            if next(calls) >= moment:
                raise Killed

        with monkeypatch.context() as patch:
            passed = intercept(patch, TAKING_SPACE + CLEANING_UP, die)
            try:
                action(workspace)
                break
            except Killed:
                pass
        switched = "replace" in passed
        killed[switched] += 1
        if not switched:
            assert current(workspace) == model
            assert history(workspace) == past
            assert before.items() <= tree(workspace.root).items()
            check_entries(workspace)
            with workspace.locked():  # the next run, which empties WS/tmp
                action(workspace)
        assert current(workspace) == result
        events = history(workspace)
        assert events[: len(past)] == past
        assert len(events) == (len(past) + 1 if past else 2), "only what was switched to"
        check_entries(workspace)
        promoted(workspace, "next", result)
        assert current(workspace) == "next"
        assert not (workspace.root / "models/current.new").is_symlink()
        shutil.rmtree(workspace.root)
        shutil.copytree(backup, workspace.root, symlinks=True)
    assert killed[False] > 10
    assert killed[True] >= 3


@pytest.mark.parametrize(("names", "action", "result"), ACTIONS)
def test_a_full_disk_at_any_moment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], action: Action, result: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them take seconds
    chain(workspace, *names)
    before, model, past = tree(workspace.root), current(workspace), history(workspace)
    backup = workspace.root.parent / "backup"
    shutil.copytree(workspace.root, backup, symlinks=True)
    refused: list[str] = []
    for moment in itertools.count():
        calls, tried = itertools.count(), len(refused)

        def fill(name: str, arguments: Any, calls: Iterator[int] = calls, moment: int = moment) -> None:
            if next(calls) == moment:
                refused.append(name)
                if name == "copyfile":
                    Path(arguments[1]).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            passed, told = intercept(patch, TAKING_SPACE, fill), ""
            try:
                action(workspace)
            except TransientError as error:
                told = str(error)
        if len(refused) == tried:
            break
        assert list((workspace.root / "tmp").glob("*")) == []
        assert not (workspace.root / "models/current.new").is_symlink()
        check_entries(workspace)
        assert ("replace" in passed) == (not told), "an error means that nothing was switched"
        if told:
            assert told == f"{workspace.root / 'models'}: the disk is full; free some space and run again"
            assert current(workspace) == model
            assert history(workspace) == past
            assert before.items() <= tree(workspace.root).items()
            action(workspace)
        assert current(workspace) == result
        shutil.rmtree(workspace.root)
        shutil.copytree(backup, workspace.root, symlinks=True)
    assert set(refused) == set(TAKING_SPACE)


def test_everything_is_on_the_disk_before_it_counts(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def note(name: str, arguments: Any) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[1])
        steps.append(f"{name} {path.parent.name}/{path.name}")

    chain(workspace, "stock", "one")
    intercept(monkeypatch, ["fsync", "rename", "replace"], note)
    promoted(workspace, "two", "one")
    folder = workspace.root.name
    written, switched = steps[:4], steps[4:]
    assert sorted(written[:3]) == [f"fsync 0002/{name}" for name in ("history.json", "model.json", "model.pth")]
    assert written[3].startswith("fsync ")
    assert written[3].endswith("/0002"), "the folder itself, still in WS/tmp"
    assert switched[0] == "rename models/0002"
    assert switched[1] == switched[4] == f"fsync {folder}/models"
    assert switched[2:4] == [f"fsync {workspace.root.parent.name}/{folder}", "replace models/current"]
    assert len(switched) == 5


def test_a_number_is_never_used_twice(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(name: str, arguments: Any) -> None:
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch:
            intercept(patch, ["replace"], die)
            with pytest.raises(Killed):
                promoted(workspace, "one", "stock")
    leftovers = tree(workspace.root / "models")
    assert {path.split("/")[0] for path in leftovers} == {"0000", "0001", "0002", "0003"}
    assert current_model(workspace) is None
    assert promoted(workspace, "two", "stock") == workspace.root / "models/0005"
    assert [event["number"] for event in history(workspace)] == [4, 5]
    assert rollback(workspace) == workspace.root / "models/0006"
    assert current(workspace) == "stock"
    assert history(workspace)[-1]["restores"] == 4
    assert leftovers.items() <= tree(workspace.root / "models").items()


def test_a_reader_always_sees_a_whole_model_with_its_history(workspace: Workspace) -> None:
    names = ["stock", *(f"model{number}" for number in range(12))]
    chain(workspace, *names[:2])
    seen: set[int] = set()
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not (stop.is_set() and seen):
            path, events = current_model(workspace), history(workspace)
            if path is None or not events:
                wrong.append(path)
                continue
            beside = json.loads((path.parent / "history.json").read_bytes())
            shorter, longer = sorted((beside, events), key=len)
            if longer[: len(shorter)] != shorter or digest(path.read_bytes()) != beside[-1]["model"]:
                wrong.append(path)
            seen.add(len(beside))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        chain(workspace, *names[1:])
        for _ in range(6):
            rollback(workspace)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert len(seen) > 5
    assert len(history(workspace)) == 13 + 6


def test_a_link_to_nothing(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    (workspace.root / "models/0002").rename(workspace.root / "away")
    told = r"models/current: is a link to 0002, which is not there; restore that folder, or link to another"
    actions: list[Callable[[Workspace], object]] = [current_model, history, rollback, promote_third]
    for action in actions:
        with pytest.raises(UsageError, match=told):
            action(workspace)
    (workspace.root / "models/current").unlink()
    (workspace.root / "models/current").symlink_to("0001")
    assert current(workspace) == "one"
    assert [event["number"] for event in history(workspace)] == [0, 1]


def test_a_folder_in_place_of_the_link(workspace: Workspace) -> None:
    """Copying a workspace may replace the link by the folder that it leads to."""
    chain(workspace, "stock", "one")
    (workspace.root / "models/current").unlink()
    shutil.copytree(workspace.root / "models/0001", workspace.root / "models/current")
    with pytest.raises(UsageError, match=r"models/current: cannot be read as a link .*; replace it by a link to"):
        current_model(workspace)


def test_a_damaged_model_is_reported_and_can_be_rolled_back(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    model = workspace.root / "models/0002/model.pth"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    for reason in ("has changed since it was promoted", "does not exist"):
        told = f"0002/model.pth: {reason}; restore it from a backup, or roll back"
        with pytest.raises(UsageError, match=told):
            current_model(workspace)
        with pytest.raises(UsageError, match=told):
            promoted(workspace, "two", "one")
        model.unlink(missing_ok=True)
    rollback(workspace)
    assert current(workspace) == "one"


def test_nothing_damaged_becomes_current_by_rolling_back(workspace: Workspace) -> None:
    chain(workspace, "stock", "one", "two")
    (workspace.root / "models/0001/model.pth").write_bytes(b"other")
    before = tree(workspace.root)
    with pytest.raises(
        UsageError, match=r"0001/model\.pth: has changed .*, or link .*/models/current to another folder"
    ):
        rollback(workspace)
    assert tree(workspace.root) == before


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "[1]", '[{"number": 1}]', '[{"kind": "rollback"}]', None])
def test_a_damaged_history(workspace: Workspace, content: str | None) -> None:
    chain(workspace, "stock", "one")
    path = workspace.root / "models/0001/history.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    actions: list[Callable[[Workspace], object]] = [current_model, history, rollback]
    for action in actions:
        with pytest.raises(UsageError, match=r"0001/history\.json: .*; restore it from a backup") as caught:
            action(workspace)
        assert "\n" not in str(caught.value)
