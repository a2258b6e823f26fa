"""Find and delete files that no run needs: the manifest, the records and the settings of the latest run decide.

Files of pending images stay, since the next run replaces them. So do files of images beyond ``--limit``, and of
vanished images unless ``--vanished`` is given. Human masks always stay.

The latest finetune and unfinished finetunes of the current model stay whole. A finetune that a document names stays
without its training images and state. Such documents are the settings of the latest run, the latest verdict, the record
of a promoted model, and run.json of a finetune that stays. So after a rollback, the finetune of the restored model
still counts as ended and judged. All other finetunes are deleted whole: a partly deleted one would look like a run in
progress. The gate keeps the judgements of the latest comparison and of the finetunes that stay.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import TransientError, UsageError
from desra_core.files import content_key, holder, is_unfinished, paths_in, read_document, read_json
from desra_core.gate.model_registry import history
from desra_core.housekeeping import contents
from desra_core.housekeeping.contents import EMPTY, KEY, UNKNOWN, Item, entries, item, table_of
from desra_core.images.scanning import paths_of
from desra_core.planning.plan import COLUMNS, assess, load_settings, publish_tables
from desra_core.remote import Remote
from desra_core.settings import CorpusSettings
from desra_core.training.plan import RunFolder
from desra_core.workspace import Workspace, products, read_table
from desra_core.workspace.manifest import asked_for, read_manifest
from desra_core.workspace.products import SCHEMA, Target, finished_shards, flags_of, read_records

_UNFINISHED = "left half-written by runs that were cut off"
_PARTS = {"run.json", "data", "state.pth", "losses.json", "progress.json", "models", "tensorboard", "lock"}
_MODEL = re.compile(r"iteration_\d{6}(\.discriminator)?\.(pth|json)")
_CANDIDATE = re.compile(r"[0-9a-f]{32}-\w+\.pth")
# The folders of the gate, and the names in them.
_GATE = {"judgements": KEY, "candidates": _CANDIDATE, "compared": re.compile(r"[0-9a-f]{32}\.json")}
_STALE = pa.schema([("id", pa.string()), ("shard", pa.int32())])
_STAYS = pa.scalar(None, pa.string())


class Garbage(NamedTuple):
    """The items that may be deleted, and the changes to the tables."""

    table: pa.Table  # items that no run needs, and unknown ones, which stay (schema `contents.ITEMS`)
    manifest: pa.Table  # the manifest without the images that go
    target: Target  # the keys of the latest run
    stale: pa.Table  # the records that go: columns ``id``, and ``shard``, the shard whose table has the record
    unmapped: pa.Array  # ids of images whose similarity maps go, while the images themselves stay
    unlabelled: pa.Array  # ids of images whose labels go, while the images themselves stay


def find_garbage(workspace: Workspace, *, vanished: bool = False) -> Garbage:
    """Find files that no run needs any more, and change nothing. No run may be in progress.

    Args:
        workspace: A workspace with a manifest.
        vanished: Also find the files of images that the latest run did not find and whose photos are not there now.

    Raises:
        UsageError: The folder is no workspace, or a table of it is damaged or missing.
    """
    settings, target = load_settings(workspace)
    if not workspace.manifest.exists():
        raise UsageError(workspace.root, "has no manifest", f"run desra {settings.verb}")
    manifest = staying = read_manifest(workspace)
    if vanished:
        sources, present = settings.sources, manifest["present"].to_pylist()
        paths = paths_of(sources.main, manifest, f"{sources.identity[-1]}_")
        stays = [there or _lies_there(path) for there, path in zip(present, paths, strict=True)]
        staying = manifest.filter(pa.array(stays, pa.bool_()))
    held = table_of(contents.images_contents(workspace))
    reasons = _reasons(held, _unkept(held, workspace, settings, target, staying), manifest, staying)
    held = held.set_column(contents.ITEMS.get_field_index("reason"), "reason", reasons)
    going = held.filter(pc.or_(reasons.is_valid(), pc.equal(held["kind"], UNKNOWN)))
    maps = held.filter(pc.and_(pc.equal(held["kind"], "maps"), reasons.is_valid()))
    unmapped, unlabelled = (
        maps.filter(pc.equal(maps["part"], part))["owner"].combine_chunks() for part in ("similarity", "labels")
    )
    found = Garbage(going, staying, target, _stale_records(workspace, staying), unmapped, unlabelled)
    others = [
        *_unfinished(workspace),
        *_histograms(workspace, target),
        *_unpacked(workspace),
        *_old_finetunes(workspace, settings),
        *_shrunk_tables(workspace, found),
    ]
    return found._replace(table=pa.concat_tables([going, table_of(others)]).combine_chunks())


def _lies_there(path: Path) -> bool:
    return path.exists() if isinstance(path, Remote) else os.path.lexists(path)


def _reasons(held: pa.Table, unkept: pa.Array, manifest: pa.Table, staying: pa.Table) -> pa.Array:
    """Explain why each item may go; null for items that stay. ``unkept`` is the result of `_unkept`."""
    kinds, owners, parts = (held[name].combine_chunks() for name in ("kind", "owner", "part"))
    of_maps = pc.equal(kinds, "maps")

    def unlisted(rows: pa.Table) -> pa.Array:
        of_ids, of_names = (pc.is_in(owners, rows[column].combine_chunks()) for column in ("id", "name"))
        return pc.invert(pc.if_else(of_maps, of_ids, of_names))

    # The first case that holds decides.
    cases = [
        (pc.equal(kinds, UNKNOWN), _STAYS),
        (pc.equal(kinds, EMPTY), "empty folders"),
        (unlisted(manifest), "of images that the manifest does not have"),
        (unlisted(staying), "of images that have vanished"),
        (of_maps, unkept),
    ]
    conditions, values = zip(*cases, strict=True)
    reasons = pc.case_when(pc.make_struct(*conditions, field_names=[*map(str, range(len(cases)))]), *values)
    # The file that makes a folder a zarr group stays as long as something else in the folder does.
    of_group = pc.and_(of_maps, pc.equal(parts, ""))
    others_stay = pc.is_in(owners, owners.filter(pc.and_(reasons.is_null(), pc.invert(of_group))))
    return pc.if_else(pc.and_(of_group, others_stay), _STAYS, reasons)


def _unkept(
    held: pa.Table, workspace: Workspace, settings: CorpusSettings, target: Target, manifest: pa.Table
) -> pa.Array:
    """Explain why the settings of the latest run do not keep an array.

    Null where they do, and for items of pending images and of images that the latest run was not asked for.
    """
    rows = asked_for(manifest).slice(0, settings.limit)
    work = assess(rows, read_records(workspace, COLUMNS), target, products.held_by(workspace, rows, target.gan_sr_key))
    keeps = {array: flags & ~work.failed for array, flags in products.kept_arrays(target, work.whole).items()}
    keeps["mse_sr"] |= target.keep_mse  # also of failed images
    ids = rows["id"].combine_chunks()
    done = pc.invert(pc.is_in(ids, ids.filter(pa.array(work.pending))))
    # For each item, the row of its image among the images that are done; null where there is none.
    row = pc.index_in(held["owner"].combine_chunks(), ids.filter(done))
    kept = np.zeros(len(row), bool)
    for array, flags in keeps.items():
        kept |= flags_of(pa.array(flags).filter(done).take(row)) & flags_of(pc.equal(held["part"], array))
    failed = pc.fill_null(pa.array(work.failed).filter(done).take(row), False)
    settings_drop = f"that --keep {target.keep} and the other settings do not keep"
    unkept = pc.if_else(failed, "of images that failed for good", settings_drop)
    return pc.if_else(pc.and_(row.is_valid(), pc.invert(pa.array(kept))), unkept, _STAYS)


def _unfinished(workspace: Workspace) -> Iterator[Item]:
    """List half-written files of killed runs; locking the workspace deletes them."""
    for entry in entries(workspace.tmp):
        if entry.name != workspace.fence:
            yield item(workspace, entry.path, "tmp", _UNFINISHED)


def _histograms(workspace: Workspace, target: Target) -> Iterator[Item]:
    """List histograms of other settings, and unknown files among them."""
    from desra_core.calibration.counting import histogram_key

    current = histogram_key(target)
    for entry in entries(workspace.root / "calibration"):
        if not (KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)):
            yield item(workspace, entry.path, UNKNOWN)
        elif entry.name != current:
            yield item(workspace, entry.path, "calibration", "counts under other settings")


def _unpacked(workspace: Workspace) -> Iterator[Item]:
    """List the pictures that no tar file has got; a delivery that goes on after all makes them anew."""
    reason = "pictures that a cut-off delivery has not put into tar files"
    for entry in entries(workspace.deliveries):
        if (folder := workspace.unpacked(entry.name)).is_dir() and not entry.is_symlink() and not folder.is_symlink():
            yield item(workspace, folder, "deliveries", reason)


def _stale_records(workspace: Workspace, manifest: pa.Table) -> pa.Table:
    """Find records of images that the manifest lacks, and older records of images that are now in another shard."""
    tables = [_STALE.empty_table()]
    for shard in finished_shards(workspace):
        ids = read_table(workspace.shard_records(shard), SCHEMA, ["id"])["id"]
        tables.append(pa.table([ids, pa.array([shard] * len(ids), pa.int32())], schema=_STALE))
    records = pa.concat_tables(tables).combine_chunks()
    ids = records["id"].combine_chunks()
    shards = manifest["shard"].combine_chunks().take(pc.index_in(ids, manifest["id"].combine_chunks()))
    at_home = pc.fill_null(pc.equal(shards, records["shard"].combine_chunks()), False)
    elsewhere = pc.and_(pc.invert(at_home), pc.is_in(ids, ids.filter(at_home)))
    return records.filter(pc.or_(shards.is_null(), elsewhere))


def _rewritten(workspace: Workspace, found: Garbage) -> Iterator[tuple[int, pa.Table]]:
    """Yield each shard whose table changes, with its new table: without the records, maps and labels that go."""
    for shard in finished_shards(workspace):
        path = workspace.shard_records(shard)
        gone = found.stale.filter(pc.equal(found.stale["shard"], shard))["id"].combine_chunks()
        ids = read_table(path, SCHEMA, ["id"])["id"]
        if not any(pc.any(pc.is_in(ids, some)).as_py() for some in (gone, found.unmapped, found.unlabelled)):
            continue
        table = read_table(path, SCHEMA)
        table = table.filter(pc.invert(pc.is_in(table["id"], gone)))
        for name, some in (("similarity_kept", found.unmapped), ("labels_kept", found.unlabelled)):
            kept = pc.and_(table[name], pc.invert(pc.is_in(table["id"], some)))
            table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), kept)
        yield shard, table


def _shrunk_tables(workspace: Workspace, found: Garbage) -> Iterator[Item]:
    """List the tables of shards that become smaller, with the bytes freed; tables that become empty are deleted."""
    affected = set(found.stale["shard"].to_pylist())
    for shard, table in _rewritten(workspace, found):
        if shard in affected:
            path = workspace.shard_records(shard)
            sink = io.BytesIO()
            pq.write_table(table, sink)
            freed = path.stat().st_size - (sink.tell() if table.num_rows else 0)
            whole = item(workspace, path, "outcomes", "records of images that the manifest does not have")
            yield whole._replace(files=int(not table.num_rows), bytes=max(0, freed))


def sweep(
    workspace: Workspace, *, vanished: bool = False, on_dropped: Callable[[int, int], None] | None = None
) -> Garbage:
    """Delete the garbage of a workspace: rows of the manifest first, then records, then files.

    A sweep that is killed at any moment leaves a valid workspace, and the next sweep deletes the rest.

    Args:
        workspace, vanished: As for `find_garbage`.
        on_dropped: Called with the number of files and folders deleted so far, and the number of all.

    Returns:
        The garbage; all of it but the unknown items has been deleted.

    Raises:
        LockedError: A run holds the workspace.
        UsageError: As `find_garbage`.
        TransientError: Something cannot be deleted.
    """
    scratch = table_of(_unfinished(workspace))  # locking the workspace deletes these
    with workspace.locked() as workspace:
        products.gather_journals(workspace)
        found = find_garbage(workspace, vanished=vanished)
        workspace.publish_table(workspace.manifest, found.manifest)
        for shard, table in _rewritten(workspace, found):
            if table.num_rows:
                workspace.publish_table(workspace.shard_records(shard), table)
            else:
                workspace.shard_records(shard).unlink()
        _drop(workspace, found.table, on_dropped)
        if workspace.regions.exists():
            publish_tables(workspace, found.target)
    return found._replace(table=pa.concat_tables([scratch, found.table]))


def _drop(workspace: Workspace, table: pa.Table, on_dropped: Callable[[int, int], None] | None) -> None:
    """Delete files and folders, and then the folders above that they leave empty."""
    listed = table.filter(pc.invert(pc.is_in(table["kind"], pa.array((UNKNOWN, EMPTY, "outcomes", "tmp")))))
    folders = set(table.filter(pc.equal(table["kind"], EMPTY))["path"].to_pylist())
    for number, path in enumerate(listed["path"].to_pylist(), 1):
        place = workspace.root / path
        try:
            if place.is_dir() and not place.is_symlink():
                # Rename the folder first: half of a folder could be taken for the whole.
                shutil.rmtree(place.rename(workspace.scratch()))
            else:
                place.unlink(missing_ok=True)
        except OSError as error:
            reason = f"cannot be deleted ({error.strerror or error})"
            raise TransientError(place, reason, "check its permissions and run again") from error
        folders.add(os.path.dirname(path))
        if on_dropped:
            on_dropped(number, listed.num_rows)
    for folder in map(PurePosixPath, sorted(folders, key=len, reverse=True)):
        with contextlib.suppress(OSError):  # raised by a folder that is not empty: it stays, with all above it
            for each in (folder, *folder.parents):
                if len(each.parts) > 1 + (each.parts[:1] == ("dataset",)):  # top folders and those of dataset/ stay
                    (workspace.root / each).rmdir()


def _old_finetunes(workspace: Workspace, settings: CorpusSettings) -> Iterator[Item]:
    """List finetunes and judgements that may be deleted, whole or in part, and unknown files."""
    runs: dict[str, RunFolder] = {}
    for entry in entries(workspace.finetune("")):
        if KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            runs[entry.name] = RunFolder(Path(entry.path))
        else:
            yield item(workspace, entry.path, UNKNOWN)
    begun = {key: [path for path in (run.document, run.progress) if os.path.exists(path)] for key, run in runs.items()}
    latest = max(runs, key=lambda key: max((path.stat().st_mtime for path in begun[key]), default=0.0), default="")
    model = _model_in_use(workspace, settings)
    whole = {key for key, run in runs.items() if key == latest or _stays_whole(run, model)}
    notes, new_notes = _comparisons(workspace)
    # A finetune stays if a document of the workspace, or of another finetune that stays, names it.
    paths = [
        workspace.settings,
        workspace.verdict,
        *chain.from_iterable(paths_in(entry, "*.json") for entry in paths_in(workspace.models, "*")),
    ]
    documents = [_text(path) for path in (*paths, *(runs[key].document for key in whole))]
    documents += [notes[name]["after"] for name in new_notes]
    named_candidates = set(_CANDIDATE.findall("\n".join(documents)))
    staying = set(whole)
    while documents:
        document = documents.pop()
        named = {key for key in runs if key not in staying and key in document}
        staying |= named
        documents += [_text(runs[key].document) for key in named]
    for key, run in runs.items():
        if key not in staying:
            reason = "finetunes that others have replaced" if run.document.exists() else "finetunes that never began"
            yield item(workspace, run.root, "finetunes", reason)
            continue
        for entry, known in () if _is_running(run) else _parts(run):
            if _is_scratch(entry):
                yield item(workspace, entry.path, "finetunes", _UNFINISHED)
            elif not known:
                yield item(workspace, entry.path, UNKNOWN)
        for path in (run.data, run.state) if key not in whole and run.has_ended() else ():
            if path.exists():
                yield item(workspace, path, "finetunes", "states of superseded finetunes")
    if not notes:
        return
    # Judgements stay as long as their finetune, candidates only of the latest comparisons: they can be made again.
    kept = new_notes | {name for name, note in notes.items() if any(key in note["after"] for key in staying)}
    recent = new_notes | {name for name in kept if latest and latest in notes[name]["after"]}
    needed = {
        "judgements": {each["judgements"] for name in kept for each in notes[name]["candidates"]},
        "candidates": named_candidates | {each["file"] for name in recent for each in notes[name]["candidates"]},
        "compared": kept,
    }
    yield from _of_gate(workspace, needed)


def _of_gate(workspace: Workspace, needed: dict[str, set[Any]]) -> Iterator[Item]:
    """List files of the gate that are not needed, and unknown ones."""
    for entry in entries(workspace.gate):
        if entry.path == str(workspace.gate_results):
            yield item(workspace, entry.path, "gate", _UNFINISHED)
            continue
        if entry.name not in needed or not entry.is_dir(follow_symlinks=False):
            if entry.name != workspace.verdict.name:
                yield item(workspace, entry.path, UNKNOWN)
            continue
        for part in entries(entry.path):
            # Judgements are folders, the others files.
            is_kind = part.is_dir(follow_symlinks=False) == (entry.name == "judgements") and not part.is_symlink()
            if _is_scratch(part):
                yield item(workspace, part.path, "gate", _UNFINISHED)
            elif not is_kind or not _GATE[entry.name].fullmatch(part.name):
                yield item(workspace, part.path, UNKNOWN)
            elif part.name not in needed[entry.name]:
                yield item(workspace, part.path, "gate", "of earlier comparisons")


def _comparisons(workspace: Workspace) -> tuple[dict[str, Any], set[str]]:
    """Read the gate's notes on its comparisons, by file name, and name the new ones.

    A note is written when a comparison begins, and names its models and files. New are the note of the latest verdict
    and all later notes, whose comparisons have no verdict yet. No notes are returned where a note or the
    verdict is damaged, or the note of the verdict is missing (earlier versions wrote none): then no file of the gate is
    deleted.
    """
    verdict = read_document(workspace.verdict)
    if "after" not in verdict and workspace.verdict.exists():
        return {}, set()
    verdict_time = workspace.verdict.stat().st_mtime_ns if verdict else 0
    notes, new = {}, set()
    for entry in entries(workspace.compared(Path()).parent):
        note = read_json(Path(entry.path))
        try:
            after, _ = note["after"], [(each["judgements"], each["file"]) for each in note["candidates"]]
        except (TypeError, KeyError):
            return {}, set()
        notes[entry.name] = note
        if not verdict or after == verdict["after"] or entry.stat().st_mtime_ns > verdict_time:
            new.add(entry.name)
    if verdict and all(note["after"] != verdict["after"] for note in notes.values()):
        return {}, set()
    return notes, new


def _stays_whole(run: RunFolder, model: str | None) -> bool:
    """Check whether an earlier finetune stays whole: it may go on, is running, or holds unknown files."""
    if _is_running(run) or any(not known and not _is_scratch(entry) for entry, known in _parts(run)):
        return True
    document = read_document(run.document)
    if not document or run.has_ended():
        return False
    parent = document.get("parent")
    return model is None or (isinstance(parent, dict) and parent.get("key") == model)


def _is_running(run: RunFolder) -> bool:
    """Check whether a process holds the folder of a finetune, as a worker does even where its driver has died."""
    try:
        return holder(run.root / "lock") is not None
    except (OSError, UsageError):
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
    for entry in entries(run.root / "models"):
        yield entry, _MODEL.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _is_scratch(entry: os.DirEntry[str]) -> bool:
    return is_unfinished(entry.name) and entry.is_file(follow_symlinks=False)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
