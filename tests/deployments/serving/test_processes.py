"""Processes that desra starts: found by their mark, started again, given up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil
import pytest

from deployments.serving import processes
from deployments.serving.processes import end_marked, new_mark, start_again
from desra_core.errors import UsageError
from tests.served import Failing, is_gone, sleeping


def test_one_that_has_ended_but_is_not_reaped_holds_up_nobody(monkeypatch) -> None:
    monkeypatch.setattr(processes, "_END_SECONDS", 1000)
    mark = new_mark()
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', ''], "
         f"env=os.environ | {mark})\nprint('up', flush=True)\ninput()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert parent.stdout is not None
    parent.stdout.readline()
    deadline = time.monotonic() + 30
    while psutil.Process(parent.pid).children()[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end_marked(mark)
    parent.communicate(b"\n")


def test_processes_are_known_by_all_of_their_mark() -> None:
    mark = new_mark()
    runs, server = sleeping(mark | {"DESRA_SERVE_PART": "runs"}), sleeping(mark)
    end_marked(mark | {"DESRA_SERVE_PART": "runs"})
    assert is_gone(runs)
    assert not is_gone(server)
    end_marked(mark)
    assert is_gone(server)


def test_who_has_the_mark_himself_goes_on() -> None:
    mark = new_mark()
    told = subprocess.run(
        [sys.executable, "-c", f"from deployments.serving.processes import *; end_marked({mark}); print('on')"],
        env=os.environ | mark, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert told.stdout == "on\n"


def test_what_ends_again_and_again_is_given_up(capsys, monkeypatch) -> None:
    process, starts, pauses = Failing(), [], []
    for moment in (0, 1, 2, 3, 400, 401, 402, 403, 404):  # now and then is no reason
        with contextlib.nullcontext() if moment else pytest.raises(UsageError, match="did not start"):
            start_again(process, starts, moment, pauses.append)
    with pytest.raises(UsageError, match=r"process\.log: the process ends again and again; read that log"):
        start_again(process, starts, 405, pauses.append)
    assert process.starts == 9
    assert pauses == [2, 4, 8, 16, 2, 4, 8, 16, 32]
    assert (
        "the process has ended (exit code -11), and is started again in 4 s; its log is process.log"
        in capsys.readouterr().err
    )


def test_starts_that_take_ten_minutes_and_fail_are_given_up(monkeypatch) -> None:
    clock = [0.0]

    class Slow(Failing):
        def start(self) -> None:
            clock[0] += 1200
            super().start()

    process, starts = Slow(always=True), []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in range(5):
        with pytest.raises(UsageError, match="did not start"):
            start_again(process, starts, clock[0], lambda _: None)
    with pytest.raises(UsageError, match="ends again and again"):
        start_again(process, starts, clock[0], lambda _: None)
