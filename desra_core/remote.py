"""Files that are no files of this machine's folders: at URLs, and members of tar files. Both are paths like others.

fsspec reads URLs, with a driver for each kind of storage that desra's extras install. A member of a tar file is a range
of bytes, local or at a URL, so that any process can read any member without its tar file's other content.
"""

import errno
import io
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import xxhash

from desra_core.errors import AbsentError, ImageError, TransientError, UsageError, described

TAR = ".tar"
# Requests at a time; they mostly wait.
THREADS = 32

# The extra of desra that installs the driver of a kind of URL.
_EXTRAS = {"s3": "s3", "gs": "gs", "az": "az", "https": "http", "http": "http"}
_SCHEMES = frozenset(f"{scheme}:" for scheme in _EXTRAS)
# A server that sends nothing for so long is asked again; a request may take so long in all.
_STALL_SECONDS, _MOST_SECONDS = 15, 600
_LONGEST_SECONDS = 86_400  # of a request for a whole listing or a large file
_PAUSES = (0.5, 2)  # before a request is tried again, in seconds
_GONE = (404, 410)  # HTTP status codes of what is not there
_HEAD = 16_384  # bytes that are fetched at a time where only the header of a file is read
_REFUSALS = ("credential", "expired", "token", "accesskey", "signature", "denied", "forbidden", "unauthorized")
_LACKING = "there is no such file", "check its path, or put it back"
_NOT_REACHED = "check the network and the address, and run again"
_REFUSED = "renew or mend the credentials, and run again"


