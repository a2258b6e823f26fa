"""Which files of some folders belong together: scan them, match twins by their relative path."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import UsageError
from desra_core.imageio import SUFFIXES

ROLES = ("mse_sr", "gan_sr", "lr", "labels")
FAILURES = pa.schema([(field, pa.string()) for field in ("name", "stage", "subject", "reason", "remedy")])

_BATCH = 65_536
_FILES = pa.schema([("name", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])


@dataclass(frozen=True)
class Sources:
    """The folders of a corpus: pairs of results, or low-resolution photos.

    Files belong together when their paths below the folders agree without suffix.
    """

    mse_sr: Path | None = None
    gan_sr: Path | None = None
    lr: Path | None = None
    labels: Path | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """The roles whose content makes an image what it is; each image has them all."""
        return ("mse_sr", "gan_sr") if self.gan_sr is not None else ("lr",)

    @property
    def main(self) -> Path:
        """The folder whose files give the images their names."""
        folder = self.folder(self.identity[-1])
        assert folder is not None
        return folder

    def folder(self, role: str) -> Path | None:
        """The folder of a role, if there is one."""
        folder: Path | None = getattr(self, role)
        return folder

    def used(self) -> list[str]:
        """The roles that have a folder."""
        return [role for role in ROLES if self.folder(role) is not None]


def normalized(name: str) -> str:
    """Compose the letters of a name (Unicode NFC): one system writes an accent as a character of its own, another not.

    Examples
    --------
    >>> normalized("Ko\u0308ln") == "Köln"
    True
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def match(sources: Sources, skip: Path) -> tuple[pa.Table, pa.Table]:
    """Match the files of some folders.

    Parameters
    ----------
    sources
        The folders.
    skip
        A folder to leave out, should it lie inside one of them.

    Returns
    -------
    One row per name that has all it needs, with the columns ``ROLE_path``, ``ROLE_size`` (bytes) and ``ROLE_mtime``
    (ns), and the files that belong to none (schema `FAILURES`). A name is a relative path without its suffix, or
    with it where two images would else share it.

    Raises
    ------
    UsageError
        A folder does not exist, or lies inside ``skip``.
    """
    tables: dict[str, pa.Table] = {}
    failures = [FAILURES.empty_table()]
    for role in sources.used():
        folder = sources.folder(role)
        assert folder is not None
        if folder.resolve().is_relative_to(skip.resolve()):
            raise UsageError(folder, "lies inside the workspace", "name a folder outside of it")
        tables[role], problems = image_files(folder, skip)
        failures.append(problems)
    tables, ambiguous = without_ambiguity(tables)
    failures.append(ambiguous)
    tables, clashing = _without_clashes(tables)
    failures.append(clashing)
    *others, main = sources.identity
    joined = _renamed(tables[main], main)
    for role in (*others, *(role for role in ROLES if role not in sources.identity)):
        table = _renamed(tables.get(role, _FILES.empty_table()), role)
        joined = joined.join(table, "name", join_type="full outer" if role in others else "left outer")
    required = list(permutations(sources.identity, 2))
    if sources.labels is not None:
        required.append(("labels", main))
    for role, twin in required:
        lacking = joined.filter(pc.is_null(joined[f"{role}_path"]))
        failures.append(_missing(lacking, sources, role, twin))
        joined = joined.filter(pc.is_valid(joined[f"{role}_path"]))
    return joined, pa.concat_tables(failures)


def scan_failure(subject: str, reason: str, remedy: str) -> dict[str, str]:
    """A row of the schema `FAILURES` about something that is named by itself."""
    return {"name": subject, "stage": "scan", "subject": subject, "reason": reason, "remedy": remedy}


def _failure_rows(names: pa.Array, stage: str, subjects: pa.Array, reason: str, remedy: str) -> pa.Table:
    """Rows of the schema `FAILURES` that share a reason."""
    constant = [pa.array([text] * len(names), pa.string()) for text in (stage, reason, remedy)]
    return pa.table([names, constant[0], subjects, *constant[1:]], schema=FAILURES)


