"""The image files below a folder, and the images that a path of another tool may mean."""

import fnmatch
import glob
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa

from desra_core.errors import ImageError, UsageError, printable
from desra_core.images.codec import SUFFIXES
from desra_core.images.further_decoders import missing_for
from desra_core.remote import TAR, Listed, Remote, file_at, is_tar, listing, members, threads_for

# Folders that machines put beside photos, in lower case: thumbnails, previews, deleted files, a Mac's metadata. Folders
# whose names begin with a dot are left out anyway, as are Lightroom's, which end like `_PREVIEWS`.
LEFT_OUT = frozenset(
    {
        "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "__macosx",
        "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "thumbs.db",
        "network trash folder", "temporary items",
    }
)  # fmt: skip
_PREVIEWS = (".lrdata", ".lrcat-data")
_SYNOLOGY = "SYNOPHOTO_"
_THUMBNAIL = re.compile(rf"{_SYNOLOGY}(?:THUMB|FILM)")

# The prefix that Label Studio gives to the names of files.
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")
_BATCH = 65_536
_KINDS = 12  # the number of kinds of other files that have counts of their own
_WORKSPACE = ("lock", "settings.json", "manifest.parquet")  # a folder with these files is a workspace, without photos
_NO_SUFFIX, _OTHERS, _EXCLUDED = "without a suffix", "of other kinds", "excluded by --exclude"
_NEEDS_FORMATS = "(pip install 'desra[formats]' to read them)"
_NOT_INCLUDED, _INCLUDED = "not matched by --include", "matched by --include"
FILES = pa.schema(
    [("name", pa.string()), ("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64()), ("offset", pa.int64())]
)
_WHAT_IT_IS = "name a PNG, JPEG, WebP, AVIF, TIFF or BMP file, or a folder of them"


MembersOf = Callable[[Path, Listed], Iterable[Listed]]


def members_of_tar(tar: Path, _: Listed) -> Iterator[Listed]:
    """List a tar file by reading it, whatever a listing has told of it (raises as `members`)."""
    return members(tar)


class Globs(TypedDict):
    """Globs of `image_files`."""

    exclude: Sequence[str]
    include: Sequence[str]


class Found(NamedTuple):
    """The image files of a place."""

    # A row per file: ``name`` (the relative path without suffix), ``path`` (relative), ``size`` (bytes), ``mtime`` (ns,
    # or another number that changes with the content, see `Listed.version`) and ``offset``: where it begins in its tar
    # file, null for a file of its own.
    files: pa.Table
    problems: list[ImageError]  # files and folders that cannot be read
    # The number of other files by kind, and of the files and folders that each glob of ``exclude`` leaves out, even 0.
    passed_over: Counter[str]


def image_files(
    place: Path,
    skip: Path | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    members_of: MembersOf = members_of_tar,
    examples: dict[str, str] | None = None,
) -> Found:
    """List the image files below a folder, without hidden files, ``skip``, workspaces and `LEFT_OUT` folders.

    Args:
        place: A folder, a file or a glob, which may be URLs; a tar file is a folder of its members. Names and paths are
            relative to its `root_of`.
        skip: A folder to leave out.
        exclude: Globs of files and folders to leave out, matched to names or, with a slash, to relative paths.
        include: Globs in the same form: only files that match one of them, or lie in a folder that does, are taken.
        members_of: Lists a tar file, of which a listing has told size and version.
        examples: Gets the relative path of one file of each kind of `Found.passed_over`.

    Raises:
        UsageError: The folder or file does not exist, or nothing matches the glob.
        AbsentError: A server cannot be reached.
    """
    root = root_of(place)
    if root == place and not isinstance(place, Remote) and not place.is_dir() and not is_tar(place):
        raise UsageError(place, "is no folder", "name a folder of images")
    if not str(place).isprintable():
        raise UsageError(ascii(str(place)), "has a name that is not printable UTF-8", "rename the folder")
    excluding, including = _matchers(_EXCLUDED, exclude), _matchers(_INCLUDED, include)
    counts = Counter(dict.fromkeys(excluding, 0))
    search = _Search(root, skip, excluding, including, counts, set(including), {} if examples is None else examples)
    tar, inside = in_tars(place)
    if tar is not None:
        rows = search.members(tar, inside, members_of)
    elif isinstance(place, Remote):
        rows = search.listed(place)
    else:
        rows = search.looked_at(search.walk(root) if place == root else search.chosen(place))
    batches: list[pa.RecordBatch] = []
    columns: tuple[list[Any], ...] = tuple([] for _ in FILES)
    for row in rows:
        for column, value in zip(columns, row, strict=False):  # local files have no offsets
            column.append(value)
        if len(columns[0]) == _BATCH:
            batches.append(_batch(columns))
    batches.append(_batch(columns))
    most = dict(search.passed_over.most_common(_KINDS))
    if rest := search.passed_over.total() - sum(most.values()):
        most[_OTHERS] = rest
    files = pa.Table.from_batches(batches, FILES).combine_chunks()
    matched_none = dict.fromkeys(sorted(search.unmatched, key=list(including).index), 0)
    return Found(files, search.problems, Counter(most | search.excluded | matched_none))


def paths_of(place: Path, files: pa.Table, role: str = "") -> Iterator[Path]:
    """Return the path of each file of a table with the columns of `FILES`, whose names may begin with a role.

    Args:
        place: The folder, file or glob that was listed, or its `root_of`.
        files: The table; rows without a path are left out.
        role: What the names of the columns begin with.
    """
    root = root_of(place)
    columns = [files[f"{role}{name}"].to_pylist() for name in ("path", "size", "offset")]
    return (file_at(root, *row) for row in zip(*columns, strict=True) if row[0] is not None)


def _batch(columns: tuple[list[Any], ...]) -> pa.RecordBatch:
    """Move columns of files into a batch of the schema `FILES`."""
    rows = len(columns[0])
    arrays = [
        pa.array(column, kind) if column else pa.nulls(rows, kind)
        for column, kind in zip(columns, FILES.types, strict=True)
    ]
    batch = pa.record_batch(arrays, FILES)
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
    including: dict[str, Callable[[str], bool]]
    excluded: Counter[str]
    unmatched: set[str]  # the globs of ``including`` that no file has matched
    examples: dict[str, str]
    problems: list[ImageError] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._above = len(os.path.join(self.root, ""))
        self._entered: dict[str, bool] = {}  # by folder of a listing: whether it is not left out

    def relative(self, path: str) -> str:
        """Return the path below the root."""
        return path[self._above :]

    def looked_at(self, paths: Iterable[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of local files."""
        for path in paths:
            relative = self.relative(path)
            try:
                relative.encode()
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):
                    self.problems.append(ImageError(path, "is no file", "remove it"))
                    continue
            except UnicodeEncodeError:
                self.problems.append(ImageError(ascii(relative), "has a name that is not UTF-8", "rename it"))
                continue
            except OSError as error:
                reason = f"cannot be looked at ({error.strerror})"
                self.problems.append(ImageError(path, reason, "mend or remove it"))
                continue
            yield relative[: relative.rindex(".")], relative, status.st_size, status.st_mtime_ns

    def listed(self, place: Remote) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of the files at a URL: of a folder, of a single file, or of what a glob matches."""
        single, asked = is_single(place), self._asked_for(place)
        files = listing(place, single=True) if single else listing(Remote(*self.root.parts))
        found = False
        for file in files:
            if asked(file.path):
                found = True
                if self._taken(file.path):
                    yield os.path.splitext(file.path)[0], *file
        if not found:
            raise _nothing(place)

    def members(self, tars: Path, inside: str | None, members_of: MembersOf) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of members of the tar files that a path or glob names.

        By the rules of WebDataset, the name of a member ends at the first dot of its last part, and what follows says
        what the member is. Images are taken whose whole ending is that of an image, or that the glob ``inside`` names.
        """
        named = None if inside is None else re.compile(fnmatch.translate(inside)).match
        found = list(self._tars(tars))
        if not found:
            raise _nothing(tars)

        def listed(tar: Listed) -> list[Listed] | ImageError:
            whole = self.root / tar.path
            try:
                return list(members_of(file_at(whole.parent, whole.name, tar.size, None), tar))
            except ImageError as error:
                return error

        with threads_for(tars) as threads:
            lists = list(threads.map(listed, found))
        for tar, of_tar in zip(found, lists, strict=True):
            if isinstance(of_tar, ImageError):
                self.problems.append(of_tar)
                continue
            for member in of_tar:
                own = posixpath.normpath(member.path)
                last = posixpath.basename(own)
                key, ending = last.partition(".")[::2]
                relative = posixpath.join(tar.path, own)
                if named is not None and not named(own):
                    continue
                if self._taken(relative, f".{ending}" if ending and named is None else None):
                    name = posixpath.join(tar.path, posixpath.dirname(own), key)
                    yield name, relative, member.size, tar.version, member.offset

    def _tars(self, tars: Path) -> Iterator[Listed]:
        """Yield the tar files that a path or glob names, with paths relative to the root, empty where they are it."""
        if isinstance(tars, Remote):
            if self.root == tars:
                yield from (tar._replace(path="") for tar in listing(tars, single=True))
                return
            asked = self._asked_for(tars)
            for file in sorted(listing(Remote(*self.root.parts))):
                if asked(file.path) and file.path.lower().endswith(TAR):
                    yield file
            return
        for path in [str(tars)] if self.root == tars else sorted(glob.iglob(str(tars), recursive=True)):
            if is_tar(Path(path)):
                status = os.stat(path)
                yield Listed(path[self._above :], status.st_size, status.st_mtime_ns)

    def _asked_for(self, place: Path) -> Callable[[str], bool]:
        """Return whether a path below the root is, or lies in, what a place names."""
        if not _is_glob(place):
            return lambda _: True
        from fsspec.utils import glob_translate

        pattern = re.compile(glob_translate(str(place)[self._above :])).match
        return lambda path: any(pattern(part) for part in (path, *map(str, PurePosixPath(path).parents)))

    def _taken(self, relative: str, kind: str | None = None) -> bool:
        """Check whether a listed file is an image and neither it nor a folder above it is left out; count it if not."""
        parts = relative.split("/")
        if not relative.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
            subject = printable(os.path.join(self.root, relative))
            self.problems.append(ImageError(subject, "has a name that no file here can have", "rename it"))
            return False
        above = ""
        for part in parts[:-1]:
            above = f"{above}/{part}" if above else part
            if above not in self._entered:
                self._entered[above] = not part.startswith(".") and not self._left_out(above)
            if not self._entered[above]:
                return False
        if parts[-1].startswith(".") or self._left_out(relative, is_folder=False):
            return False
        return self._is_image(relative, kind)

    def chosen(self, place: Path) -> Iterator[str]:
        """Yield a single file, or the images that a glob matches and those in folders that it matches."""
        if place.exists():
            if place.suffix.lower() not in SUFFIXES:
                raise UsageError(place, "is no image", _WHAT_IT_IS)
            yield str(place)
            return
        matches = sorted(glob.iglob(str(place), recursive=True))
        if not matches:
            raise _nothing(place)

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
        relative = self.relative(path)
        if self._left_out(relative, is_folder=is_folder):
            return
        if is_folder:
            yield from self.walk(path, above)
        elif self._is_image(relative):
            yield path

    def _is_image(self, relative: str, kind: str | None = None) -> bool:
        """Check whether a file is an image and included, and count it if not; ``kind`` is its ending, if not usual."""
        suffix = (os.path.splitext(relative)[1] if kind is None else kind).lower()
        if suffix in SUFFIXES and missing_for(suffix):
            return self._passed_over(f"{suffix} {_NEEDS_FORMATS}", relative)
        if suffix not in SUFFIXES:
            return self._passed_over(suffix or _NO_SUFFIX, relative)
        if _SYNOLOGY in relative and (thumbnail := _THUMBNAIL.match(relative, relative.rfind("/") + 1)):
            return self._passed_over(f"{thumbnail[0]}*", relative)
        if not self.including:
            return True
        path = normalized(relative)
        places = (path, *map(str, PurePosixPath(path).parents[:-1]))
        matched = {kind for kind, matches in self.including.items() if any(map(matches, places))}
        self.unmatched -= matched
        return bool(matched) or self._passed_over(_NOT_INCLUDED, relative)

    def _passed_over(self, kind: str, relative: str) -> bool:
        """Count a file that is no image of the corpus; returns False."""
        self.passed_over[kind] += 1
        self.examples.setdefault(kind, relative)
        return False

    def _left_out(self, relative: str, *, is_folder: bool = True) -> bool:
        """Check whether a folder or file is left out, and count it if so."""
        if is_folder and ((name := os.path.basename(relative)).lower() in LEFT_OUT or name.lower().endswith(_PREVIEWS)):
            self._passed_over(f"{name}/", relative)
            return True
        if not self.globs:
            return False
        excluding = [kind for kind, matches in self.globs.items() if matches(normalized(relative))]
        self.excluded.update(excluding)
        for kind in excluding:
            self.examples.setdefault(kind, relative)
        return bool(excluding)


def _nothing(place: Path) -> UsageError:
    reason = "matches no file" if _is_glob(place) else "does not exist"
    bracket = ", and write [[] for a [ in a name" if "[" in str(place) else ""
    return UsageError(place, reason, f"see that its folder is there{bracket}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether an entry is a folder or a link to one, as `os.path.isdir` does, but as a rule without a call."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def root_of(place: Path) -> Path:
    """Return the folder of a place, to which the names of its files are relative.

    What a URL means follows from the URL alone: a glob, an image, a tar file, else a folder.
    """
    if not isinstance(place, Remote) and place.is_dir():
        return place
    if _is_glob(place):
        parts = place.parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        return type(place)(*parts[:fixed])
    if isinstance(place, Remote):
        return place.parent if place.suffix.lower() in SUFFIXES else place
    return place.parent if (place.is_file() and not is_tar(place)) or place.suffix.lower() in SUFFIXES else place


def _is_glob(place: Path) -> bool:
    return glob.has_magic(str(place)) and (isinstance(place, Remote) or not place.exists())


def is_single(place: Path) -> bool:
    """Check whether a place is one file."""
    if isinstance(place, Remote):
        return place.suffix.lower() in SUFFIXES and not _is_glob(place)
    return place.is_file() and not is_tar(place)


def is_selection(place: Path) -> bool:
    """Check whether a place is only some files of a folder."""
    return is_single(place) or _is_glob(place)


def in_tars(place: Path) -> tuple[Path | None, str | None]:
    """Split a place into a path or glob of tar files, and a glob of their members; None where it has them not."""
    for count, part in enumerate(place.parts, 1):
        if part.lower().endswith(TAR) and is_tar(tars := type(place)(*place.parts[:count])):
            return tars, "/".join(place.parts[count:]) or None
    return None, None


def no_images(place: Path, remedy: str, passed_over: Mapping[str, int]) -> UsageError:
    """Return the error for a place without images, which lists the other files there."""
    others = kinds_in_words(passed_over)
    if TAR in passed_over:
        remedy += f"; name tar files by a glob, like '{place}/*{TAR}'"
    return UsageError(place, "holds no images" + (f", but {others}" if others else ""), remedy)


def kinds_in_words(passed_over: Mapping[str, int]) -> str | None:
    """Write the counts of `Found.passed_over` in words; None without counts.

    Examples:
        >>> kinds_in_words({".txt": 1, ".heic": 3, "@eaDir/": 2})
        '3 .heic, 2 @eaDir/, 1 .txt'
    """
    kinds = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{f'{count:,}' if count else 'nothing'} {printable(kind)}" for kind, count in kinds) or None


def why_passed_over(kind: str) -> str:
    """Say why a file or folder is left out, by its kind in `Found.passed_over`."""
    if kind.endswith(_NEEDS_FORMATS):
        return "needs a package: pip install 'desra[formats]'"
    if kind.endswith("/"):
        return "a folder of thumbnails, previews or deleted files"
    if kind.startswith(_SYNOLOGY):
        return "a thumbnail of a NAS"
    if kind.startswith((_EXCLUDED, _NOT_INCLUDED, _INCLUDED)):
        return "by a flag"
    return "tar files are read where a glob names them" if kind == TAR else "no photo"


def _matchers(kind: str, globs: Sequence[str]) -> dict[str, Callable[[str], bool]]:
    """Map the name of each glob in `Found` to its matcher of relative paths (NFC); ``*`` matches slashes too."""

    def matcher(one: str) -> Callable[[str], bool]:
        pattern = re.compile(fnmatch.translate(normalized(one))).match
        if "/" in one:
            return lambda path: bool(pattern(path) or pattern(f"/{path}"))
        return lambda path: bool(pattern(os.path.basename(path)))

    return {f"{kind} {one}": matcher(one.rstrip("/")) for one in globs}


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
