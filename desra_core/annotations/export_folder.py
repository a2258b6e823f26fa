"""Write the folder of an export whole or not at all, and never over files that a person has edited since."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from desra_core.errors import UsageError
from desra_core.files.atomic import replace_file, storage_errors
from desra_core.files.hashing import digest, read_bytes
from desra_core.workspace import Workspace

# Names of images do not begin with a dot.
_DOCUMENT = ".desra-export.json"


class ExportFolder:
    """An export that is being written; `write` may be called by several threads.

    A document beside the files names the exported images and results, and has the hash of each file.
    """

    def __init__(self, root: Path, stage: Path) -> None:
        self.root = root
        self._stage = stage
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def write(self, path: str, data: bytes) -> None:
        """Write a file at a relative path (raises `desra_core.errors.TransientError`)."""
        with storage_errors(self.root / path):
            (self._stage / path).parent.mkdir(parents=True, exist_ok=True)
            (self._stage / path).write_bytes(data)
        with self._lock:
            self._digests[path] = digest(data)

    def commit(self, document: dict[str, Any], *, overwrite: bool) -> None:
        """Put all files in place, and remove those of the export before that are not among them.

        Args:
            document: Further entries for the document of the export.
            overwrite: Replace files that were edited since they were exported.

        Raises:
            UsageError: One was edited, and may not be replaced.
            TransientError: The disk is full or failed.
        """
        files = {path: [self._digests[path]] for path in sorted(self._digests)}
        known: dict[str, list[str]] = (export_document(self.root) or {}).get("files", {})
        if not overwrite:
            self._check_edits(known)
        with storage_errors(self.root):
            if not self.root.exists() or not any(self.root.iterdir()):
                _write_document(self._stage, document | {"files": files})
                if self.root.exists():
                    self.root.rmdir()
                self._stage.rename(self.root)
                return
            # While files are being replaced, both the old and the new hash count as unedited.
            both = {path: sorted({*known.get(path, []), *files.get(path, [])}) for path in known.keys() | files.keys()}
            _write_document(self.root, document | {"files": both})
            for path in files:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (self._stage / path).replace(self.root / path)
            for path in known.keys() - files.keys():
                (self.root / path).unlink(missing_ok=True)
            _write_document(self.root, document | {"files": files})
            for folder in sorted((path for path in self.root.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()

    def _check_edits(self, known: dict[str, list[str]]) -> None:
        edited = []
        for path in sorted(known.keys() | self._digests.keys()):
            file = self.root / path
            if file.exists() and digest(read_bytes(file)) not in (*known.get(path, []), self._digests.get(path)):
                edited.append(file)
        if edited:
            more = f", and so were {len(edited) - 1} more files" if len(edited) > 1 else ""
            remedy = "import it first, then export to another folder, or with --overwrite"
            raise UsageError(edited[0], f"was edited since it was exported{more}", remedy)


@contextlib.contextmanager
def open_export(root: Path, workspace: Workspace) -> Iterator[ExportFolder]:
    """Begin an export to a folder; without `ExportFolder.commit` nothing in it changes.

    Raises:
        UsageError: The folder holds other things than an export of this workspace, or lies inside it.
        TransientError: It cannot be written.
    """
    if root.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(root, "lies inside the workspace", "name a folder outside of it as --output")
    if root.exists() and not root.is_dir():
        raise UsageError(root, "is a file", "name a folder as --output")
    if root.is_dir() and any(root.iterdir()):
        document = export_document(root)
        if document is None:
            raise UsageError(root, "is a folder with other things in it", "name a new folder as --output")
        if document.get("workspace") != str(workspace.root.resolve()):
            raise UsageError(root, f"holds an export of {document.get('workspace')}", "name a new folder as --output")
    stage = root.with_name(f".{root.name}.unfinished")
    with storage_errors(root):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    try:
        yield ExportFolder(root, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def export_document(folder: Path) -> dict[str, Any] | None:
    """Read the document of an export; None where the folder holds none."""
    try:
        document = json.loads((folder / _DOCUMENT).read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def export_root(path: Path) -> Path | None:
    """Find the folder of the export that a file or folder belongs to, if any."""
    return next((folder for folder in (path, *path.parents) if (folder / _DOCUMENT).is_file()), None)


def _write_document(folder: Path, document: dict[str, Any]) -> None:
    replace_file(folder / _DOCUMENT, json.dumps(document, indent=1).encode())
