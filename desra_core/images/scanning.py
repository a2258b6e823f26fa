"""The image files below a folder, and what else is there."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from desra_core.errors import ImageError, UsageError, printable
from desra_core.images.codec import SUFFIXES

# What machines put beside photos: thumbnails, deleted files, the other half of a Mac's files. In lower case; folders
# whose names begin with a dot are left out anyway.
LEFT_OUT = frozenset(
    {
        "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "__macosx",
        "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found",
    }
)  # fmt: skip

_BATCH = 65_536
# Kinds of files that are told apart where other files are counted.
_KINDS = 12
_NO_SUFFIX, _OTHERS, _EXCLUDED = "without a suffix", "of other kinds", "excluded by --exclude"
FILES = pa.schema([("name", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])


class Found(NamedTuple):
    """The image files of a place.

    ``files`` has a row per file with ``name`` (the relative path without suffix), ``path`` (relative), ``size`` (bytes)
    and ``mtime`` (ns); ``problems`` are those that could not be looked at; ``passed_over`` counts files of other kinds
    and what was left out, by what `told_passed_over` says of them; what each glob of ``exclude`` left out, also if that
    is nothing.
    """

    files: pa.Table
    problems: list[ImageError]
    passed_over: Counter[str]


def image_files(place: Path, skip: Path | None = None, exclude: Sequence[str] = ()) -> Found:
    """All image files below a folder, but for hidden ones, those in ``skip``, in workspaces and in `LEFT_OUT` folders.

    Parameters
    ----------
    place
        The folder; or a single file, or a glob, whose folder is `root_of`.
    skip
        A folder to leave out.
    exclude
        Globs of what else to leave out, files and folders: of their names, or with a slash of their relative paths.

    Raises
    ------
    UsageError
        The folder or file does not exist, or nothing matches the glob.
    """
    root = root_of(place)
    if root == place and not place.is_dir():
        raise UsageError(place, "is no folder", "name a folder of images")
    if not str(place).isprintable():
        raise UsageError(ascii(str(place)), "has a name that is not printable UTF-8", "rename the folder")
    globs = _exclusion(exclude)
    search = _Search(root, skip, globs, Counter(dict.fromkeys(globs, 0)))
    paths = search.walk(root) if place == root else search.chosen(place)
    batches, rows = [FILES.empty_table()], []
    for path in paths:
        relative = search.relative(path)
        try:
            relative.encode()
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                search.problems.append(ImageError(path, "is no file", "remove it"))
                continue
        except UnicodeEncodeError:
            search.problems.append(ImageError(ascii(relative), "has a name that is not UTF-8", "rename it"))
            continue
        except OSError as error:
            reason = f"cannot be looked at ({error.strerror})"
            search.problems.append(ImageError(path, reason, "mend or remove it"))
            continue
        name = relative[: relative.rindex(".")]
        rows.append({"name": name, "path": relative, "size": status.st_size, "mtime": status.st_mtime_ns})
        if len(rows) == _BATCH:
            batches.append(pa.Table.from_pylist(rows, FILES))
            rows.clear()
    batches.append(pa.Table.from_pylist(rows, FILES))
    files = pa.concat_tables(batches).combine_chunks()
    return Found(files, search.problems, Counter(dict(_fewer_kinds(search.passed_over)) | search.excluded))


@dataclass
class _Search:
    """A look for image files below a folder, with what it could not look at and what it has passed over."""

    root: Path
    skip: Path | None
    globs: dict[str, Callable[[str], bool]]
    excluded: Counter[str]
    problems: list[ImageError] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def relative(self, path: str) -> str:
        """The path below the root."""
        return path[len(os.path.join(self.root, "")) :]

    def chosen(self, place: Path) -> Iterator[str]:
        """A single file, or the images that a glob matches and those in folders that it matches.

        Raises
        ------
        UsageError
            It is a file of another kind, or nothing matches.
        """
        if place.exists():
            if place.suffix.lower() not in SUFFIXES:
                raise UsageError(place, "is no image", "name a PNG, JPEG, WebP, TIFF or BMP file, or a folder of them")
            yield str(place)
            return
        matches = sorted(glob.iglob(str(place), recursive=True))
        if not matches:
            reason = "matches no file" if _is_glob(place) else "does not exist"
            bracket = ", and write [[] for a [ in a name" if "[" in str(place) else ""
            raise UsageError(place, reason, f"see that its folder is there{bracket}")

        @cache
        def above(folder: str) -> frozenset[tuple[int, int]] | None:
            if not folder:
                return self._within(self.root, frozenset())
            over = above(os.path.dirname(folder))
            if over is None or self._left_out(folder):
                return None
            return self._within(self.root / folder, over)

        walked: set[str] = set()
        for path in matches:
            relative = self.relative(path).rstrip("/")
            folders = [relative[: found.start()] for found in re.finditer("/", relative)]
            if walked.intersection(["", *folders]):
                continue
            if is_folder := os.path.isdir(path):
                walked.add(relative)
            over = above(os.path.dirname(relative)) if relative else frozenset()
            if over is not None:
                yield from self._entry(path, is_folder, over)

    def walk(self, folder: Path | str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
        """Image files below a folder, following links, but not in circles; not those in other workspaces."""
        try:
            within = self._within(folder, above)
            if within is None:
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        yield from self._entry(entry.path, _is_folder(entry), within)
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
            self.problems.append(ImageError(str(folder), reason, "give read permission to it"))

    def _within(self, folder: Path | str, above: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]] | None:
        """The folders above and this one; None where it is one of them, or a workspace."""
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        skipped = self.skip is not None and self.skip.exists() and os.path.samefile(folder, self.skip)
        return None if here in above or skipped or _is_workspace(folder) else above | {here}

    def _entry(self, path: str, is_folder: bool, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        if self._left_out(self.relative(path), is_folder=is_folder):
            return
        if is_folder:
            yield from self.walk(path, above)
        elif (suffix := os.path.splitext(path)[1].lower()) in SUFFIXES:
            yield path
        else:
            self.passed_over[suffix or _NO_SUFFIX] += 1

    def _left_out(self, relative: str, *, is_folder: bool = True) -> bool:
        """Whether a folder or file is left out, which is counted then."""
        name = os.path.basename(relative)
        if is_folder and name.lower() in LEFT_OUT:
            self.passed_over[f"{name}/"] += 1
            return True
        excluding = [kind for kind, matches in self.globs.items() if matches(normalized(relative))]
        self.excluded.update(excluding)
        return bool(excluding)


def _is_workspace(folder: Path | str) -> bool:
    """Whether another workspace lies there, whose pictures are no photos."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("lock", "settings.json", "manifest.parquet"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def root_of(place: Path) -> Path:
    """The folder below which the files of a place lie, which their names are relative to."""
    if place.is_dir():
        return place
    if _is_glob(place):
        parts = place.parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        return Path(*parts[:fixed])
    return place.parent if place.is_file() or place.suffix.lower() in SUFFIXES else place