class Remote(PosixPath):
    """A path that fsspec reads: a URL, or a member of a tar file, which may be local.

    It joins, prints, compares and pickles as paths do. Whether a URL is a folder follows from its last part alone.

    Attributes:
        size: Bytes of the file, where a listing has told them.
        tar: The tar file, for a member.
        offset: Where the member begins there.
    """

    size: int | None = None
    tar: Path | None = None
    offset = 0

    def __str__(self) -> str:
        parts = self.parts
        return f"{parts[0]}//{'/'.join(parts[1:])}" if self.at_url else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        return _restored, (self.parts, self.size, self.tar, self.offset)

    @property
    def at_url(self) -> bool:
        """Whether this is at a URL."""
        return bool(self.parts) and self.parts[0] in _SCHEMES

    def is_absolute(self) -> bool:
        """Return that this does not depend on a working folder."""
        return self.at_url or super().is_absolute()

    def absolute(self) -> "Remote":
        """Return the path itself."""
        return self

    def resolve(self, strict: bool = False) -> "Remote":  # noqa: ARG002 - of the method that this overrides
        """Return the path itself."""
        return self

    def is_dir(self, **_: Any) -> bool:
        """Return that a URL stands for a folder, as far as nobody asks the storage."""
        return self.at_url and self.tar is None

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002 - of the method that this overrides
        """Check whether there is such a file; a URL is asked for one byte (raises `TransientError`)."""
        if self.tar is not None:
            return self.tar.exists()
        try:
            self._asked(lambda system: system._info(self._address))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """Read the whole file (raises `TransientError`)."""
        if self.tar is None:
            return self.read_range(0, None)
        assert self.size is not None
        return self.read_range(0, self.size)

    def open(self, *_: Any, **__: Any) -> Any:
        """Open the file to read a few bytes of it, such as its header."""
        return io.BufferedReader(_Ranges(self), _HEAD)

    def read_range(self, start: int, end: int | None) -> bytes:
        """Read bytes of the file.

        Raises:
            TransientError: There is no such file, access is refused, or the storage failed again and again.
        """
        first, last = self.offset + start, None if end is None else self.offset + end
        source = self.tar or self
        try:
            if not isinstance(source, Remote):
                with source.open("rb") as file:
                    file.seek(first)
                    data = file.read(-1 if last is None else last - first)
            else:
                whole = first == 0 and last is None
                limits = {} if whole else {"start": first, "end": last}
                data = source._asked(lambda system: system._cat_file(source._address, **limits))
                if last is not None and len(data) > last - first:  # of a server that sends files whole
                    data = data[first:last]
        except FileNotFoundError:
            raise TransientError(self, *_LACKING) from None
        return bytes(data)

    def write_bytes(self, data: Any) -> int:
        """Write the whole file, which readers see whole or not at all.

        Raises:
            UsageError: This is no place to write to.
            TransientError: Access is refused, or the storage failed again and again.
        """
        self._write(lambda system: system._pipe_file(self._address, bytes(data)), _MOST_SECONDS)
        return len(data)

    def upload(self, file: Path) -> None:
        """Write the whole file from a local one of any size, as `write_bytes` does."""
        self._write(lambda system: system._put_file(str(file), self._address), _LONGEST_SECONDS)

    def download(self, file: Path) -> None:
        """Copy the file to a local one.

        Raises:
            OSError: The disk here is full.
            TransientError: As `read_range`.
        """
        try:
            self._asked(lambda system: system._get_file(self._address, str(file)), _LONGEST_SECONDS)
        except FileNotFoundError:
            raise TransientError(self, *_LACKING) from None

    def _write(self, request: Callable[[Any], Any], seconds: float) -> None:
        if self.tar is not None or self.scheme in ("http", "https"):
            raise UsageError(self, "is no place to write to", "name a folder, or one at s3://, gs:// or az://")
        try:
            self._asked(request, seconds, done="written")
        except FileNotFoundError:
            raise TransientError(self, "cannot be written (there is no such place)", "check the address") from None

    @property
    def scheme(self) -> str:
        """The kind of the URL, such as ``s3``."""
        return self.parts[0].removesuffix(":")

    @property
    def _address(self) -> str:
        """The path as the driver takes it."""
        if self.scheme in ("http", "https"):
            return f"{self.scheme}://{self.parts[1]}/{quote('/'.join(self.parts[2:]))}"
        return "/".join(self.parts[1:])

    def _asked(self, request: Callable[[Any], Any], seconds: float = _MOST_SECONDS, done: str = "read") -> Any:
        """Ask the storage, and again after a failure that may pass. ``done`` is what then cannot be done.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The disk of this machine is full.
            UsageError: The driver is missing.
            TransientError: Access is refused, or the storage failed again and again.
        """
        from fsspec.asyn import sync  # takes a tenth of a second, which local files need not wait for

        for pause in (*_PAUSES, None):
            try:
                system = _file_system(self)
                return sync(system.loop, request, system, timeout=seconds)
            except UsageError:
                raise
            except Exception as raised:  # noqa: BLE001 - each driver has errors of its own
                error = self._meant(raised)
                full = done == "read" and getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                if full or isinstance(error, FileNotFoundError):
                    raise error from None
                why = described(error)
                words = re.sub(r"\w+://\S+", "", why).lower()  # less the address, which may hold any word
                if isinstance(error, PermissionError) or any(word in words for word in _REFUSALS):
                    raise TransientError(self, f"access is refused ({why})", _REFUSED) from None
                if pause is None:
                    raise TransientError(self, f"cannot be {done} ({why})", _NOT_REACHED) from None
                time.sleep(pause)
        raise AssertionError

    def _meant(self, error: BaseException) -> BaseException:
        """Return the cause of an error: fsspec calls a file of a web server missing where it is told nothing of it."""
        if self.scheme in ("http", "https"):
            while isinstance(error, FileNotFoundError) and (cause := error.__cause__):
                if getattr(cause, "status", None) in _GONE:
                    break
                error = cause
        return error


