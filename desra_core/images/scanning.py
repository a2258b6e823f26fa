"""The image files below a folder, and the images that a path of another tool may mean."""

import fnmatch
import glob
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from desra_core.errors import ImageError, UsageError, printable
from desra_core.images.codec import SUFFIXES
from desra_core.images.further_decoders import missing_for

# Folders that machines put beside photos, in lower case: thumbnails, deleted files, a Mac's metadata. Folders whose
# names begin with a dot are left out anyway.
LEFT_OUT = frozenset(
    {
        "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "__macosx",
        "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found",
    }
)  # fmt: skip

# The prefix that Label Studio gives to the names of files.
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")
_BATCH = 65_536
_KINDS = 12  # the number of kinds of other files that have counts of their own
_WORKSPACE = ("lock", "settings.json", "manifest.parquet")  # a folder with these files is a workspace, without photos
_NO_SUFFIX, _OTHERS, _EXCLUDED = "without a suffix", "of other kinds", "excluded by --exclude"
FILES = pa.schema([("name", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])


class Found(NamedTuple):
    """The image files of a place."""

    # A row per file: ``name`` (the relative path without suffix), ``path`` (relative), ``size`` (bytes) and ``mtime``
    # (ns).
    files: pa.Table
    problems: list[ImageError]  # files and folders that cannot be read
    # The number of other files by kind, and of the files and folders that each glob of ``exclude`` leaves out, even 0.
    passed_over: Counter[str]


def image_files(place: Path, skip: Path | None = None, exclude: Sequence[str] = ()) -> Found:
    """List the image files below a folder, without hidden files, ``skip``, workspaces and `LEFT_OUT` folders.

    Args:
        place: A folder, a file or a glob; names and paths are relative to its `root_of`.
        skip: A folder to leave out.
        exclude: Globs of files and folders to leave out, matched to names or, with a slash, to relative paths.

    Raises:
        UsageError: The folder or file does not exist, or nothing matches the glob.
    """
    root = root_of(place)
    if root == place and not place.is_dir():
        raise UsageError(place, "is no folder", "name a folder of images")
    if not str(place).isprintable():
        raise UsageError(ascii(str(place)), "has a name that is not printable UTF-8", "rename the folder")
    globs = _exclusion(exclude)
    search = _Search(root, skip, globs, Counter(dict.fromkeys(globs, 0)))
    batches: list[pa.RecordBatch] = []
    columns: tuple[list[Any], ...] = tuple([] for _ in FILES)
    for path in search.walk(root) if place == root else search.chosen(place):
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
        row = relative[: relative.rindex(".")], relative, status.st_size, status.st_mtime_ns
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        if len(columns[0]) == _BATCH:
            batches.append(_batch(columns))
    batches.append(_batch(columns))
    most = dict(search.passed_over.most_common(_KINDS))
    if rest := search.passed_over.total() - sum(most.values()):
        most[_OTHERS] = rest
    files = pa.Table.from_batches(batches, FILES).combine_chunks()
    return Found(files, search.problems, Counter(most | search.excluded))


def _batch(columns: tuple[list[Any], ...]) -> pa.RecordBatch:
    """Move columns of files into a batch of the schema `FILES`."""
    batch = pa.record_batch([pa.array(column, kind) for column, kind in zip(columns, FILES.types, strict=True)], FILES)
    for column in columns:
        column.clear()
    return batch


# Device and number of each folder on the way from the root to a folder: links have another path, but not another id.
FolderIds = frozenset[tuple[int, int]]


@dataclass
class _Search:
    """A search for image files below a folder."""

    root: Path
    skip: Path | None
    globs: dict[str, Callable[[str], bool]]
    excluded: Counter[str]
    problems: list[ImageError] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._above = len(os.path.join(self.root, ""))

    def relative(self, path: str) -> str:
        """Return the path below the root."""
        return path[self._above :]

    def chosen(self, place: Path) -> Iterator[str]:
        """Yield a single file, or the images that a glob matches and those in folders that it matches."""
        if place.exists():
            if place.suffix.lower() not in SUFFIXES:
                raise UsageError(
                    place, "is no image", "name a PNG, JPEG, WebP, AVIF, TIFF or BMP file, or a folder of them"
                )
            yield str(place)
            return
        matches = sorted(glob.iglob(str(place), recursive=True))
        if not matches:
            reason = "matches no file" if _is_glob(place) else "does not exist"
            bracket = ", and write [[] for a [ in a name" if "[" in str(place) else ""
            raise UsageError(place, reason, f"see that its folder is there{bracket}")

        @cache
        def entered(folder: PurePath) -> FolderIds | None:
            """Enter a folder through all folders above it, as `walk` does; None where `walk` would leave one out."""
            if not folder.parts:
                return self._within(self.root, frozenset())
            above = entered(folder.parent)
            return None if above is None or self._left_out(str(folder)) else self._within(self.root / folder, above)

        walked: set[PurePath] = set()
        for path in matches:
            matched = PurePath(self.relative(path))
            if walked.isdisjoint(matched.parents):  # otherwise it was found in a folder that matched, too
                if os.path.isdir(path):
                    walked.add(matched)
                above = entered(matched.parent) if matched.parts else frozenset()
                if above is not None:
                    yield from self._entry(path, above, is_folder=os.path.isdir(path))

    def walk(self, folder: Path | str, above: FolderIds = frozenset()) -> Iterator[str]:
        """Yield the image files below a folder; follow links, but not in circles nor into workspaces."""
        try:
            within = self._within(folder, above)
            if within is None:
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        yield from self._entry(entry.path, within, is_folder=_is_folder(entry))
        except OSError as error:
            reason = f"cannot be opened ({error.strerror})"
            self.problems.append(ImageError(str(folder), reason, "give read permission to it"))

    def _within(self, folder: Path | str, above: FolderIds) -> FolderIds | None:
        """Add a folder to the folders above it; None for a circle of links, a workspace, or the folder to skip."""
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        skipped = self.skip is not None and self.skip.exists() and os.path.samefile(folder, self.skip)
        workspace = all(os.path.isfile(os.path.join(folder, name)) for name in _WORKSPACE)
        return None if here in above or skipped or workspace else above | {here}

    def _entry(self, path: str, above: FolderIds, *, is_folder: bool) -> Iterator[str]:
        if self._left_out(self.relative(path), is_folder=is_folder):
            return
        if is_folder:
            yield from self.walk(path, above)
        elif (suffix := os.path.splitext(path)[1].lower()) in SUFFIXES and not missing_for(suffix):
            yield path
        elif suffix in SUFFIXES:
            self.passed_over[f"{suffix} (pip install 'desra[formats]' to read them)"] += 1
        else:
            self.passed_over[suffix or _NO_SUFFIX] += 1

    def _left_out(self, relative: str, *, is_folder: bool = True) -> bool:
        """Check whether a folder or file is left out, and count it if so."""
        if is_folder and (name := os.path.basename(relative)).lower() in LEFT_OUT:
            self.passed_over[f"{name}/"] += 1
            return True
        if not self.globs:
            return False
        excluding = [kind for kind, matches in self.globs.items() if matches(normalized(relative))]
        self.excluded.update(excluding)
        return bool(excluding)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether an entry is a folder or a link to one, as `os.path.isdir` does, but as a rule without a call."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def root_of(place: Path) -> Path:
    """Return the folder of a place, to which the names of its files are relative."""
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
    """Check whether a place is only some files of a folder."""
    return place.is_file() or _is_glob(place)


def no_images(place: Path, remedy: str, passed_over: Mapping[str, int]) -> UsageError:
    """Return the error for a place without images, which lists the other files there."""
    others = kinds_in_words(passed_over)
    return UsageError(place, "holds no images" + (f", but {others}" if others else ""), remedy)


def kinds_in_words(passed_over: Mapping[str, int]) -> str | None:
    """Write the counts of `Found.passed_over` in words; None without counts.

    Examples:
        >>> kinds_in_words({".txt": 1, ".heic": 3, "@eaDir/": 2})
        '3 .heic, 2 @eaDir/, 1 .txt'
    """
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{f'{count:,}' if count else 'nothing'} {printable(kind)}" for kind, count in kinds) or None


def _exclusion(globs: Sequence[str]) -> dict[str, Callable[[str], bool]]:
    """Map the name of each glob in `Found` to its matcher of relative paths (NFC); ``*`` matches slashes too."""

    def matcher(one: str) -> Callable[[str], bool]:
        pattern = re.compile(fnmatch.translate(normalized(one))).match
        if "/" in one:
            return lambda path: bool(pattern(path) or pattern(f"/{path}"))
        return lambda path: bool(pattern(os.path.basename(path)))

    return {f"{_EXCLUDED} {one}": matcher(one.rstrip("/")) for one in globs}


def normalized(text: str) -> str:
    """Return the NFC form of text: a Mac writes an umlaut as a letter and a mark (NFD)."""
    return unicodedata.normalize("NFC", text)


class ImageNames:
    """Find the names of images by the paths that other tools write.

    Args:
        names: Relative paths with ``/`` and without suffix, or with suffix where two images would share a name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = {}
        self._by_last: dict[str, list[str]] = {}
        for name in names:
            plain = normalized(name)
            self._by_path.setdefault(plain, []).append(name)
            self._by_last.setdefault(plain.rpartition("/")[2], []).append(name)

    def exact(self, path: str) -> list[str]:
        """Return the images at this path, with a suffix or without; several where only NFC and NFD differ."""
        for name in _with_and_without_suffix(path):
            if found := self._by_path.get(normalized(name)):
                return [name] if name in found else found
        return []

    def ending_like(self, path: str) -> list[str]:
        """Return the images whose paths end with this path, with a suffix or without."""
        for plain in _with_and_without_suffix(normalized(path)):
            found = self._by_last.get(plain.rpartition("/")[2], ())
            if ending := [name for name in found if f"/{normalized(name)}".endswith(f"/{plain}")]:
                return sorted(ending)
        return []

    def find(self, path: str) -> list[str]:
        r"""Find the images that a path may mean: none, one, or several where the path fits them equally well.

        The path may be relative to another folder, absolute, or of Windows. The first choice is the image whose name is
        the longest end of the path, the second choice is an image whose name ends with the path.

        Examples:
            >>> names = ImageNames(["x", "s1/x", "s1/y", "s2/y"])
            >>> names.find("../exp3/s1/x.png"), names.find(r"C:\exp3\s2\y.jpg"), names.find("y.png")
            (['s1/x'], ['s2/y'], ['s1/y', 's2/y'])
        """
        if found := self.exact(path):
            return found
        parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if not parts:
            return []
        for last in dict.fromkeys((parts[-1], _UPLOADED.sub("", parts[-1]))):  # Label Studio puts a code before names
            whole = [*parts[:-1], last]
            ends = ["/".join(whole[start:]) for start in range(len(whole))]
            if found := next(filter(None, map(self.exact, ends)), []) or self.ending_like(ends[0]):
                return found
        return []


def _with_and_without_suffix(path: str) -> tuple[str, str]:
    """Return a path without its suffix and as it is, the likelier first: ``a.b`` may be a name with a dot."""
    stem, suffix = os.path.splitext(path)
    return (stem, path) if suffix.lower() in SUFFIXES else (path, stem)