def _is_glob(place: Path) -> bool:
    return glob.has_magic(str(place)) and not place.exists()


def is_selection(place: Path) -> bool:
    """Whether only some files of a folder are asked for."""
    return place.is_file() or _is_glob(place)


def no_images(place: Path, remedy: str, passed_over: Mapping[str, int]) -> UsageError:
    """The error of a place without an image, which tells what there is instead."""
    told = told_passed_over(passed_over)
    return UsageError(place, "holds no images" + (f", but {told}" if told else ""), remedy)


def told_passed_over(passed_over: Mapping[str, int]) -> str | None:
    """What was passed over, for people; None where nothing was.

    Examples
    --------
    >>> told_passed_over({".txt": 1, ".heic": 3, "@eaDir/": 2})
    '3 .heic, 2 @eaDir/, 1 .txt'
    """
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{f'{count:,}' if count else 'nothing'} {printable(kind)}" for kind, count in kinds) or None


def _exclusion(globs: Sequence[str]) -> dict[str, Callable[[str], bool]]:
    """Whether a relative path (NFC) matches a glob, by what is told of that; ``*`` matches slashes too."""

    def matcher(one: str) -> Callable[[str], bool]:
        pattern = re.compile(fnmatch.translate(normalized(one))).match
        if "/" in one:
            return lambda path: bool(pattern(path) or pattern(f"/{path}"))
        return lambda path: bool(pattern(os.path.basename(path)))

    return {f"{_EXCLUDED} {one}": matcher(one.rstrip("/")) for one in globs}


def normalized(text: str) -> str:
    """The form (NFC) in which equal text is equal: a Mac writes an umlaut as a letter and a mark (NFD)."""
    return unicodedata.normalize("NFC", text)


def _fewer_kinds(counts: Counter[str]) -> Counter[str]:
    """The counts of the most frequent kinds, the others taken together."""
    most = counts.most_common(_KINDS)
    rest = counts.total() - sum(count for _, count in most)
    return Counter(dict(most) | ({_OTHERS: rest} if rest else {}))
