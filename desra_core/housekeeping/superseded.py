"""Finetunes, and what judged them, that no later cycle, comparison or rollback comes back to.

A finetune stays whole while it is the latest one, or has not ended and its parent is in use. It stays without its
training images and its state, with which it could go on, where a document names it: the settings of the latest run, the
latest verdict, the entry of a promoted model, or a finetune that stays. So whoever rolls back finds the finetune of
that model ended and judged, as it was. The others go as a whole: of half a one, a cycle would believe that it had
begun.

Of the gate, that stays which the latest comparison and those of these finetunes rest on.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from desra_core.errors import UsageError
from desra_core.files.atomic import is_unfinished
from desra_core.files.hashing import content_key
from desra_core.files.locks import holder
from desra_core.gate.model_registry import history
from desra_core.housekeeping.holdings import UNKNOWN, Leftover, is_key, own_entries, unknown
from desra_core.housekeeping.sizes import entries, size_of
from desra_core.settings import CorpusSettings
from desra_core.training.run_folder import RunFolder, read_json
from desra_core.workspace import Workspace

UNFINISHED = "left half-written by runs that were cut off"

_PARTS = {"run.json", "data", "state.pth", "losses.json", "progress.json", "models", "tensorboard", "lock"}
_MODEL = re.compile(r"iteration_\d{6}(\.discriminator)?\.(pth|json)")
_CANDIDATE = re.compile(r"[0-9a-f]{32}-\w+\.pth")
_GATE = {
    "judgements": re.compile(r"[0-9a-f]{32}"),
    "candidates": _CANDIDATE,
    "compared": re.compile(r"[0-9a-f]{32}\.json"),
}


class _Compared(NamedTuple):
    """What the latest comparison of a finetune rests on; ``counts`` if no verdict on another one has replaced it."""

    name: str
    after: str
    judgements: set[str]
    candidates: set[str | None]
    counts: bool


def superseded(workspace: Workspace, settings: CorpusSettings) -> Iterator[Leftover]:
    """What there is of such finetunes and judgements, and what lies among them that no run has made.

    Parameters
    ----------
    workspace
        Nothing in it changes.
    settings
        Of its latest run.

    Raises
    ------
    UsageError
        The history of its models is damaged.
    """
    runs: dict[str, RunFolder] = {}
    for entry in own_entries(workspace.finetune("")):
        if is_key(entry.name) and entry.is_dir(follow_symlinks=False):
            runs[entry.name] = RunFolder(Path(entry.path))
        else:
            yield stranger(workspace, entry)
    latest = max(runs, key=lambda key: _time(runs[key]), default=None)
    model = _model_in_use(workspace, settings)
    whole = {key for key, run in runs.items() if key == latest or _is_held(run, model)}
    compared = _compared(workspace)
    documents = [workspace.settings, workspace.verdict, *(workspace.root / "models").glob("*/*.json")]
    texts = [_text(path) for path in documents]
    texts += [each.after for each in compared if each.counts] + [_text(runs[key].document) for key in whole]
    staying = whole | _named(runs, texts)
    for key, run in runs.items():
        if key in staying:
            yield from _within(workspace, run, whole=key in whole)
        else:
            reason = "finetunes that others have replaced" if run.document.exists() else "finetunes that never began"
            yield _leftover(workspace, run.root, reason)
    used = set(_CANDIDATE.findall("\n".join(texts)))
    if compared:
        yield from _judged(workspace, compared, staying, latest, used)


def _within(workspace: Workspace, run: RunFolder, *, whole: bool) -> Iterator[Leftover]:
    """What is not needed of a finetune that stays, and what is no part of it."""
    running = _is_running(run)
    for entry, known in _parts(run):
        if _is_scratch(entry) and not running:
            yield _leftover(workspace, Path(entry.path), UNFINISHED)
        elif not known and not running:
            yield stranger(workspace, entry)
    if not whole and _has_ended(run):
        for path in (run.data, run.state):
            if path.exists():
                yield _leftover(workspace, path, "what finetunes that others have replaced could go on with")


def _judged(
    workspace: Workspace, compared: list[_Compared], staying: Iterable[str], latest: str | None, used: set[str]
) -> Iterator[Leftover]:
    """What judged finetunes that are gone, and candidates that no document names."""
    kept = [each for each in compared if each.counts or any(key in each.after for key in staying)]
    # Candidates of the others are split off their checkpoints again when they are asked for.
    at_hand = [each for each in kept if each.counts or (latest is not None and latest in each.after)]
    needed: dict[str, Collection[str | None]] = {
        "judgements": {key for each in kept for key in each.judgements},
        "candidates": used.union(*(each.candidates for each in at_hand)),
        "compared": {each.name for each in kept},
    }
    for entry in own_entries(workspace.gate):
        if entry.name not in needed or not entry.is_dir(follow_symlinks=False):
            if entry.name != workspace.verdict.name:
                yield stranger(workspace, entry)
            continue
        for part in entries(entry.path):
            folder = part.is_dir(follow_symlinks=False)
            if _is_scratch(part):
                yield _leftover(workspace, Path(part.path), UNFINISHED)
            elif (
                part.is_symlink()
                or not _GATE[entry.name].fullmatch(part.name)
                or folder != (entry.name == "judgements")
            ):
                yield stranger(workspace, part)
            elif part.name not in needed[entry.name]:
                yield _leftover(workspace, Path(part.path), "of earlier comparisons")


def _compared(workspace: Workspace) -> list[_Compared]:
    """What the gate's folder holds of comparisons; none where one is damaged, or lacks as of earlier versions."""
    verdict = read_json(workspace.verdict)
    concluded = workspace.verdict.stat().st_mtime_ns if verdict else 0
    found = []
    for entry in own_entries(workspace.compared(Path()).parent):
        document = read_json(Path(entry.path))
        try:
            after, told = document["after"], document["candidates"]
            keys, files = ({each[field] for each in told} for field in ("judgements", "file"))
        except (TypeError, KeyError):
            return []
        counts = not verdict or after == verdict["after"] or entry.stat().st_mtime_ns > concluded
        found.append(_Compared(entry.name, after, keys, files, counts))
    return [] if verdict and all(each.after != verdict["after"] for each in found) else found


