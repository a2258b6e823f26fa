"""The images of a workspace: scan folders, match twins, identify content, assign shards.

Everything is columns of an Arrow table; no Python object per image outlives its batch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from desra_core.errors import ImageError, UsageError
from desra_core.imageio import SUFFIXES, digest, read_bytes
from desra_core.workspace import Workspace

ROLES = ("mse_sr", "gan_sr", "lr", "labels")
FAILURES = pa.schema([(field, pa.string()) for field in ("name", "stage", "subject", "reason", "remedy")])

_BATCH = 65_536
_HASH_BATCH = 512
_FILES = pa.schema([("name", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])
_ROLE_FIELDS = (("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64()), ("hash", pa.string()))
MANIFEST = pa.schema(
    [("name", pa.string()), ("id", pa.string()), ("shard", pa.int32()), ("present", pa.bool_())]
    + [(f"{role}_{field}", kind) for role in ROLES for field, kind in _ROLE_FIELDS]
)


@dataclass(frozen=True)
class Sources:
    """The folders of a corpus. Files belong together when their paths below them agree without suffix."""

    mse_sr: Path
    gan_sr: Path
    lr: Path | None = None
    labels: Path | None = None

    def folder(self, role: str) -> Path | None:
        """The folder of a role, if there is one."""
        folder: Path | None = getattr(self, role)
        return folder

    def used(self) -> list[str]:
        """The roles that have a folder."""
        return [role for role in ROLES if self.folder(role) is not None]


class File(NamedTuple):
    """A file and the hash of the content it had when the corpus was scanned."""

    path: Path
    hash: str


@dataclass(frozen=True)
class ImageRef:
    """One image to be processed: a pair of SR results, at every name under which it occurs."""

    id: str
    shard: int
    names: tuple[str, ...]
    mse_sr: File
    gan_sr: File
    labels: File | None


class Corpus(NamedTuple):
    """The manifest after a scan, and the files that could not become part of it (schema `FAILURES`)."""

    manifest: pa.Table
    failures: pa.Table
    added: int
    replaced: int
    vanished: int


def scan(
    sources: Sources,
    workspace: Workspace,
    *,
    shard_size: int,
    limit: int | None = None,
    on_hashed: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Bring the manifest of a workspace up to date with its source folders.

    Files of unchanged size and modification time keep their hash. A new image enters a new shard and stays there;
    a changed file is a new image at the same name, and the outputs of the old one go; a vanished file keeps its
    row and outputs. Nothing in the source folders is ever written.

    Parameters
    ----------
    sources
        Where to look.
    workspace
        Its own folder is left out of the scan, should it lie inside a source folder.
    shard_size
        Images per new shard.
    limit
        Take only the first so many images, by name.
    on_hashed
        Called now and then with the number of files hashed and to be hashed.

    Raises
    ------
    UsageError
        A folder does not exist, or no image was found at all.
    """
    found, failures = _match(sources, workspace.root)
    if found.num_rows == 0 and failures.num_rows == 0:
        kinds = ", ".join(sorted(suffix[1:].upper() for suffix in SUFFIXES))
        raise UsageError(sources.gan_sr, "holds no images", f"name a folder with {kinds} files")
    found = found.sort_by("name")
    beyond = found.num_rows if limit is None else min(limit, found.num_rows)
    previous = read_manifest(workspace)
    current, unreadable = _identified(found.slice(0, beyond), previous, sources, on_hashed)
    current = _told_apart_by_labels(current)
    failures = pa.concat_tables([failures, unreadable])
    readable = found.filter(pc.invert(pc.is_in(found["name"], failures["name"].combine_chunks())))
    manifest, added, replaced = _with_shards(current, previous, readable["name"], shard_size)
    for name in replaced:
        workspace.mask(name).unlink(missing_ok=True)
    if replaced and previous is not None:
        for image_id in previous["id"].filter(pc.invert(pc.is_in(previous["id"], manifest["id"]))).to_pylist():
            shutil.rmtree(workspace.group(image_id), ignore_errors=True)
    vanished = manifest.num_rows - int(pc.sum(manifest["present"]).as_py() or 0)
    manifest = manifest.replace_schema_metadata(_roots(sources))
    if previous is None or not manifest.equals(previous, check_metadata=True):
        workspace.publish_table(workspace.manifest, manifest)
    workspace.publish_table(workspace.scan_failures, failures)
    return Corpus(manifest, failures, added, len(replaced), vanished)


def read_manifest(workspace: Workspace) -> pa.Table | None:
    """The manifest of a workspace, sorted by name; None when it has none yet."""
    if not workspace.manifest.exists():
        return None
    return pq.read_table(workspace.manifest)