class _Ranges(io.RawIOBase):
    """A file of which only the parts that are asked for are fetched."""

    def __init__(self, file: Remote) -> None:
        assert file.size is not None
        self._file, self._size, self._position = file, file.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._file.read_range(self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class Listed(NamedTuple):
    """A file of a listing."""

    path: str  # relative to the place that was listed
    size: int
    version: int  # changes whenever the content does: the time of the last change in ns, or a hash of the ETag
    offset: int | None = None  # where a member of a tar file begins


def _restored(parts: tuple[str, ...], size: int | None, tar: Path | None, offset: int) -> Remote:
    path = Remote(*parts)
    if size is not None:
        path.size = size
    if tar is not None:
        path.tar, path.offset = tar, offset
    return path


def place_of(path: str | Path) -> Path:
    """Return a path, or a `Remote` where it is a URL; a `Path` of a URL has lost a slash, as in ``s3:/bucket``."""
    plain = Path(path)
    return Remote(*plain.parts) if plain.parts and plain.parts[0] in _SCHEMES else plain


def file_at(root: Path, path: str, size: int | None, offset: int | None) -> Path:
    """Return the path of a file below a root, by the columns of a listing."""
    if offset is None and not isinstance(root, Remote):
        return root / path
    whole = root / path
    if offset is None:
        return _restored(whole.parts, size, None, 0)
    tar = next(parent for parent in reversed((*whole.parents,)) if is_tar(parent))
    return _restored(whole.parts, size, tar, offset)


def is_tar(path: Path) -> bool:
    """Check whether a path is a tar file, and no folder of such a name."""
    return path.suffix.lower() == TAR and (isinstance(path, Remote) or not path.is_dir())


def check_url(path: Path) -> None:
    """Check that a URL holds no secrets, which would get into logs and settings, and that its driver is installed.

    Raises:
        ValueError: It holds a user or a query, or no bucket or host.
        UsageError: The driver is missing.
    """
    if not isinstance(path, Remote) or not path.at_url:
        return
    if len(path.parts) < 2:
        raise ValueError("names no bucket, container or host")
    if "@" in path.parts[1] or re.search(r"\?.*=", str(path)):  # a ? alone is a wildcard
        raise ValueError("holds a password, key or signature, which belongs into the storage's own configuration")
    _file_system(path)


def _file_system(path: Remote) -> Any:
    """Return the file system of fsspec for a URL, which fsspec keeps for this process.

    Raises:
        UsageError: Its driver is not installed.
    """
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {"use_listings_cache": False}
    if path.scheme == "s3":
        waits = {"connect_timeout": _STALL_SECONDS, "read_timeout": _STALL_SECONDS}
        retries = {"mode": "standard", "total_max_attempts": 2}
        options["config_kwargs"] = {**waits, "retries": retries, "max_pool_connections": 2 * THREADS}
        options["max_concurrency"] = 1
    try:
        if path.scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            waiting = ClientTimeout(total=None, sock_connect=_STALL_SECONDS, sock_read=_STALL_SECONDS)
            options["client_kwargs"] = {"timeout": waiting}
        own = conf.get(path.scheme, {})
        system = fsspec.filesystem(path.scheme, **{name: options[name] for name in options.keys() - own.keys()})
    except ImportError:
        extra = _EXTRAS[path.scheme]
        raise UsageError(path, "needs a driver that is not installed", f"pip install 'desra[{extra}]'") from None
    if path.scheme == "s3":
        system.retries = 1  # `Remote._asked` tries again
    return system


def threads_for(*places: Path) -> ThreadPoolExecutor:
    """Return threads to read files of some places: many where requests mostly wait for a server."""
    at_url = any(isinstance(place, Remote) and place.at_url for place in places)
    return ThreadPoolExecutor(THREADS if at_url else None)


def listing(place: Remote, *, single: bool = False, start: str = "") -> Iterator[Listed]:
    """List all files below a URL, with relative paths, in no order; or the one file at it, with its name as path.

    Args:
        place: The URL.
        single: List the one file at it.
        start: List only the files in the folder itself whose names begin so, if any.

    Raises:
        UsageError: There is no such place, access is refused, or the driver is missing.
        AbsentError: The storage failed again and again.
    """
    try:
        if single:
            info = place._asked(lambda system: system._info(place._address))
            yield Listed(place.name, info["size"] or 0, _version(info))
        else:
            yield from _links(place) if place.scheme in ("http", "https") else _found(place, start)
    except FileNotFoundError:
        raise UsageError(place, "does not exist", "check the address") from None
    except TransientError as error:
        kind = UsageError if error.remedy == _REFUSED else AbsentError
        raise kind(*error.failure) from None


def _found(root: Remote, start: str) -> Iterator[Listed]:
    address = root._address

    def row(info: dict[str, Any]) -> tuple[str, int, int]:
        return info["name"][len(address) + 1 :], info["size"] or 0, _version(info)

    async def rows(system: Any) -> list[tuple[str, int, int]]:
        if hasattr(system, "_iterdir"):  # of s3fs, page by page: else it holds 1.5 KB for each file
            bucket, _, key = address.partition("/")
            prefix = f"{key}/{start}" if key else start
            pages = system._iterdir(bucket, delimiter="/" if start else "", prefix=prefix)
            return [row(info) async for info in pages if info["type"] == "file"]
        infos = await system._ls(address, detail=True) if start else await system._find(address, detail=True)
        return [row(info) for info in (infos if start else infos.values()) if info["type"] == "file"]

    found = root._asked(rows, seconds=_LONGEST_SECONDS)
    if not found and not start:
        raise FileNotFoundError(address)
    yield from (Listed(*file) for file in found if file[0].startswith(start) and file[0] and not file[0].endswith("/"))


def _links(root: Remote) -> Iterator[Listed]:
    """Follow the links of the pages of an HTML index to files and folders below it."""
    top = f"{root._address}/"

    def linked(folder: str) -> list[str]:
        infos = root._asked(lambda system: system._ls(folder, detail=True))
        links = dict.fromkeys(info["name"].partition("#")[0] for info in infos)
        return [link for link in links if link.startswith(folder) and link != folder and "?" not in link]

    def told(link: str) -> dict[str, Any]:
        return dict(root._asked(lambda system: system._info(link)))

    folders, files = [top], list[str]()
    while folders:
        for link in linked(folders.pop()):
            (folders if link.endswith("/") else files).append(link)
    with threads_for(root) as threads:
        for link, info in zip(files, threads.map(told, files), strict=True):
            yield Listed(unquote(link[len(top) :]), info["size"] or 0, _version(info))


def _version(info: dict[str, Any]) -> int:
    """Make a number of what a storage tells about the content of a file; where it tells nothing, of the time."""
    names = ("ETag", "etag", "content_settings", "md5Hash", "LastModified", "last_modified", "updated", "Last-Modified")
    told = next((str(info[name]) for name in names if info.get(name)), None)
    return time.time_ns() if told is None else xxhash.xxh3_64_intdigest(told.encode()) >> 1


class _Header(tarfile.TarInfo):
    """A header whose sizes are checked: Python before 3.11.14 loops without end where one is negative."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a size is negative")
        return super()._block(count)  # type: ignore[misc, no-any-return]


def members(tar: Path) -> Iterator[Listed]:
    """List the files in a tar file by its headers; ``version`` is 0.

    Raises:
        ImageError: It is damaged or no tar file.
        TransientError: It cannot be read.
    """
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as opened:
            end = file.seek(0, io.SEEK_END)
            for member in opened:
                if not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError("it ends within a member")
                if member.isreg():
                    yield Listed(member.name, member.size, 0, member.offset_data)
                opened.members = []  # type: ignore[attr-defined]  # else it keeps them all
            # tarfile takes a damaged header for the end, which is a block of zeros.
            file.seek(opened.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a header is damaged, or the end is missing")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise TransientError(tar, reason, "check the disk and run again") from None
    except (tarfile.TarError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ImageError(tar, f"is no whole tar file ({described(error)})", "copy it again, uncompressed") from None