def image_files(folder: Path, skip: Path | None = None) -> tuple[pa.Table, pa.Table]:
    """All image files below a folder, but for those in ``skip`` and in workspaces.

    Returns
    -------
    A row per file with ``name`` (the relative path without suffix), ``path`` (relative), ``size`` (bytes) and ``mtime``
    (ns), and what could not be looked at (schema `FAILURES`).

    Raises
    ------
    UsageError
        The folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(folder, "is no folder", "name a folder of images")
    if not str(folder).isprintable():
        raise UsageError(ascii(str(folder)), "has a name that is not printable UTF-8", "rename the folder")
    problems: list[dict[str, str]] = []
    above_length = len(os.path.join(folder, ""))
    batches, rows = [_FILES.empty_table()], []
    for entry in _walk(folder, skip, problems, frozenset()):
        relative = entry.path[above_length:]
        try:
            relative.encode()
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode):
                problems.append(scan_failure(entry.path, "is no file", "remove it"))
                continue
        except UnicodeEncodeError:
            problems.append(scan_failure(ascii(relative), "has a name that is not UTF-8", "rename it"))
            continue
        except OSError as error:
            problems.append(scan_failure(entry.path, f"cannot be looked at ({error.strerror})", "mend or remove it"))
            continue
        name = relative[: relative.rindex(".")]
        rows.append({"name": name, "path": relative, "size": status.st_size, "mtime": status.st_mtime_ns})
        if len(rows) == _BATCH:
            batches.append(pa.Table.from_pylist(rows, _FILES))
            rows.clear()
    batches.append(pa.Table.from_pylist(rows, _FILES))
    return pa.concat_tables(batches).combine_chunks(), pa.Table.from_pylist(problems, FAILURES)


def _walk(
    folder: Path | str, skip: Path | None, problems: list[dict[str, str]], above: frozenset[tuple[int, int]]
) -> Iterator[os.DirEntry[str]]:
    """Image files below a folder, following links, but not in circles; not those in ``skip`` and other workspaces."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        skipped = skip is not None and skip.exists() and os.path.samefile(folder, skip)
        if here in above or skipped or _is_workspace(folder):
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
        problems.append(scan_failure(str(folder), f"cannot be opened ({error.strerror})", "give read permission to it"))


def _is_workspace(folder: Path | str) -> bool:
    """Whether another workspace lies there, whose pictures are no photos."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("lock", "settings.json", "manifest.parquet"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _missing(lacking: pa.Table, sources: Sources, role: str, twin: str) -> pa.Table:
    paths = lacking[f"{twin}_path"].combine_chunks()
    subjects = pc.binary_join_element_wise(f"{sources.folder(twin)}", paths, "/")
    reason = f"has no twin of the same relative path, suffix aside, in {sources.folder(role)}"
    return _failure_rows(lacking["name"].combine_chunks(), "scan", subjects, reason, "add the twin, or remove it")


def _renamed(files: pa.Table, role: str) -> pa.Table:
    return files.rename_columns(["name"] + [f"{role}_{column}" for column in files.column_names[1:]])


def without_ambiguity(tables: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], pa.Table]:
    """Drop names with two candidates, unless all roles hold the same files for it: then the suffix joins the name.

    Takes tables of `image_files` by role; returns them, and rows of the schema `FAILURES` about what was dropped.
    """
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
        problems.append(scan_failure(name, reason, "keep one of them"))
    kept = {}
    for role, table in tables.items():
        rest = table.filter(pc.invert(pc.is_in(table["name"], doubled)))
        suffixed = table.filter(pc.is_in(table["name"], pa.array(sorted(clear), pa.string())))
        suffixed = suffixed.set_column(0, "name", suffixed["path"])
        kept[role] = pa.concat_tables([rest, suffixed])
        for name in _doubled(kept[role]).column("name").to_pylist():
            problems.append(scan_failure(name, f"is the name of two {role} files' outputs", "rename one of them"))
            kept[role] = kept[role].filter(pc.not_equal(kept[role]["name"], name))
    return kept, pa.Table.from_pylist(problems, FAILURES)


def _without_clashes(tables: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], pa.Table]:
    """Drop names whose mask would lie where the masks of a folder go: ``x.jpg`` beside ``x.png/``."""
    folders: set[str] = set()
    for table in tables.values():
        for name in table["name"].filter(pc.match_substring(table["name"], ".png/")).to_pylist():
            folders.update(
                str(folder)[: -len(".png")] for folder in PurePosixPath(name).parents if folder.suffix == ".png"
            )
    taken = pa.array(sorted(folders), pa.string())
    clashing = pa.concat_tables([table.filter(pc.is_in(table["name"], taken)) for table in tables.values()])
    problems = [
        scan_failure(name, f"has the mask {name}.png, but so is a folder called", "rename one of them")
        for name in sorted(set(clashing["name"].to_pylist()))
    ]
    kept = {role: table.filter(pc.invert(pc.is_in(table["name"], taken))) for role, table in tables.items()}
    return kept, pa.Table.from_pylist(problems, FAILURES)


def _doubled(table: pa.Table) -> pa.Table:
    counts = table.group_by("name").aggregate([([], "count_all")])
    return counts.filter(pc.greater(counts["count_all"], 1)).select(["name"])