def image_refs(rows: pa.Table) -> list[ImageRef]:
    """The images of some rows of a manifest, rows of equal content taken together, in the order of the rows."""
    roots = {role: Path(root.decode()) for role, root in _stored_roots(rows).items()}

    def file(row: dict[str, str], role: str) -> File:
        return File(roots[role] / row[f"{role}_path"], row[f"{role}_hash"])

    by_id: dict[str, list[dict[str, str]]] = {}
    for row in rows.to_pylist():
        by_id.setdefault(row["id"], []).append(row)
    return [
        ImageRef(
            id=image_id,
            shard=int(same[0]["shard"]),
            names=tuple(row["name"] for row in same),
            mse_sr=file(same[0], "mse_sr"),
            gan_sr=file(same[0], "gan_sr"),
            labels=file(same[0], "labels") if same[0]["labels_path"] else None,
        )
        for image_id, same in by_id.items()
    ]


def failure_rows(names: pa.Array, stage: str, subjects: pa.Array, reason: str, remedy: str) -> pa.Table:
    """Rows of the schema `FAILURES` that share a reason."""
    constant = [pa.array([text] * len(names), pa.string()) for text in (stage, reason, remedy)]
    return pa.table([names, constant[0], subjects, *constant[1:]], schema=FAILURES)


def _roots(sources: Sources) -> dict[str, str]:
    return {role: str(sources.folder(role)) for role in sources.used()}


def _stored_roots(manifest: pa.Table) -> dict[str, bytes]:
    stored = manifest.schema.metadata or {}
    return {role: stored[role.encode()] for role in ROLES if role.encode() in stored}


def _files(folder: Path, skip: Path) -> tuple[pa.Table, pa.Table]:
    """All image files below a folder (schema ``_FILES``), and what could not be looked at."""
    if not folder.is_dir():
        raise UsageError(folder, "is no folder", "name a folder of images")
    if not str(folder).isprintable():
        raise UsageError(ascii(str(folder)), "has a name that is not printable UTF-8", "rename the folder")
    problems: list[dict[str, str]] = []
    batches, rows = [_FILES.empty_table()], []
    for entry in _walk(folder, skip, problems, frozenset()):
        relative = os.path.relpath(entry.path, folder)
        try:
            relative.encode()
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):
                problems.append(_problem(entry.path, "is no file", "remove it"))
                continue
        except UnicodeEncodeError:
            problems.append(_problem(ascii(relative), "has a name that is not UTF-8", "rename it"))
            continue
        except OSError as error:
            problems.append(_problem(entry.path, f"cannot be looked at ({error.strerror})", "mend or remove it"))
            continue
        name = relative[: relative.rindex(".")]
        rows.append({"name": name, "path": relative, "size": status.st_size, "mtime": status.st_mtime_ns})
        if len(rows) == _BATCH:
            batches.append(pa.Table.from_pylist(rows, _FILES))
            rows.clear()
    batches.append(pa.Table.from_pylist(rows, _FILES))
    return pa.concat_tables(batches).combine_chunks(), pa.Table.from_pylist(problems, FAILURES)


