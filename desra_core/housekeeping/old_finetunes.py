"""Find finetune folders and gate records that gc may delete.

The latest finetune and unfinished finetunes of the current model stay whole. A finetune that a document names stays
without its training images and state. Such documents are the settings of the latest run, the latest verdict, the record
of a promoted model, and run.json of a finetune that stays. So after a rollback, the finetune of the restored model is
found ended and judged. All others are deleted whole: a partly deleted finetune would look like a run in progress.

Of the gate, judgements of the latest comparison and of the finetunes that stay are kept.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from desra_core.errors import UsageError
from desra_core.files.atomic import is_unfinished
from desra_core.files.hashing import content_key
from desra_core.files.locks import holder
from desra_core.gate.model_registry import history
from desra_core.housekeeping.contents import KEY, UNKNOWN, Item, entries, item, own_entries
from desra_core.settings import CorpusSettings
from desra_core.training.run_folder import RunFolder, read_json
from desra_core.workspace import Workspace

UNFINISHED = "left half-written by runs that were cut off"

_PARTS = {"run.json", "data", "state.pth", "losses.json", "progress.json", "models", "tensorboard", "lock"}
_MODEL = re.compile(r"iteration_\d{6}(\.discriminator)?\.(pth|json)")
_CANDIDATE = re.compile(r"[0-9a-f]{32}-\w+\.pth")
# The folders of the gate, and the names in them.
_GATE = {"judgements": KEY, "candidates": _CANDIDATE, "compared": re.compile(r"[0-9a-f]{32}\.json")}


def old_finetunes(workspace: Workspace, settings: CorpusSettings) -> Iterator[Item]:
    """List finetunes and judgements that may be deleted, whole or in part, and unknown files; nothing is changed.

    Args:
        workspace: Of any run that has ended.
        settings: Those of the latest run.

    Raises:
        UsageError: The history of the models is damaged.
    """
    runs: dict[str, RunFolder] = {}
    for entry in own_entries(workspace.finetune("")):
        if KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            runs[entry.name] = RunFolder(Path(entry.path))
        else:
            yield item(workspace, entry.path, UNKNOWN)
    begun = {key: [path for path in (run.document, run.progress) if path.exists()] for key, run in runs.items()}
    latest = max(runs, key=lambda key: max((path.stat().st_mtime for path in begun[key]), default=0.0), default="")
    model = _model_in_use(workspace, settings)
    whole = {key for key, run in runs.items() if key == latest or _stays_whole(run, model)}
    notes, latest_notes = _comparisons(workspace)
    documents = [workspace.settings, workspace.verdict, *(workspace.root / "models").glob("*/*.json")]
    texts = [_text(path) for path in (*documents, *(runs[key].document for key in whole))]
    texts += [notes[name]["after"] for name in latest_notes]
    used_candidates = set(_CANDIDATE.findall("\n".join(texts)))
    staying = set(whole)
    while texts:  # a finetune that stays names others
        text = texts.pop()
        named = {key for key in runs if key not in staying and key in text}
        staying |= named
        texts += [_text(runs[key].document) for key in named]
    for key, run in runs.items():
        if key not in staying:
            reason = "finetunes that others have replaced" if run.document.exists() else "finetunes that never began"
            yield item(workspace, run.root, "finetunes", reason)
            continue
        for entry, known in () if _is_running(run) else _parts(run):
            if _is_scratch(entry):
                yield item(workspace, entry.path, "finetunes", UNFINISHED)
            elif not known:
                yield item(workspace, entry.path, UNKNOWN)
        for path in (run.data, run.state) if key not in whole and _has_ended(run) else ():
            if path.exists():
                yield item(workspace, path, "finetunes", "states of superseded finetunes")
    kept = {name for name, note in notes.items() if any(key in note["after"] for key in staying)} | latest_notes
    # Other candidates are made from their checkpoints again when they are asked for.
    at_hand = {name for name in kept if latest and latest in notes[name]["after"]} | latest_notes
    needed = {
        "judgements": {each["judgements"] for name in kept for each in notes[name]["candidates"]},
        "candidates": used_candidates | {each["file"] for name in at_hand for each in notes[name]["candidates"]},
        "compared": kept,
    }
    if notes:
        yield from _of_gate(workspace, needed)


def _of_gate(workspace: Workspace, needed: dict[str, set[Any]]) -> Iterator[Item]:
    """List files of the gate that are not needed, and unknown ones."""
    for entry in own_entries(workspace.gate):
        if entry.name not in needed or not entry.is_dir(follow_symlinks=False):
            if entry.name != workspace.verdict.name:
                yield item(workspace, entry.path, UNKNOWN)
            continue
        for part in entries(entry.path):
            is_kind = part.is_dir(follow_symlinks=False) == (entry.name == "judgements") and not part.is_symlink()
            if _is_scratch(part):
                yield item(workspace, part.path, "gate", UNFINISHED)
            elif not is_kind or not _GATE[entry.name].fullmatch(part.name):
                yield item(workspace, part.path, UNKNOWN)
            elif part.name not in needed[entry.name]:
                yield item(workspace, part.path, "gate", "of earlier comparisons")


def _comparisons(workspace: Workspace) -> tuple[dict[str, Any], set[str]]:
    """Read the notes of the gate on its comparisons, by file name, and name the latest ones.

    The latest are the note of the latest verdict and notes without a verdict yet. Where a note is damaged, or that of
    the verdict is missing (earlier versions wrote none), no notes are returned: then the gate is left alone.
    """
    verdict = read_json(workspace.verdict)
    concluded = workspace.verdict.stat().st_mtime_ns if verdict else 0
    notes, latest = {}, set()
    for entry in own_entries(workspace.compared(Path()).parent):
        note = read_json(Path(entry.path))
        try:
            after, _ = note["after"], [(each["judgements"], each["file"]) for each in note["candidates"]]
        except (TypeError, KeyError):
            return {}, set()
        notes[entry.name] = note
        if not verdict or after == verdict["after"] or entry.stat().st_mtime_ns > concluded:
            latest.add(entry.name)
    if verdict and all(note["after"] != verdict["after"] for note in notes.values()):
        return {}, set()
    return notes, latest


def _stays_whole(run: RunFolder, model: str | None) -> bool:
    """Check whether an earlier finetune stays whole: it may go on, is running, or holds unknown files."""
    if _is_running(run) or any(not known and not _is_scratch(entry) for entry, known in _parts(run)):
        return True
    document = read_json(run.document)
    if document is None or _has_ended(run):
        return False
    return model is None or (document.get("parent") or {}).get("key") == model


def _has_ended(run: RunFolder) -> bool:
    """Check whether a finetune has done what it was last asked to do."""
    training = (read_json(run.document) or {}).get("training", {})
    asked = (read_json(run.progress) or {}).get("iterations", training.get("iterations", 1))
    return run.reached(asked, training.get("patience", 1))


def _is_running(run: RunFolder) -> bool:
    """Check whether a process holds the folder of a finetune, as a worker does even where its driver has died."""
    try:
        return holder(run.root / "lock") is not None
    except OSError:
        return True


def _model_in_use(workspace: Workspace, settings: CorpusSettings) -> str | None:
    """Find the key of the model that the next finetune starts from; None where it cannot be known."""
    if past := history(workspace):
        return str(past[-1]["model"])
    given: Path | None = getattr(settings, "gan_model", None)
    with contextlib.suppress(UsageError):
        return content_key(given) if given else None
    return None


def _parts(run: RunFolder) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """List the entries of a finetune's folder and of its models, and whether a finetune makes entries so named."""
    for entry in entries(run.root):
        yield entry, entry.name in _PARTS and not entry.is_symlink()
    for entry in own_entries(run.root / "models"):
        yield entry, _MODEL.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _is_scratch(entry: os.DirEntry[str]) -> bool:
    return is_unfinished(entry.name) and entry.is_file(follow_symlinks=False)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
