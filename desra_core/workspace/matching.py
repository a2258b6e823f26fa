"""Match the files of some folders: twins have the same relative path, suffix aside."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from desra_core.errors import DesraError, Failure, ImageError, UsageError
from desra_core.files import takes_name
from desra_core.images.scanning import (
    FILES,
    Globs,
    MembersOf,
    image_files,
    is_selection,
    is_single,
    members_of_tar,
    no_images,
    paths_of,
    root_of,
)
from desra_core.workspace import Workspace

ROLES = ("mse_sr", "gan_sr", "lr", "labels")
FAILURES = pa.schema([(field, pa.string()) for field in ("name", "stage", *Failure._fields)])

_NO_TWIN = "has no twin"
# Bytes of a name and of a path: shorter ones fit on every disk, so the disk is asked only about longer ones.
_SURELY_SHORT, _SURELY_SHORT_PATH = 100, 1000


@dataclass(frozen=True)
class Sources:
    """Where the files of a corpus are: pairs of results, or low-resolution photos.

    Each place is a folder, a single file, or a glob, of files or tar files, here or at a URL. Files belong together
    when their paths below the folders agree without suffix. Files that match ``exclude`` are left out, with ``include``
    also those that match none of it, see `image_files`.
    """

    mse_sr: Path | None = None
    gan_sr: Path | None = None
    lr: Path | None = None
    labels: Path | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, ...]:
        """The roles by whose content an image is identified; each image has them all."""
        return ("mse_sr", "gan_sr") if self.gan_sr is not None else ("lr",)

    @property
    def places(self) -> dict[str, Path]:
        """The folders, files or globs that were given, by role."""
        return {role: place for role in ROLES if (place := getattr(self, role)) is not None}

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of these places, by role."""
        return {role: root_of(place) for role, place in self.places.items()}

    @property
    def main(self) -> Path:
        """The folder by whose files the images are named."""
        return self.folders[self.identity[-1]]

    @property
    def selects(self) -> bool:
        """Whether only some files of the main folder are asked for."""
        return bool(self.exclude or self.include) or is_selection(self.places[self.identity[-1]])

    def globs(self) -> Globs:
        """Make ``exclude`` and ``include`` relative to the folders, also those given as absolute or ``./`` paths."""
        folders = [str(folder.absolute()).rstrip("/") + "/" for folder in self.folders.values()]

        def below(pattern: str) -> str:
            if not pattern.startswith(("/", "./", "../")) and "://" not in pattern:
                return pattern
            path = pattern if "://" in pattern else os.path.abspath(pattern)
            relative = (f"/{path[len(folder) :]}" for folder in folders if path.startswith(folder))
            return next(relative, pattern.removeprefix("./"))

        return {"exclude": list(map(below, self.exclude)), "include": list(map(below, self.include))}


def match(
    sources: Sources, skip: Path, members_of: MembersOf = members_of_tar
) -> tuple[pa.Table, pa.Table, Counter[str]]:
    """Match the files of some folders.

    Where a place is a file or a glob, the run asks only for its files: a file of another folder that has no twin among
    them is no failure. Two single files are twins under any names.

    Args:
        sources: The folders.
        skip: The workspace, which is left out where it lies inside a folder.
        members_of: As for `image_files`.

    Returns:
        - The images: one row per name whose files are all there, with the columns ``ROLE_path``, ``ROLE_size``,
          ``ROLE_mtime`` and ``ROLE_offset`` of `FILES`. A name is a relative path without its suffix, or with it where
          two images would otherwise have the same name.
        - The files that belong to no image (schema `FAILURES`).
        - Counts of other files, as in `desra_core.images.scanning.Found`.

    Raises:
        UsageError: A folder does not exist, lies inside ``skip``, holds no images, or has no file in common with
            another one.
    """
    for folder in sources.folders.values():
        if folder.resolve().is_relative_to(skip.resolve()):
            raise UsageError(folder, "lies inside the workspace", "name a folder outside of it")
    remedy = "name a folder with PNG, JPEG, WebP, AVIF, TIFF or BMP files"
    tables, problems, passed_over = _listed(sources.places, skip, remedy, sources.globs(), members_of)
    unfit = _unfit(pa.concat_tables([table.select(["name"]) for table in tables.values()])["name"].unique(), skip)
    names = pa.array((error.subject for error in unfit), pa.string())
    tables = {role: table.filter(pc.invert(pc.is_in(table["name"], names))) for role, table in tables.items()}
    main = sources.identity[-1]
    for role, table in tables.items():
        # Twins get the name of the file in the main folder: spellings may differ, and single files have other names.
        single = all(is_single(sources.places[each]) for each in (role, main)) and len(table) == len(tables[main]) == 1
        names = tables[main]["name"]
        tables[role] = table.set_column(0, "name", names if single else spelled_like(table["name"], names))
    joined, lacking = _joined(tables, sources)
    return joined, pa.concat_tables([failure_rows(problems + unfit), *lacking]), passed_over