def _walk(
    folder: Path | str, skip: Path, problems: list[dict[str, str]], above: frozenset[tuple[int, int]]
) -> Iterator[os.DirEntry[str]]:
    """Image files below a folder; links are followed, but not in circles, and ``skip`` is left out."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above or (skip.exists() and os.path.samefile(folder, skip)):
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    yield from _walk(entry.path, skip, problems, above | {here})
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    yield entry
    except OSError as error:
        problems.append(_problem(str(folder), f"cannot be opened ({error.strerror})", "give read permission to it"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _problem(subject: str, reason: str, remedy: str) -> dict[str, str]:
    return {"name": subject, "stage": "scan", "subject": subject, "reason": reason, "remedy": remedy}


def _match(sources: Sources, skip: Path) -> tuple[pa.Table, pa.Table]:
    """One row per name that has all it needs, with the columns ``ROLE_path``, ``_size`` and ``_mtime``."""
    tables: dict[str, pa.Table] = {}
    failures = [FAILURES.empty_table()]
    for role in sources.used():
        folder = sources.folder(role)
        assert folder is not None
        tables[role], problems = _files(folder, skip)
        failures.append(problems)
    tables, ambiguous = _without_ambiguity(tables)
    failures.append(ambiguous)
    joined = _renamed(tables["gan_sr"], "gan_sr").join(
        _renamed(tables["mse_sr"], "mse_sr"), "name", join_type="full outer"
    )
    for role in ("lr", "labels"):
        table = _renamed(tables.get(role, _FILES.empty_table()), role)
        joined = joined.join(table, "name", join_type="left outer")
    required = [("mse_sr", "gan_sr"), ("gan_sr", "mse_sr")]
    if sources.labels is not None:
        required.append(("labels", "gan_sr"))
    for role, twin in required:
        lacking = joined.filter(pc.is_null(joined[f"{role}_path"]))
        failures.append(_missing(lacking, sources, role, twin))
        joined = joined.filter(pc.is_valid(joined[f"{role}_path"]))
    return joined, pa.concat_tables(failures)


def _missing(lacking: pa.Table, sources: Sources, role: str, twin: str) -> pa.Table:
    paths = lacking[f"{twin}_path"].combine_chunks()
    subjects = pc.binary_join_element_wise(f"{sources.folder(twin)}", paths, "/")
    reason = f"has no twin of the same relative path, suffix aside, in {sources.folder(role)}"
    return failure_rows(lacking["name"].combine_chunks(), "scan", subjects, reason, "add the twin, or remove it")


def _renamed(files: pa.Table, role: str) -> pa.Table:
    return files.rename_columns(["name"] + [f"{role}_{column}" for column in files.column_names[1:]])


def _without_ambiguity(tables: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], pa.Table]:
    """Drop names with two candidates, unless all roles hold the same files for it: then the suffix joins the name."""
    doubled = pa.concat_tables([_doubled(table) for table in tables.values()]).column("name").combine_chunks().unique()
    if len(doubled) == 0:
        return tables, FAILURES.empty_table()
    candidates: dict[str, dict[str, list[str]]] = {}
    for role, table in tables.items():
        for row in table.filter(pc.is_in(table["name"], doubled)).to_pylist():
            candidates.setdefault(row["name"], {}).setdefault(role, []).append(row["path"])
    problems, clear = [], set()
    for name, by_role in sorted(candidates.items()):
        if len(by_role) == len(tables) and len({tuple(sorted(paths)) for paths in by_role.values()}) == 1:
            clear.add(name)
            continue
        role, paths = next((role, sorted(paths)) for role, paths in by_role.items() if len(paths) > 1)
        reason = f"has two candidates among the {role} files: {' and '.join(paths[:2])}"
        problems.append(_problem(name, reason, "keep one of them"))
    kept = {}
    for role, table in tables.items():
        rest = table.filter(pc.invert(pc.is_in(table["name"], doubled)))
        suffixed = table.filter(pc.is_in(table["name"], pa.array(sorted(clear), pa.string())))
        suffixed = suffixed.set_column(0, "name", suffixed["path"])
        kept[role] = pa.concat_tables([rest, suffixed])
        for name in _doubled(kept[role]).column("name").to_pylist():
            problems.append(_problem(name, f"is the name of two {role} files' outputs", "rename one of them"))
            kept[role] = kept[role].filter(pc.not_equal(kept[role]["name"], name))
    return kept, pa.Table.from_pylist(problems, FAILURES)


def _doubled(table: pa.Table) -> pa.Table:
    counts = table.group_by("name").aggregate([([], "count_all")])
    return counts.filter(pc.greater(counts["count_all"], 1)).select(["name"])


def _identified(
    found: pa.Table, previous: pa.Table | None, sources: Sources, on_hashed: Callable[[int, int], None] | None
) -> tuple[pa.Table, pa.Table]:
    """Add ``ROLE_hash`` and ``id``, hashing only files that the previous manifest does not hold unchanged."""
    columns = {name: found[name].combine_chunks() for name in found.column_names}
    hashes = {role: _known_hashes(columns, previous, sources, role) for role in ROLES}
    unknown = {role: columns[f"{role}_path"].is_valid().to_numpy(False) for role in sources.used()}
    for role, flags in unknown.items():
        flags &= hashes[role].is_null().to_numpy(False)
    total = sum(int(flags.sum()) for flags in unknown.values())
    done = 0
    failed: list[dict[str, str]] = []
    with ThreadPoolExecutor() as pool:
        for role, flags in unknown.items():
            folder = sources.folder(role)
            assert folder is not None
            rows = np.flatnonzero(flags)
            found_hashes = [pa.array([], pa.string())]
            for start in range(0, rows.size, _HASH_BATCH):
                batch = pa.array(rows[start : start + _HASH_BATCH])
                names = columns["name"].take(batch).to_pylist()
                paths = [folder / path for path in columns[f"{role}_path"].take(batch).to_pylist()]
                results = list(pool.map(_hashed, paths))
                failed += [
                    _problem(result.subject, result.reason, result.remedy) | {"name": name}
                    for name, result in zip(names, results, strict=True)
                    if isinstance(result, ImageError)
                ]
                found_hashes.append(pa.array((r if isinstance(r, str) else None for r in results), pa.string()))
                done += len(batch)
                if on_hashed:
                    on_hashed(done, total)
            hashes[role] = pc.replace_with_mask(hashes[role], pa.array(flags), pa.concat_arrays(found_hashes))
    table = found
    for role in ROLES:
        table = table.append_column(f"{role}_hash", hashes[role])
    problems = pa.Table.from_pylist(failed, FAILURES)
    table = table.filter(pc.invert(pc.is_in(table["name"], problems["name"].combine_chunks())))
    ids = [pa.array([], pa.string())]
    for rows in table.select(["mse_sr_hash", "gan_sr_hash"]).to_batches(max_chunksize=_BATCH):
        pairs = zip(rows[0].to_pylist(), rows[1].to_pylist(), strict=True)
        ids.append(pa.array((digest(f"{mse_sr} {gan_sr}".encode()) for mse_sr, gan_sr in pairs), pa.string()))
    return table.append_column("id", pa.concat_arrays(ids)), problems


def _told_apart_by_labels(current: pa.Table) -> pa.Table:
    """Give names of equal images but other labels than the first of them an id of their own: their masks differ."""
    kinds = current.group_by("id").aggregate([("labels_hash", "count_distinct")])
    shared = kinds.filter(pc.greater(kinds["labels_hash_count_distinct"], 1))["id"].to_pylist()
    ids = current["id"].combine_chunks()
    for image_id in shared:
        same = pc.equal(ids, image_id)
        labels = current["labels_hash"].filter(same).to_pylist()
        told_apart = [image_id if label == labels[0] else digest(f"{image_id} {label}".encode()) for label in labels]
        ids = pc.replace_with_mask(ids, same, pa.array(told_apart, pa.string()))
    return current.set_column(current.schema.get_field_index("id"), "id", ids)


def _known_hashes(columns: dict[str, pa.Array], previous: pa.Table | None, sources: Sources, role: str) -> pa.Array:
    """Hashes of the files whose folder, path, size and time are as before; null for the others."""
    names = columns["name"]
    folder = sources.folder(role)
    if previous is None or folder is None or _stored_roots(previous).get(role) != str(folder).encode():
        return pa.nulls(len(names), pa.string())
    rows = pc.index_in(names, previous["name"].combine_chunks())
    same = rows.is_valid()
    for field in ("path", "size", "mtime"):
        before = previous[f"{role}_{field}"].combine_chunks().take(rows)
        same = pc.and_(same, pc.fill_null(pc.equal(columns[f"{role}_{field}"], before), False))
    known = previous[f"{role}_hash"].combine_chunks().take(rows)
    return pc.if_else(same, known, pa.scalar(None, pa.string()))


def _hashed(path: Path) -> str | ImageError:
    hasher = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                hasher.update(chunk)
    except OSError:
        try:
            return digest(read_bytes(path))
        except ImageError as error:
            return error
    return hasher.hexdigest()


def _with_shards(
    current: pa.Table, previous: pa.Table | None, seen: pa.ChunkedArray, shard_size: int
) -> tuple[pa.Table, int, list[str]]:
    """The new manifest: current rows with their shards, then what is known but not current, sorted by name."""
    ids = current["id"].combine_chunks()
    names = current["name"].combine_chunks()
    known = MANIFEST.empty_table() if previous is None else previous
    rows = pc.index_in(ids, known["id"].combine_chunks())
    shards = known["shard"].combine_chunks().take(rows)
    fresh = ids.filter(shards.is_null()).unique()
    first = (pc.max(known["shard"]).as_py() + 1) if known.num_rows else 0
    fresh_shards = pa.array(first + np.arange(len(fresh)) // shard_size, pa.int32())
    shards = pc.coalesce(shards, fresh_shards.take(pc.index_in(ids, fresh)))
    columns = {"shard": shards, "present": pa.array(np.ones(len(ids), bool))}
    table = pa.table([columns.get(field) if field in columns else current[field] for field in MANIFEST.names],
                     schema=MANIFEST)  # fmt: skip
    before = known["id"].combine_chunks().take(pc.index_in(names, known["name"].combine_chunks()))
    replaced = names.filter(pc.fill_null(pc.not_equal(before, ids), False)).to_pylist()
    other = known.filter(pc.invert(pc.is_in(known["name"], names)))
    still_there = pc.is_in(other["name"], seen.combine_chunks())
    other = other.set_column(other.schema.get_field_index("present"), "present", pc.and_(other["present"], still_there))
    merged = pa.concat_tables([table.cast(MANIFEST), other.cast(MANIFEST)]).sort_by("name").combine_chunks()
    return merged, len(fresh), replaced