def _named(runs: dict[str, RunFolder], texts: Iterable[str]) -> set[str]:
    """The finetunes that texts name, and those that their documents name."""
    named: set[str] = set()
    unread = list(texts)
    while unread:
        text = unread.pop()
        fresh = {key for key in runs if key not in named and key in text}
        named |= fresh
        unread += [_text(runs[key].document) for key in fresh]
    return named


def _is_held(run: RunFolder, model: str | None) -> bool:
    """Whether a finetune that is not the latest is to stay whole."""
    document = read_json(run.document)
    strange = any(not known and not _is_scratch(entry) for entry, known in _parts(run))
    if document is None or strange or _is_running(run):
        return strange or _is_running(run)
    return not _has_ended(run) and (model is None or (document.get("parent") or {}).get("key") == model)


def _has_ended(run: RunFolder) -> bool:
    """Whether a finetune has done what it was last asked to do."""
    training = (read_json(run.document) or {}).get("training", {})
    progress = read_json(run.progress) or {}
    if progress.get("worse", 0) >= training.get("patience", 1):
        return True
    reached = progress.get("iteration", 0)
    return reached >= progress.get("iterations", training.get("iterations", 1)) and run.model(reached).exists()


def _is_running(run: RunFolder) -> bool:
    """Whether a worker holds a finetune's folder, should its driver have died."""
    try:
        return holder(run.root / "lock") is not None
    except OSError:
        return True


def _model_in_use(workspace: Workspace, settings: CorpusSettings) -> str | None:
    """The key of the model that the next finetune starts from; None where nobody can know."""
    past = history(workspace)
    if past:
        return str(past[-1]["model"])
    given: Path | None = getattr(settings, "gan_model", None)
    with contextlib.suppress(UsageError):
        return content_key(given) if given else None
    return None


def _parts(run: RunFolder) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """What lies in a finetune's folder and among its models, and whether finetunes make such."""
    for entry in entries(run.root):
        yield entry, entry.name in _PARTS and not entry.is_symlink()
    for entry in own_entries(run.root / "models"):
        yield entry, _MODEL.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _time(run: RunFolder) -> float:
    """When a finetune was begun or last went on."""
    return max((path.stat().st_mtime for path in (run.document, run.progress) if path.exists()), default=0.0)


def _is_scratch(entry: os.DirEntry[str]) -> bool:
    return is_unfinished(entry.name) and entry.is_file(follow_symlinks=False)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _leftover(workspace: Workspace, path: Path, reason: str) -> Leftover:
    place = path.relative_to(workspace.root).as_posix()
    size = size_of(path) if path.is_dir() else (1, path.stat().st_size)
    return Leftover(place.partition("/")[0], place, *size, reason)


def stranger(workspace: Workspace, entry: os.DirEntry[str]) -> Leftover:
    """What no run makes, and stays."""
    found = unknown(entry, Path(entry.path).relative_to(workspace.root).as_posix())
    return Leftover(UNKNOWN, found.path, found.files, found.bytes, "")