def _listed(
    places: Mapping[str, Path],
    skip: Path | None,
    empty: str | None,
    globs: Globs | None = None,
    members_of: MembersOf = members_of_tar,
) -> tuple[dict[str, pa.Table], list[ImageError], Counter[str]]:
    """List the image files with clear names by role, the problems of the rest, and the counts of other files.

    ``empty`` is the remedy, with the role as ``{role}``, of the `UsageError` for a place without images; None where a
    place may be empty.
    """
    tables: dict[str, pa.Table] = {}
    problems: list[ImageError] = []
    passed_over: Counter[str] = Counter()
    for role, place in places.items():
        tables[role], own, others = image_files(
            place, skip, **globs or Globs(exclude=(), include=()), members_of=members_of
        )
        if empty is not None and not tables[role].num_rows and not own:
            raise no_images(place, empty.format(role=role), others)
        problems += own
        passed_over.update(others)
    tables, unclear = _with_clear_names(tables)
    return tables, problems + unclear, passed_over


def _joined(tables: dict[str, pa.Table], sources: Sources) -> tuple[pa.Table, list[pa.Table]]:
    """Join the files of all roles by name: one row per image whose files are all there.

    Also returns tables of the schema `FAILURES` with the files that lack a twin. Raises `UsageError` where two folders
    have no name in common.
    """
    *others, main = sources.identity
    # Roles for which a file or a glob was given: their folders may hold more images than were asked for.
    selective = {role for role, place in sources.places.items() if is_selection(place)}
    by_role = {
        role: table.rename_columns(["name", *(f"{role}_{column}" for column in table.column_names[1:])])
        for role, table in ({role: FILES.empty_table() for role in ROLES} | tables).items()
    }
    joined = by_role.pop(main)
    for role, files in by_role.items():
        here, there = joined["name"], files["name"]
        if len(here) and len(there) and not pc.any(pc.is_in(there, here.combine_chunks())).as_py():
            names = f"the first are {pc.min(there)} here, {pc.min(here)} there"
            reason = f"has no file of the same relative path, suffix aside, as any in {sources.main} ({names})"
            raise UsageError(sources.folders[role], reason, "name folders of the same images")
        # A full join keeps files without a twin in the main folder as failures, unless its place is a selection.
        join = "full outer" if role in others and main not in selective else "left outer"
        joined = joined.join(files, "name", join_type=join)
    # Pairs of a role that each image needs, and the role whose file is named where the image lacks it.
    required = list(permutations(sources.identity, 2))
    if sources.labels is not None:
        required.append(("labels", main))
    failures = []
    for role, twin in required:
        lacking = joined.filter(pc.is_null(joined[f"{role}_path"]))
        joined = joined.filter(pc.is_valid(joined[f"{role}_path"]))
        if role in selective and twin not in selective:  # this image was not asked for
            continue
        subjects = pc.binary_join_element_wise(
            f"{sources.folders[twin]}", lacking[f"{twin}_path"].combine_chunks(), "/"
        )
        reason = f"{_NO_TWIN} of the same relative path, suffix aside, in {sources.places[role]}"
        texts = ("scan", reason, "add the twin, or remove it")
        stage, reasons, remedies = (pa.array([text] * len(subjects), pa.string()) for text in texts)
        columns = [lacking["name"].combine_chunks(), stage, subjects, reasons, remedies]
        failures.append(pa.table(columns, schema=FAILURES))
    return joined, failures


