"""One finetune per device."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile

import pytest

from tasks.finetuning import training_slot

HOLD = """
import functools, sys
from tasks.finetuning import training_slot
with training_slot(sys.argv[1:], on_wait=functools.partial(print, flush=True)) as device:
    print(device, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def holding(*devices: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, *devices], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_each_gets_a_device_of_its_own_and_the_next_one_waits() -> None:
    first = holding("0", "1")
    assert line_of(first) == "0"
    second = holding("0", "1")
    assert line_of(second) == "1"
    third = holding("0", "1")
    assert line_of(third) == "another finetune is on 0, 1: waiting until it has ended"
    second.kill()  # however it ends, its device is free
    assert line_of(third) == "1"
    other = holding("cpu")
    assert line_of(other) == "cpu"
    for process in (first, second, third, other):
        process.kill()
        process.communicate()


def test_what_fails_while_it_holds_a_device_frees_it() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), training_slot(["cpu"], print):
            raise ZeroDivisionError


def test_other_users_can_wait_too(tmp_path) -> None:
    before = os.umask(0o077)
    try:
        with training_slot(["cpu"], print):
            [file] = tmp_path.iterdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
