"""Processes that desra starts: found by their mark, started again, given up."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import psutil
import pytest

from deployments.serving import processes
from deployments.serving.processes import (
    MARK,
    Served,
    end_leftovers,
    end_marked,
    environments,
    history_of,
    new_mark,
    served_at,
    serving_alone,
)
from deployments.serving.server import end_leftover_server
from desra_core.errors import LockedError, UsageError
from desra_core.workspace import Workspace
from tests.served import Failing, is_gone, sleeping


def test_a_zombie_does_not_hold_up_the_end(monkeypatch) -> None:
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


def test_a_process_that_has_only_just_started_is_known(monkeypatch) -> None:
    """Linux shows no environment of a process while it is being replaced by a program."""
    seen = []
    for _ in range(50):
        with subprocess.Popen(["sleep", "60"], env=new_mark()) as process:
            monkeypatch.setattr(psutil, "process_iter", lambda pid=process.pid: [psutil.Process(pid)])
            seen += [environment for _, environment in environments()]
            process.kill()
    assert all(MARK in environment for environment in seen)


def test_this_process_goes_on_despite_its_mark() -> None:
    mark = new_mark()
    told = subprocess.run(
        [sys.executable, "-c", f"from deployments.serving.processes import *; end_marked({mark}); print('on')"],
        env=os.environ | mark, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert told.stdout == "on\n"


def test_a_process_that_ends_again_and_again_is_given_up(capsys, monkeypatch) -> None:
    process, pauses = Failing(), []
    for moment in (0, 1, 2, 3, 400, 401, 402, 403, 404):  # now and then is no reason
        with contextlib.nullcontext() if moment else pytest.raises(UsageError, match="did not start"):
            process.start_again(moment, pauses.append)
    with pytest.raises(UsageError, match=r"process\.log: the process ends again and again; read that log"):
        process.start_again(405, pauses.append)
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

    process = Slow(always=True)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in range(5):
        with pytest.raises(UsageError, match="did not start"):
            process.start_again(clock[0], lambda _: None)
    with pytest.raises(UsageError, match="ends again and again"):
        process.start_again(clock[0], lambda _: None)


SERVE = """
import sys, time
from pathlib import Path
from datetime import timedelta

from deployments.serving.processes import Served, serving_alone
from desra_core.workspace import Workspace
with serving_alone(Workspace(Path(sys.argv[1]))) as own:
    own.announce(Served("http://127.0.0.1:1/api", own=True), timedelta(days=1))
    print(own.mark["DESRA_SERVE"], flush=True)
    time.sleep(60)
"""


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_one_process_serves_and_others_find_its_server(workspace, monkeypatch) -> None:
    assert served_at(workspace) is history_of(workspace) is None
    with serving_alone(workspace) as own:
        assert served_at(workspace) is None  # it has not said where yet
        served = Served("http://127.0.0.1:4200/api", own=True)
        own.announce(served, timedelta(days=700))
        assert served_at(workspace) == served
        with (
            pytest.raises(LockedError, match=f"served by process {os.getpid()} already; stop that one first"),
            serving_alone(workspace),
        ):
            pass
        assert served_at(workspace) == served
        with monkeypatch.context() as patch:
            patch.setattr(processes, "this_machine", lambda: "another")
            with pytest.raises(UsageError, match=r"is served by desra serve on .+; run on that host, or stop it first"):
                served_at(workspace)
    assert served_at(workspace) is None
    assert history_of(workspace) == timedelta(days=700)  # a run by hand meanwhile is not to shorten it
    with (
        serving_alone(workspace),
        pytest.raises(LockedError, match=f"served by process {os.getpid()} already"),
        serving_alone(workspace),
    ):
        pass


def test_a_look_at_the_lock_does_not_keep_others_from_serving(workspace) -> None:
    with serving_alone(workspace):
        pass
    with (workspace.prefect_home / "serve.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looks_away = threading.Timer(0.3, fcntl.flock, [looking, fcntl.LOCK_UN])
        looks_away.start()
        with serving_alone(workspace):
            pass
        looks_away.join()


def test_the_processes_of_desra_serve_end_with_it(workspace) -> None:
    with contextlib.suppress(KeyboardInterrupt), serving_alone(workspace) as own:
        left = sleeping(own.mark)
        raise KeyboardInterrupt
    assert is_gone(left)


@contextlib.contextmanager
def serving_again(workspace: Workspace) -> Iterator[None]:
    with serving_alone(workspace):
        yield


@contextlib.contextmanager
def run_by_hand(workspace: Workspace) -> Iterator[None]:
    end_leftover_server(workspace)
    yield


@pytest.mark.parametrize("what_comes_then", [serving_again, run_by_hand])
def test_the_processes_of_a_killed_desra_serve_are_ended(what_comes_then, workspace) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVE, workspace.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    mine, other = sleeping({MARK: token}), sleeping(new_mark())
    (workspace.prefect_home / "server.json").write_text(json.dumps({"pid": mine.pid, "token": token}))
    end_leftovers(workspace)  # it is on: nothing is left over
    end_leftover_server(workspace)
    assert mine.poll() is None
    (workspace.prefect_home / "server.json").unlink()
    process.kill()
    process.wait()
    assert served_at(workspace) is None
    with what_comes_then(workspace):
        assert is_gone(mine)
        assert not is_gone(other)
    end(other)
    end(process)


def test_a_server_is_known_by_its_mark_and_not_by_its_pid(workspace) -> None:
    workspace.prefect_home.mkdir()
    record = workspace.prefect_home / "server.json"
    mark = new_mark()
    server, other = sleeping(mark), sleeping(new_mark())
    record.write_text(json.dumps({"pid": other.pid, "token": mark[MARK]}))
    end_leftover_server(workspace)
    assert is_gone(server)
    assert not is_gone(other)
    assert not record.exists()
    for damaged in ("", "[]", "{}", '{"token": ""}', '{"token": null}'):
        record.write_text(damaged)
        (workspace.prefect_home / "serve.lock").write_text(damaged)
        end_leftover_server(workspace)
        assert not is_gone(other)
    end(other)
