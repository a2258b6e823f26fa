"""Pack delivered pictures into tar files as WebDataset reads them: one for each shard, whole or not at all.

Workers write pictures into a folder of the workspace. When those of a shard are there, they are packed in the order of
their names, together with what the tar file has held before, and deleted from the folder. A note says what a tar file
holds: before a new tar file takes its place, the note has both, and afterwards the new one alone. So a tar file that is
there is a whole one, and one that no note knows is somebody else's.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from desra_core.errors import TransientError, UsageError
from desra_core.files import (
    as_json,
    checksum,
    file_checksum,
    read_bytes,
    read_document,
    scratch_in,
    storage_errors,
    sweep,
    sync_path,
)
from desra_core.remote import TAR, Remote
from desra_core.workspace import Workspace

# From a row to the name of its sample and its ending, such as ``sub/a`` and ``.png``.
SampleOf = Callable[[dict[str, Any]], tuple[str, str]]


class Packed(NamedTuple):
    """What a tar file holds.

    Attributes:
        checksum: Of the tar file.
        members: By path of a picture or map in a folder, its name in the tar file.
        checksums: By path, the checksum of its content.
    """

    checksum: str
    members: dict[str, str]
    checksums: dict[str, str]


class Tars:
    """The tar files of a delivery.

    Args:
        workspace: The workspace, with the notes and the folder of pictures that are not packed yet.
        place: The key of the output.
        output: ``NAME.tar``, here or at a URL: shard 3 is packed into ``NAME-000003.tar``.
        sizes: Where the output is at a URL, the bytes of the files beside it by name.
        sample_of: Names the members.
    """

    def __init__(
        self,
        workspace: Workspace,
        place: str,
        output: Path,
        sizes: Mapping[str, int] | None,
        sample_of: SampleOf,
    ) -> None:
        self._workspace, self._place, self._output, self._sizes = workspace, place, output, dict(sizes or {})
        self._sample_of = sample_of
        self._folder = workspace.unpacked(place)

    def path(self, number: int) -> Path:
        """Return the path of the tar file of a shard."""
        return tar_path(self._output, number)

    def packed(self, number: int) -> Packed | None:
        """Find out what the tar file of a shard holds; None where there is none.

        Raises:
            UsageError: The tar file that is there is not as desra deliver has written it.
        """
        path = self.path(number)
        size = self._size(path)
        if size is None:
            return None
        known = read_document(self._workspace.packed(self._place, number)).get("versions", [])
        versions = [Packed(**version) for version in known if version["checksum"].startswith(f"{size}:")]
        if len(versions) > 1:  # a killed run has left both, and may have moved the new one to its place or not
            with self._at_hand(path) as file:
                there = file_checksum(file)
            versions = [version for version in versions if version.checksum == there]
        if not versions:
            raise _in_the_way(path)
        return versions[0]

    def pack(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Make the tar file of a shard hold what it should, and delete the files that it holds then.

        Args:
            number: The shard.
            rows: Of `desra_core.delivery.plan.DELIVERED`.

        Raises:
            UsageError: The tar file that is there has been changed.
            TransientError: Storage failed, or a picture that is not packed yet has been changed.
        """
        before = self.packed(number)
        held = before.checksums if before else {}
        fresh = {row["path"] for row in rows if row["key"] and (self._folder / row["path"]).exists()}
        wanted = [row for row in rows if row["path"] in fresh or (held.get(row["path"], 0) == row["checksum"])]
        checksums = {row["path"]: row["checksum"] for row in wanted}
        if held != checksums:
            self._write(self.path(number), number, before, Packed("", _members(wanted, self._sample_of), checksums))
        for path in fresh:
            (self._folder / path).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Delete the folders that packing has left empty."""
        for folder, _, _ in os.walk(self._folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _write(self, path: Path, number: int, before: Packed | None, made: Packed) -> None:
        """Write a tar file beside its place, note what it holds, and move or send it there."""
        scratch = self._scratch(path)
        with storage_errors(path), contextlib.ExitStack() as stack:
            stack.callback(scratch.unlink, missing_ok=True)
            old = None
            if before:
                file = stack.enter_context(self._at_hand(path))
                if file_checksum(file) != before.checksum:
                    raise _in_the_way(path)
                old = stack.enter_context(tarfile.open(file))
            scratch.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("xb") as sink:
                with tarfile.open(fileobj=sink, mode="w") as tar:
                    for relative, member in made.members.items():
                        about = tarfile.TarInfo(member)
                        data = self._content(relative, made, before, old)
                        about.size = len(data)
                        tar.addfile(about, io.BytesIO(data))
                sink.flush()
                os.fsync(sink.fileno())
            made = made._replace(checksum=file_checksum(scratch))
            self._note(number, *filter(None, (before, made)))
            if isinstance(path, Remote):
                path.upload(scratch)
                self._sizes[path.name] = scratch.stat().st_size
            else:
                scratch.replace(path)
                sync_path(path.parent)  # after a power cut, the note and the tar file must not be of two states
        self._note(number, made)

    def _content(self, relative: str, made: Packed, before: Packed | None, old: tarfile.TarFile | None) -> bytes:
        """Read a picture or map that is not packed yet, or else out of the tar file before."""
        expected = made.checksums[relative]
        if before and old and before.checksums.get(relative) == expected:
            member = old.extractfile(before.members[relative])
            assert member is not None
            return member.read()
        data = read_bytes(path := self._folder / relative)
        if checksum(data) != expected:
            path.unlink(missing_ok=True)
            raise TransientError(path, "is not as it was written", "run again: it is made anew")
        return data

    def _note(self, number: int, *versions: Packed) -> None:
        note = {"versions": [version._asdict() for version in versions]}
        path = self._workspace.packed(self._place, number)
        self._workspace.publish(path, as_json(note), durable=True)
        with storage_errors(path):
            sync_path(path.parent)

    def _size(self, path: Path) -> int | None:
        if isinstance(path, Remote):
            return self._sizes.get(path.name)
        with contextlib.suppress(OSError):
            return path.stat().st_size
        return None

    def _scratch(self, path: Path) -> Path:
        """Return a new hidden file beside a tar file, or of one at a URL in the workspace; delete older ones."""
        folder = self._folder.parent if isinstance(path, Remote) else path.parent
        sweep(folder, f"{path.name}.")
        return scratch_in(folder, f"{path.name}.")

    @contextlib.contextmanager
    def _at_hand(self, path: Path) -> Iterator[Path]:
        """Yield a tar file, or a copy of it where it is at a URL."""
        if not isinstance(path, Remote):
            yield path
            return
        copy = self._scratch(path)
        try:
            with storage_errors(copy):
                path.download(copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)


def tar_path(output: Path, number: int) -> Path:
    """Return the path of the tar file of a shard."""
    return output.with_name(f"{output.name[: -len(TAR)]}-{number:06d}{TAR}")


def _members(rows: Sequence[dict[str, Any]], sample_of: SampleOf) -> dict[str, str]:
    """Name the members of a tar file by path of their files, in the order of their names.

    By the rules of WebDataset, the name of a sample ends at the first dot of its last part, so dots become underscores.
    A name that is taken then gets another underscore.
    """
    samples = {row["path"]: sample_of(row) for row in rows}
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for sample in sorted(
        {name for name, _ in samples.values()}, key=lambda name: ("." in posixpath.basename(name), name)
    ):
        folder, last = posixpath.split(sample)
        key = posixpath.join(folder, last.replace(".", "_"))
        while key in taken:
            key += "_"
        keys[sample] = key
        taken.add(key)
    parts = sorted((keys[name], ending, path) for path, (name, ending) in samples.items())  # a sample's are adjacent
    return {path: key + ending for key, ending, path in parts}


def _in_the_way(path: Path) -> UsageError:
    reason = "is in the way: it is not as desra deliver has written it, if it did"
    return UsageError(path, reason, "move it, or name another --output")
