"""The workspace's current model: promoted after it passed the gate, and rolled back.

::

    WS/models/0000/     the model that the first finetune started from
      model.pth
      model.json        its origin, and the checksum of the history
      history.json      the events up to this entry: number, kind, time, model (content key) and source; a
                        promotion also has the verdict, a rollback the number of the entry that it restores
    WS/models/0001/     the first promoted model
    WS/models/current   a link to the current entry

An entry never changes and is never deleted, so the path of a model stays valid. Renaming the link switches model and
history together. A promotion that was killed before the renaming leaves an entry that is in no history; the next
promotion takes the next number.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from desra_core.errors import TransientError, UsageError
from desra_core.files import (
    as_json,
    checksum,
    content_key,
    parse_json,
    paths_in,
    read_document,
    storage_errors,
    sync_path,
)
from desra_core.workspace import Workspace

Event = dict[str, Any]
# A new entry: its event (still without a number), the model to copy, and its record.
_Step = tuple[Event, Path, Any]


def promote(
    workspace: Workspace, model: Path, *, parent: Path, record: dict[str, Any], verdict: dict[str, Any]
) -> Path:
    """Make a model the current one, unless it already is; returns the folder of the current entry.

    Args:
        workspace: Must be locked.
        model: The checkpoint that passed the gate.
        parent: The model that it was finetuned from: the current model, or any model while none was promoted.
        record: The origin of the model, for ``model.json``; like ``verdict``, JSON values only.
        verdict: Summary of the gate's verdict, for the history.

    Raises:
        UsageError: The parent is not the current model, or is the model itself; or a model cannot be read.
        TransientError: The disk is full or failed. The current model is as it was before.
    """
    current, past = current_model(workspace), history(workspace)
    key = content_key(model)
    if current is not None and key == past[-1]["model"]:
        return current.parent
    parent_key = content_key(parent)
    if key == parent_key:
        raise UsageError(model, "is the very model that it was to replace", "promote a finetuned one")
    steps: list[_Step] = []
    if current is None:
        steps.append((_event("origin", parent_key, parent), parent, {"source": str(parent.absolute())}))
    elif parent_key != past[-1]["model"]:
        reason = f"has another content than the current model, {current}"
        raise UsageError(parent, reason, "finetune that one: another model was promoted or rolled back to")
    steps.append((_event("promotion", key, model, verdict=verdict), model, record))
    return _switch(workspace, past, steps)


def rollback(workspace: Workspace) -> Path:
    """Undo the latest promotion that was not undone yet; returns the folder of the new entry with the earlier model.

    The workspace must be locked. The current model need not be readable.

    Raises `UsageError` where there is no earlier model or it is damaged; otherwise as `promote`.
    """
    models, past = workspace.models, history(workspace)
    if not past:
        raise UsageError(models, "no model was promoted yet", "there is nothing to roll back")
    line = _line(past)
    if len(line) < 2:
        raise UsageError(models, "there is no earlier model", "promote another one")
    earlier = models / f"{line[-2]['number']:04d}"
    remedy = f"restore it from a backup, or link {models / 'current'} to another folder"
    model = _checked(earlier, line[-2]["model"], remedy)
    event = _event("rollback", line[-2]["model"], model, restores=line[-2]["number"])
    return _switch(workspace, past, [(event, model, _read(earlier / "model.json"))])


def current_model(workspace: Workspace) -> Path | None:
    """Return the file of the current model, which never changes; None where none was promoted.

    Raises `UsageError` where it is missing or damaged.
    """
    entry = _current(workspace)
    if entry is None:
        return None
    return _checked(entry, _events(entry)[-1]["model"], "restore it from a backup, or roll back")


def history(workspace: Workspace) -> list[Event]:
    """List the origin, promotions and rollbacks up to the current model; empty where none was promoted.

    Raises `UsageError` where the history is missing or damaged.
    """
    entry = _current(workspace)
    return [] if entry is None else _events(entry)


def damaged_entries(workspace: Workspace) -> list[UsageError]:
    """Check the model and the history of every entry; list what is wrong."""
    found = []
    for entry in paths_in(workspace.models, "[0-9]*"):
        try:
            _checked(entry, _events(entry)[-1]["model"], "bring it back from a copy, or roll back")
        except UsageError as error:
            found.append(error)
    return found


def rolled_back(workspace: Workspace, model: Path) -> bool:
    """Check whether a model was promoted once and is no longer the current one."""
    past, key = history(workspace), content_key(model)
    promoted = {event["model"] for event in past if event["kind"] == "promotion"}
    return key in promoted and key != past[-1]["model"]


def _event(kind: str, key: str, source: Path, **more: Any) -> Event:
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"kind": kind, "time": time, "model": key, "source": str(source.absolute()), **more}


def _line(events: Iterable[Event]) -> list[Event]:
    """List the events that no rollback has undone; the last of them made the current model current."""
    line: list[Event] = []
    for event in events:
        if event["kind"] == "rollback":
            line.pop()
        else:
            line.append(event)
    return line


def _current(workspace: Workspace) -> Path | None:
    """Find the folder of the current entry."""
    link = workspace.models / "current"
    try:
        entry = link.parent / os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError as error:  # copying the workspace may have replaced the link by a folder
        reason = f"cannot be read as a link ({error.strerror})"
        raise UsageError(link, reason, "replace it by a link to the folder beside it that is to count") from None
    if not entry.is_dir():
        reason = f"is a link to {entry.name}, which is not there"
        raise UsageError(link, reason, "restore that folder, or link to another one beside it")
    return entry


def _checked(entry: Path, key: str, remedy: str) -> Path:
    """Return the model of an entry, if its content has not changed."""
    model = entry / "model.pth"
    if not model.exists():
        raise UsageError(model, "does not exist", remedy)
    if content_key(model) != key:
        raise UsageError(model, "has changed since it was promoted", remedy)
    return model


def _events(entry: Path) -> list[Event]:
    """Read the history of an entry (raises `UsageError` where it is damaged)."""
    path = entry / "history.json"
    events = _read(path)
    # An older desra wrote no checksum beside it.
    if read_document(entry / "model.json").get("history") not in (None, checksum(path.read_bytes())):
        raise UsageError(path, "is not as it was written", "restore it from a backup")
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        if all({"number", "kind", "model"} <= event.keys() for event in events) and _line(events):
            return list(events)
    raise UsageError(path, "is no history", "restore it from a backup")


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UsageError(path, reason, "restore it from a backup") from None


def _switch(workspace: Workspace, past: list[Event], steps: list[_Step]) -> Path:
    """Make an entry for each step, and link to the last one. After an error the link is as it was before."""
    models, new_link = workspace.models, workspace.models / "current.new"
    with storage_errors(models):
        scratch = workspace.scratch()
        try:
            scratch.mkdir()
            models.mkdir(exist_ok=True)
            new_link.unlink(missing_ok=True)
            names = []
            taken = (int(path.name) for path in models.iterdir() if path.name.isdecimal())
            for number, (event, model, record) in enumerate(steps, 1 + max(taken, default=-1)):
                past = [*past, {"number": number, **event}]
                names.append(f"{number:04d}")
                _write_entry(scratch / names[-1], model, record, past)
            new_link.symlink_to(names[-1])  # before the renames, because a link needs space on the disk and they do not
            for name in names:
                os.rename(scratch / name, models / name)
            sync_path(models)
            sync_path(workspace.root)
            os.replace(new_link, models / "current")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with contextlib.suppress(OSError):
                new_link.unlink()
    with contextlib.suppress(OSError):  # the switch is done, and an error would make people repeat it
        sync_path(models)
    return models / names[-1]


def _write_entry(folder: Path, source: Path, record: dict[str, Any], events: list[Event]) -> None:
    """Write an entry durably; raise `TransientError` if the model is not the one that the last event names."""
    past = json.dumps(events, indent=1).encode() + b"\n"
    folder.mkdir()
    shutil.copyfile(source, folder / "model.pth")
    if content_key(folder / "model.pth") != events[-1]["model"]:
        raise TransientError(source, "changed while it was copied", "run again")
    (folder / "history.json").write_bytes(past)
    (folder / "model.json").write_bytes(as_json(record | {"history": checksum(past)}))
    for path in (*folder.iterdir(), folder):
        sync_path(path)
