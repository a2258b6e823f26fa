"""`desra serve`: the processes on one machine that scheduled runs need.

::

    desra serve ── Prefect server           unless PREFECT_API_URL names one
                ├─ the report's server      its address is what runs link to
                ├─ Dask scheduler, workers  for all runs; their address is in the environment of the runs
                └─ Prefect worker           takes runs from the work pool of the workspace, one at a time
                   └─ a process per run

A run may be killed at any moment, and the next run goes on from there. So desra serve stops by killing the runs, and
reports this to the server. If the server or the Prefect worker ends by itself, desra serve starts it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from deployments.commands.models import twin_first
from deployments.serving import schedules
from deployments.serving.connection import CONSOLE, check_server, connected, watch_at
from deployments.serving.guarded import report_secret, report_server
from deployments.serving.processes import Child, RestlessError, Served, end_marked, for_other_folder, serving_alone
from deployments.serving.server import Server, check_temporary, end_leftover_server, forget_results
from desra_core.errors import DesraError, UsageError, printable
from desra_core.gate.comparison import check_mining, check_training, mining_of
from desra_core.settings import Machine
from desra_core.settings.models import Serving, parse_span
from desra_core.workspace import Workspace
from tasks.logs import say

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tasks.dask_cluster import StandingCluster

_POLL_SECONDS = 1.0
_END_SECONDS = 10
_SAY_SECONDS = 10.0
_LOOK_SECONDS = 60.0
_HOUSEKEEPING_SECONDS = 86400.0
# A run whose state is newer than this may have no process yet.
_SETTLED = timedelta(minutes=2)


def serve(serving: Serving, machine: Machine) -> int:
    """Serve a corpus until a signal comes; return the exit code.

    Raises:
        UsageError: A setting, a folder or a model cannot be used; another process uses or serves the workspace.
    """
    if not serving.photos.is_dir():
        reason = "is no folder" if serving.photos.exists() else "does not exist"
        raise UsageError(serving.photos, reason, "name the folder that photos come to")
    workspace = Workspace(serving.workspace)
    is_new = not workspace.exists()
    if is_new:
        _check(serving)  # first, so that a refused start leaves no new workspace
    workspace.create()
    deployments = schedules.deployments_of(serving, machine)
    pool = deployments[0].work_pool
    with stoppable(), contextlib.ExitStack() as stack:
        service = stack.enter_context(serving_alone(workspace))
        with workspace.locked():
            end_leftover_server(workspace)
            if not is_new:
                _check(serving)
            if code := twin_first(serving, machine):
                return code
            check_temporary()
            say("starting Prefect and the workers, which takes some seconds")
            os.environ.setdefault(CONSOLE, "CRITICAL")
            history = parse_span(serving.history)
            own = not os.environ.get("PREFECT_API_URL")
            server = Server(workspace, port=serving.port, history=history, mark=service.mark) if own else None
            if server:
                stack.enter_context(server.running())
            else:
                check_server(os.environ["PREFECT_API_URL"])
            with connected() as client:
                schedules.check_alone(pool, client)
                schedules.register(deployments, client, own=own)
                schedules.drop_missed(pool, client, settled=_SETTLED)
                _replace_dead(pool, workspace, client, "desra serve was killed", own=own)
            url = os.environ["PREFECT_API_URL"]
            service.announce(Served(url, own=own), history)
        endings = schedules.Endings(pool)
        beside = serving.port and serving.port + 1
        report = stack.enter_context(report_server(workspace, beside, lambda: endings.queue))
        cluster = stack.enter_context(_open_cluster(serving, machine))
        environment = _environment(serving, machine, cluster, report)
        stack.callback(_mark_stopped, pool)
        worker = Worker(pool, environment, service.mark, workspace.prefect_home / "worker.log")
        stack.enter_context(worker.running())
        stack.callback(endings.say_new)  # also runs that end just before desra serve does
        say(f"watch at {watch_at(workspace, url)}")
        say(f"the report is at {report}")
        say(f"metrics are at {urljoin(report, '/metrics')} (bearer token in {report_secret(workspace)})")
        _say_when(serving, deployments)
        with alarm_at_the_end(serving):
            look_after(server, worker, cluster, serving, endings)
    return 0


def look_after(
    server: Server | None, worker: Worker, cluster: StandingCluster | None, serving: Serving, endings: schedules.Endings
) -> None:
    """Restart processes that end by themselves, replace dead runs, and clean up, until a signal comes.

    Raises:
        UsageError: A process ends again and again, or the workspace has vanished, perhaps with its disk: a process
            that was started now would make a new workspace in its place.
    """
    workspace, history = Workspace(serving.workspace), parse_span(serving.history)
    processes: list[Child] = [server, worker] if server else [worker]
    looked = cleaned = said = time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        for process in processes:
            if process.exit_code is not None:
                _check_there(workspace)
                try:
                    process.start_again(now, time.sleep)
                except RestlessError:
                    raise
                except (DesraError, OSError) as error:
                    say(f"warning: {printable(error)}")  # the next check finds that it has ended
        if now - said >= _SAY_SECONDS:
            said = now
            endings.say_new()
        if now - looked >= _LOOK_SECONDS:
            looked = now
            _check_there(workspace)
            _tidy_runs(workspace, endings.pool, own=server is not None)
            if cluster:
                cluster.keep_up()
        if now - cleaned >= _HOUSEKEEPING_SECONDS:
            cleaned = now
            forget_results(workspace.prefect_home, history)


@contextlib.contextmanager
def alarm_at_the_end(serving: Serving) -> Iterator[None]:
    """Post to the webhook if desra serve ends by an error, since no run will report anything afterwards."""
    from flows.desra_flow import WEBHOOK, post_to_webhook

    try:
        yield
    except Exception as error:
        line = f"desra serve has ended: {printable(error)}"
        message = {"text": f"{serving.title}: {line}", "deployment": serving.title, "message": line,
                   "workspace": str(serving.workspace)}  # fmt: skip
        address = serving.webhook or os.environ.get(WEBHOOK)
        if address and (trouble := post_to_webhook(address, message)):
            say(f"warning: {trouble}")
        raise


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM or a closed terminal end the block; ignore further signals while it ends."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signals.append(signal.SIGHUP)

    def stop(_: int, __: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        say("stopping")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _open_cluster(serving: Serving, machine: Machine) -> Iterator[StandingCluster | None]:
    """Check the given Dask scheduler, or start a cluster on this machine."""
    from tasks.dask_cluster import gpus_wanted, open_dask, standing_cluster

    if machine.elsewhere:
        if machine.scheduler:
            with open_dask(machine, folder=serving.workspace, networks=True):  # fails now rather than in the first run
                pass
        yield None  # each run starts the cluster of a file, which its command has checked
        return
    dashboard = serving.port and serving.port + 2
    key = Workspace(serving.workspace).prefect_home / "dask.pem"
    with standing_cluster(machine, gpus=gpus_wanted(True, machine), key=key, dashboard_port=dashboard) as cluster:
        gpus = cluster.served.gpus
        say(f"workers: {len(cluster.cluster.worker_spec) - gpus} on CPUs, {gpus} on GPUs")
        yield cluster


def _environment(serving: Serving, machine: Machine, cluster: StandingCluster | None, report: str) -> dict[str, str]:
    """Make the environment of runs: settings that end with desra serve, unlike the parameters of deployments."""
    from flows.desra_flow import WEBHOOK
    from tasks.run_end import REPORT

    # Cached results go to the folder in which desra serve deletes old ones, also with a configured server.
    storage = Workspace(serving.workspace).prefect_home / "storage"
    environment = {REPORT: report, "PREFECT_LOCAL_STORAGE_PATH": str(storage)}
    if cluster:
        environment |= cluster.environment
    if machine.log_format == "json":  # Prefect's lines are not JSON; they are on the server
        environment[CONSOLE] = "CRITICAL"
    if serving.webhook:
        environment[WEBHOOK] = serving.webhook
    return environment


def _mark_stopped(pool: str) -> None:
    """Report to the server that the runs of a pool were stopped."""
    with contextlib.suppress(UsageError), connected() as client:
        for name in schedules.mark_interrupted(pool, client, "desra serve was stopped"):
            say(f"warning: {name} was cut off; the next start goes on with it", run=name)


def _check(serving: Serving) -> None:
    """Check that the models can be used, at the start rather than in the first run at night."""
    check_mining(serving)
    if serving.finetune_after or serving.cycle_at != "never":
        check_training(serving, mining_of(serving))


def _check_there(workspace: Workspace) -> None:
    if not workspace.exists():
        raise UsageError(workspace.root, "is no workspace any more", "bring it back and start desra serve again")


def _say_when(serving: Serving, deployments: list[schedules.Deployed]) -> None:
    """Print when each flow runs next."""
    when = {"mine": serving.mine_at, "cycle": serving.cycle_at, "finetune": "on demand"}
    if serving.finetune_after:
        when["finetune"] += f", and after {serving.finetune_after} new images with artifacts"
    with connected() as client:
        for deployed in deployments:
            moment = schedules.next_run(deployed, client)
            then = f", next on {moment:%Y-%m-%d at %H:%M:%S %Z}" if moment else ", paused" * bool(deployed.schedules)
            say(f"{deployed.full_name}: {when[deployed.flow]}{then}")
    say("Ctrl-C stops; the next start resumes the running runs")


def _tidy_runs(workspace: Workspace, pool: str, *, own: bool) -> None:
    """Replace runs that have ended without a report to the server; drop the runs that have piled up."""
    try:
        with connected() as client:
            schedules.drop_missed(pool, client, settled=_SETTLED)
            if not workspace.owner():
                _replace_dead(pool, workspace, client, "the run died", own=own, settled=_SETTLED)
    except UsageError as error:
        say(f"warning: {printable(error)}")


def _replace_dead(
    pool: str, workspace: Workspace, client: SyncPrefectClient, why: str, *, own: bool, settled: timedelta | None = None
) -> None:
    """Report dead runs to the server, and submit new runs in the place of the pool's dead runs.

    A server that is not the workspace's ``own`` may know of other workspaces at the same path, on other machines.
    """
    schedules.mark_interrupted(pool, client, why, settled=settled)
    if own:
        schedules.mark_killed(workspace.root, client, settled=settled)
    for line in schedules.resume_interrupted(pool, client):
        say(line)


class Worker(Child):
    """A Prefect worker that takes the runs of a pool, one at a time.

    Args:
        pool: Name of the work pool.
        environment: Environment variables of the runs, beside those of this process.
        mark: The mark of desra serve.
        log: File for the lines of worker and runs.
    """

    name = "the Prefect worker"

    def __init__(self, pool: str, environment: dict[str, str], mark: dict[str, str], log: Path) -> None:
        super().__init__(log)
        root, moved = str(Path(__file__).resolve().parents[2]), for_other_folder()
        self._command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool,
                         "--limit", "1", "--name", schedules.WORKER + socket.gethostname()]  # fmt: skip
        self._mark = mark | {"DESRA_SERVE_PART": "runs"}
        self._environment = {CONSOLE: "INFO"} | environment | moved | {
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            # Each run has a folder of its own, and must find this desra and this Python from there.
            "PYTHONPATH": os.pathsep.join(filter(None, (root, moved.get("PYTHONPATH")))),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        }  # fmt: skip

    def start(self) -> None:
        """Start the worker; the runs of an earlier worker go on."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._spawn(self._command, os.environ | self._environment | self._mark)

    def stop(self) -> None:
        """Kill the worker with all runs."""
        end_marked(self._mark)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
