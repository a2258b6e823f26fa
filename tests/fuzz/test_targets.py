"""The targets of the fuzzer, given their own seeds and the files that once broke them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, tried

FOUND = sorted((Path(__file__).parent / "found").iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read(name: str) -> None:
    """Fuzzing a reader that refuses all its seeds would find nothing."""
    target = TARGETS[name]
    lines = [tried(target.read, seed) for seed in target.seeds()]
    assert None in lines
    assert all(line is None or "\n" not in line for line in lines)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_is_read_or_refused(path: Path) -> None:
    tried(TARGETS[path.name.partition("-")[0]].read, path.read_bytes())
