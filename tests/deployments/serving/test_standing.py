"""Who serves a workspace, what a killed one leaves, how long its server remembers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from deployments.serving.processes import MARK, new_mark
from deployments.serving.server import end_leftover_server
from deployments.serving.standing import Served, end_leftovers, history_of, served_at, standing
from desra_core.errors import LockedError
from desra_core.workspace import Workspace
from tests.served import is_gone, sleeping

SERVE = """
import sys, time
from pathlib import Path
from datetime import timedelta

from deployments.serving.standing import Served, standing
from desra_core.workspace import Workspace
with standing(Workspace(Path(sys.argv[1]))) as own:
    own.announce(Served("http://127.0.0.1:1/api", own=True), timedelta(days=1))
    print(own.mark["DESRA_SERVE"], flush=True)
    time.sleep(60)
"""


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def test_one_serves_and_others_know_where(workspace) -> None:
    assert served_at(workspace) is history_of(workspace) is None
    with standing(workspace) as own:
        assert served_at(workspace) is None  # it has not said where yet
        served = Served("http://127.0.0.1:4200/api", own=True)
        own.announce(served, timedelta(days=700))
        assert served_at(workspace) == served
        with (
            pytest.raises(LockedError, match=f"served by process {os.getpid()} already; stop that one first"),
            standing(workspace),
        ):
            pass
        assert served_at(workspace) == served
    assert served_at(workspace) is None
    assert history_of(workspace) == timedelta(days=700)  # a run by hand meanwhile is not to shorten it
    with (
        standing(workspace),
        pytest.raises(LockedError, match=f"served by process {os.getpid()} already"),
        standing(workspace),
    ):
        pass


def test_who_only_looks_keeps_nobody_from_serving(workspace) -> None:
    with standing(workspace):
        pass
    with (workspace.prefect_home / "serve.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        looks_away = threading.Timer(0.3, fcntl.flock, [looking, fcntl.LOCK_UN])
        looks_away.start()
        with standing(workspace):
            pass
        looks_away.join()


def test_what_one_leaves_ends_with_it(workspace) -> None:
    with contextlib.suppress(KeyboardInterrupt), standing(workspace) as own:
        left = sleeping(own.mark)
        raise KeyboardInterrupt
    assert is_gone(left)


@contextlib.contextmanager
def serving_again(workspace: Workspace) -> Iterator[None]:
    with standing(workspace):
        yield


@contextlib.contextmanager
def run_by_hand(workspace: Workspace) -> Iterator[None]:
    end_leftover_server(workspace)
    yield


@pytest.mark.parametrize("what_comes_then", [serving_again, run_by_hand])
def test_what_a_killed_one_leaves_is_ended(what_comes_then, workspace) -> None:
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