def spelled_like(names: pa.ChunkedArray, known: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace names by the known names that look the same.

    A Mac writes an umlaut as a letter and a mark (NFD), other systems write one character (NFC). A name stays if it is
    known itself, and also if the known name that looks the same is among ``names``.
    """
    unknown = pc.invert(pc.is_in(names, known.combine_chunks()))
    if not pc.any(unknown).as_py():
        return names
    index = pc.index_in(pc.utf8_normalize(names, "NFC"), pc.utf8_normalize(known, "NFC").combine_chunks())
    lookalikes = known.combine_chunks().take(index.combine_chunks())
    free = pc.and_(pc.is_valid(lookalikes), pc.invert(pc.is_in(lookalikes, names.combine_chunks())))
    return pc.if_else(pc.and_(unknown, free), lookalikes, names)


def scan_failure(subject: str, reason: str, remedy: str) -> dict[str, str]:
    """Return a row of the schema `FAILURES` whose name is its subject."""
    return {"name": subject, "stage": "scan", "subject": subject, "reason": reason, "remedy": remedy}


def failure_rows(errors: Sequence[DesraError]) -> pa.Table:
    """Return errors as rows of the schema `FAILURES`."""
    return pa.Table.from_pylist([scan_failure(*error.failure) for error in errors], FAILURES)


def with_twins_summed_up(failures: pa.Table) -> pa.Table:
    """Sum up failures (schema `FAILURES`): keep the first row of all files that lack a twin in the same folder."""
    lacking = pc.starts_with(failures["reason"], _NO_TWIN)
    rows = failures.filter(lacking)
    summed_up = []
    for reason in rows["reason"].unique().to_pylist():
        alike = rows.filter(pc.equal(rows["reason"], reason))
        first = alike.slice(0, 1).to_pylist()[0]
        more = f" and {alike.num_rows - 1:,} more" if alike.num_rows > 1 else ""
        summed_up.append(first | {"subject": first["subject"] + more})
    return pa.concat_tables([pa.Table.from_pylist(summed_up, FAILURES), failures.filter(pc.invert(lacking))])


def files_by_name(
    folders: Mapping[str, Path], main: str, *, skip: Path | None = None, empty: str | None = None
) -> tuple[dict[str, dict[str, Path]], list[ImageError]]:
    """Find the image files of some folders, by role and name; names are spelled as in the folder of the ``main`` role.

    Args:
        folders: By role.
        main: One of the roles.
        skip: A folder to leave out.
        empty: The remedy of an error where a folder holds no images, with the role as ``{role}``; None where a folder
            may be empty.

    Returns:
        The files, and an error for each that cannot be read and each name that several files share.

    Raises:
        UsageError: A folder does not exist, or is empty and may not be.
    """
    tables, problems, _ = _listed(folders, skip, empty)
    files = {}
    for role, table in tables.items():
        names = spelled_like(table["name"], tables[main]["name"]).to_pylist()
        files[role] = dict(zip(names, paths_of(folders[role], table), strict=True))
    return files, problems


def _with_clear_names(tables: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], list[ImageError]]:
    """Drop files that share a name, such as ``a.jpg`` and ``a.png``, because it is unclear which twins they have.

    Where each role has the same of these files, they stay, and get their suffix as part of the name. Takes tables of
    `image_files` by role; returns them, and an error for each name that was dropped.
    """
    doubled = pa.chunked_array([_doubled(table) for table in tables.values()], pa.string()).unique()
    if len(doubled) == 0:
        return tables, []
    candidates: dict[str, dict[str, list[str]]] = {}
    for role, table in tables.items():
        for row in table.filter(pc.is_in(table["name"], doubled)).sort_by("path").to_pylist():
            candidates.setdefault(row["name"], {each: [] for each in tables})[role].append(row["path"])
    problems, clear = [], []
    for name, by_role in sorted(candidates.items()):
        if all(paths == next(iter(by_role.values())) for paths in by_role.values()):
            clear.append(name)
            continue
        role, paths = next((role, paths) for role, paths in by_role.items() if len(paths) > 1)
        reason = f"has two candidates among the {role} files: {' and '.join(paths[:2])}"
        problems.append(ImageError(name, reason, "keep one of them"))
    kept = {}
    for role, table in tables.items():
        single = table.filter(pc.invert(pc.is_in(table["name"], doubled)))
        suffixed = table.filter(pc.is_in(table["name"], pa.array(clear, pa.string())))
        kept[role] = pa.concat_tables([single, suffixed.set_column(0, "name", suffixed["path"])])
        again = _doubled(kept[role])
        reason = f"would name the outputs of two {role} files"
        problems += [ImageError(name, reason, "rename one of them") for name in again.to_pylist()]
        kept[role] = kept[role].filter(pc.invert(pc.is_in(kept[role]["name"], again)))
    return kept, problems


def _unfit(names: pa.Array, root: Path) -> list[ImageError]:
    """Find names whose files, such as the mask NAME.png, cannot be written to the workspace in the folder ``root``."""
    with_folder = names.filter(pc.match_substring(names, ".png/")).to_pylist()
    parents = {parent for name in with_folder for parent in PurePosixPath(name).parents if parent.suffix == ".png"}
    folders = pa.array({str(parent)[: -len(".png")] for parent in parents}, pa.string())
    clashing = names.filter(pc.is_in(names, folders)).to_pylist()
    long_part = pc.match_substring_regex(names.cast(pa.binary()), f"[^/]{{{_SURELY_SHORT + 1}}}")
    suspects = names.filter(pc.or_(long_part, pc.greater(pc.binary_length(names), _SURELY_SHORT_PATH))).to_pylist()
    overlong = [name for name in suspects if not takes_name(Workspace(root).dataset("pseudo_gt", name))]
    folder = "needs the mask {}.png, but a folder has that name"
    return [
        *(ImageError(name, folder.format(name), "rename one of them") for name in sorted(clashing)),
        *(ImageError(name, "has too long a name for its mask, NAME.png", "shorten it") for name in sorted(overlong)),
    ]


def _doubled(table: pa.Table) -> pa.Array:
    """List the names that several rows of a table have."""
    counts = pc.value_counts(table["name"])
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))
