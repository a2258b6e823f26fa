"""Keys of files depend on their content, and need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from desra_core.errors import UsageError
from desra_core.files.hashing import content_key, digest


def test_a_key_follows_the_content(tmp_path: Path) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"content")
    copy.write_bytes(b"content")
    assert content_key(path) == content_key(copy) == digest(b"content")
    copy.write_bytes(b"other")
    assert content_key(copy) == digest(b"other")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: does not exist; check the path"):
        content_key(tmp_path / "none")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        content_key(tmp_path)


def test_keys_of_a_run_need_no_torch() -> None:
    code = "import sys, desra_core.planning.keys; assert not {'torch', 'spandrel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
