"""`desra serve`: what one machine needs for runs that start by themselves.

::

    desra serve ── Prefect server           unless PREFECT_API_URL names one
                ├─ the report's server      its address is what runs link to
                ├─ Dask scheduler, workers  for all runs; their address is in the environment of the runs
                └─ Prefect worker           takes runs from the work pool of the workspace, one at a time
                   └─ a process per run

A run may be killed at any moment, and the next one goes on with what it left. So stopping is: kill the runs, tell the
server. Of these processes, those that end by themselves are started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING

import httpx

from deployments.serving.interrupted import drop_missed, ended_since, mark_interrupted, mark_killed, resume_interrupted
from deployments.serving.report_server import report_server
from deployments.serving.retention import forget_results
from deployments.serving.schedules import Deployed, deployments_of, next_run, register
from deployments.serving.server import Server, check_server, check_temporary, end_leftover_server, watch_at
from deployments.serving.standing import RestlessError, Served, Standby, standing, start_again
from deployments.serving.worker import CONSOLE, NAME, Worker, prefect_worker
from desra_core.errors import DesraError, UsageError, printable
from desra_core.gate.cycle import check_training, mining_of
from desra_core.planning.keys import check_kind, check_models, target_of
from desra_core.settings import Machine
from desra_core.settings.serving import Serving, parse_span
from desra_core.workspace import Workspace
from tasks.logs import say

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

    from tasks.dask_cluster import StandingCluster

_POLL_SECONDS = 1.0
_TELL_SECONDS = 10.0
_LOOK_SECONDS = 60.0
_HOUSEKEEPING_SECONDS = 86400.0
# A run that is new to the worker has no process yet.
_SETTLED = timedelta(minutes=2)
# A server that does not answer must keep nobody from stopping.
_ANSWER_SECONDS, _MOST_RETRIES = 20, 1


def serve(serving: Serving, machine: Machine) -> int:
    """Serve a corpus until somebody stops it; returns the exit code.

    Raises
    ------
    UsageError
        A setting, a folder or a model cannot be used; the workspace is in use, or served by another process.
    """
    if not serving.photos.is_dir():
        raise UsageError(serving.photos, "does not exist", "name the folder that photos come to")
    workspace = Workspace(serving.workspace)
    is_new = not workspace.exists()
    if is_new:
        _check(serving)  # checked first, so that a refused start leaves no new workspace
    workspace.create()
    deployments = deployments_of(serving, machine)
    pool = deployments[0].work_pool
    with _stoppable(), contextlib.ExitStack() as stack:
        own = stack.enter_context(standing(workspace))
        with workspace.locked():
            end_leftover_server(workspace)
            if not is_new:
                _check(serving)
            check_temporary()
            say("starting Prefect and the workers, which takes some seconds")
            os.environ.setdefault(CONSOLE, "CRITICAL")
            server = stack.enter_context(_open_server(serving, workspace, own.mark))
            _prepare_server(deployments, workspace, own=server is not None)
            url = os.environ["PREFECT_API_URL"]
            own.announce(Served(url, own=server is not None), parse_span(serving.history))
        report = stack.enter_context(report_server(workspace, serving.port and serving.port + 1))
        cluster = stack.enter_context(_open_cluster(serving, machine))
        environment = _environment(serving, machine, cluster, report)
        worker = stack.enter_context(_open_worker(workspace, pool, environment, own.mark))
        outcomes = _Outcomes(pool)
        stack.callback(outcomes.tell)  # of runs that end just before it stops
        _tell_people(serving, deployments, url, report)
        with _giving_up(serving):
            _look_after(server, worker, cluster, serving, outcomes)
    return 0


@contextlib.contextmanager
def _giving_up(serving: Serving) -> Iterator[None]:
    """Tell the webhook if desra serve ends by an error, be it a mistake of its own: from then on no run would."""
    from flows.webhook import WEBHOOK, tell_webhook

    try:
        yield
    except Exception as error:
        address = serving.webhook or os.environ.get(WEBHOOK)
        line = f"desra serve has ended: {printable(error)}"
        told = {"text": f"{serving.title}: {line}", "deployment": serving.title, "message": line}
        if address and (trouble := tell_webhook(address, told | {"workspace": str(serving.workspace)})):
            say(f"warning: {trouble}")
        raise


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end what is inside, once: more of them do not disturb the ending."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup does
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
def _open_server(serving: Serving, workspace: Workspace, mark: dict[str, str]) -> Iterator[Server | None]:
    """Have a Prefect server: the one that is configured, or one in the workspace."""
    if configured := os.environ.get("PREFECT_API_URL"):
        check_server(configured)
        yield None
        return
    server = Server(workspace, port=serving.port, history=parse_span(serving.history), mark=mark)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _open_cluster(serving: Serving, machine: Machine) -> Iterator[StandingCluster | None]:
    """Have a Dask cluster on this machine, where none elsewhere is given."""
    from tasks.dask_cluster import standing_cluster
    from tasks.dask_map import open_dask
    from tasks.stages import gpus_wanted

    if machine.scheduler:
        with open_dask(machine, folder=serving.workspace, networks=True):  # told now rather than by the first run
            pass
        yield None
        return

    dashboard = serving.port and serving.port + 2
    key = Workspace(serving.workspace).prefect_home / "dask.pem"
    with standing_cluster(machine, gpus=gpus_wanted(True, machine), key=key, dashboard_port=dashboard) as cluster:
        say(f"workers: {cluster.workers - cluster.gpus} on CPUs, {cluster.gpus} on GPUs")
        yield cluster


def _environment(serving: Serving, machine: Machine, cluster: StandingCluster | None, report: str) -> dict[str, str]:
    """What runs are told beside their parameters: all that ends with desra serve."""
    from flows.webhook import WEBHOOK
    from tasks.overview import REPORT

    # Of cached results: where they are forgotten in time, whatever server it is.
    storage = Workspace(serving.workspace).prefect_home / "storage"
    environment = {REPORT: report, "PREFECT_LOCAL_STORAGE_PATH": str(storage)}
    if cluster:
        environment |= cluster.environment
    if machine.log_format == "json":  # of which Prefect's lines are none; they are on the server
        environment[CONSOLE] = "CRITICAL"
    if serving.webhook:
        environment[WEBHOOK] = serving.webhook
    return environment


@contextlib.contextmanager
def _open_worker(
    workspace: Workspace, pool: str, environment: dict[str, str], mark: dict[str, str]
) -> Iterator[Worker]:
    """Have a worker that takes runs, and see at the end that the server knows what became of them."""
    try:
        with prefect_worker(pool, environment, mark, workspace.prefect_home / "worker.log") as worker:
            yield worker
    finally:
        with contextlib.suppress(UsageError), _client() as client:
            for name in mark_interrupted(pool, client, "desra serve was stopped"):
                say(f"warning: {name} was cut off; the next start goes on with it", run=name)


def _check(serving: Serving) -> None:
    """See now, not at two in the night, that models can be used."""
    workspace, mining = Workspace(serving.workspace), mining_of(serving)
    check_kind(workspace, mining)
    target, _ = target_of(mining)
    check_models(workspace, mining, target)
    if serving.finetune_after or serving.cycle_at != "never":
        check_training(serving, mining)


@contextlib.contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """Talk to the server.

    Raises
    ------
    UsageError
        It does not answer, or as it should not.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    patience = {PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS, PREFECT_CLIENT_MAX_RETRIES: _MOST_RETRIES}
    try:
        with temporary_settings(patience), get_client(sync_client=True) as client:
            yield client
    except (httpx.HTTPError, PrefectException, ValueError) as error:  # a proxy answers with a page that is no JSON
        reason = f"the Prefect server does not do what it is asked ({printable(error) or type(error).__name__})"
        raise UsageError(os.environ.get("PREFECT_API_URL"), reason, "see its log, and whether it wants a key") from None


def _prepare_server(deployments: list[Deployed], workspace: Workspace, *, own: bool) -> None:
    """Register the deployments, and put an end to runs that were killed. The workspace must be locked.

    Parameters
    ----------
    deployments
        Of the workspace.
    workspace
        Whose runs.
    own
        Whether the server is that of the workspace: one that several machines use may know of other workspaces at the
        same path.
    """
    pool = deployments[0].work_pool
    with _client() as client:
        _check_alone(pool, client)
        register(deployments, client, own=own)
        drop_missed(pool, client, settled=_SETTLED)
        _replace_dead(pool, workspace, client, "desra serve was killed", own=own)


def _replace_dead(
    pool: str,
    workspace: Workspace,
    client: SyncPrefectClient,
    why: str,
    *,
    own: bool,
    settled: timedelta | None = None,
) -> None:
    """Tell the server which runs are dead, and why, and submit others in the place of those of the pool."""
    mark_interrupted(pool, client, why, settled=settled)
    if own:
        mark_killed(workspace.root, client, settled=settled)
    for line in resume_interrupted(pool, client):
        say(line)


def _check_alone(pool: str, client: SyncPrefectClient) -> None:
    """See that nobody else takes runs of the pool: each would think that the runs of the other one are dead."""
    from prefect.exceptions import ObjectNotFound

    with contextlib.suppress(ObjectNotFound):
        for worker in client.read_workers_for_work_pool(client.read_work_pool(pool).name):
            online = worker.status is not None and worker.status.value == "ONLINE"
            if online and worker.name != NAME + socket.gethostname():
                remedy = "stop that one, which the server notices after two minutes, or give another --name"
                raise UsageError(f"the work pool {pool}", f"has another worker already ({worker.name})", remedy)


def _tell_people(serving: Serving, deployments: list[Deployed], url: str, report: str) -> None:
    """Say where to look, and what happens when."""
    when = {"mine": serving.mine_at, "cycle": serving.cycle_at, "finetune": "on demand"}
    if serving.finetune_after:
        when["finetune"] += f", and after {serving.finetune_after} new images with artifacts"
    say(f"watch at {watch_at(Workspace(serving.workspace), url)}")
    say(f"the report is at {report}")
    with _client() as client:
        for deployed in deployments:
            moment = next_run(deployed, client)
            following = (
                f", next on {moment:%Y-%m-%d at %H:%M:%S %Z}" if moment else ", paused" if deployed.schedules else ""
            )
            say(f"{deployed.full_name}: {when[deployed.flow]}{following}")
    say("Ctrl-C stops; the next start goes on with what was running")


def _look_after(
    server: Server | None, worker: Worker, cluster: StandingCluster | None, serving: Serving, outcomes: _Outcomes
) -> None:
    """Start again what ends by itself, find runs that have died, clean up; until a signal comes.

    Raises
    ------
    UsageError
        A process ends again and again, or the workspace has vanished, perhaps with the disk that it is on: what is
        started then would make another one in its place.
    """
    workspace, history = Workspace(serving.workspace), parse_span(serving.history)
    processes: list[Standby] = [server, worker] if server else [worker]
    starts: dict[str, list[float]] = {process.name: [] for process in processes}
    looked = cleaned = told = time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        for process in processes:
            if process.exit_code is not None:
                _check_there(workspace)
                try:
                    start_again(process, starts[process.name], now, time.sleep)
                except RestlessError:
                    raise
                except (DesraError, OSError) as error:
                    say(f"warning: {printable(error)}")  # the next look finds that it has ended
        if now - told >= _TELL_SECONDS:
            told = now
            outcomes.tell()
        if now - looked >= _LOOK_SECONDS:
            looked = now
            _check_there(workspace)
            _tidy_runs(workspace, outcomes.pool, own=server is not None)
            if cluster:
                cluster.keep_up()
        if now - cleaned >= _HOUSEKEEPING_SECONDS:
            cleaned = now
            forget_results(workspace.prefect_home, history)


class _Outcomes:
    """Says how each run of a pool has ended, by the word of the server: one that was killed says nothing itself."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._latest = datetime.now(UTC)
        self._told: set[tuple[UUID, datetime | None]] = set()  # a run that is tried again ends twice

    def tell(self) -> None:
        with contextlib.suppress(UsageError), _client() as client:  # what does not answer is told elsewhere
            for run in ended_since(self.pool, client, self._latest):
                if (end := (run.id, run.end_time)) in self._told or run.state is None:
                    continue
                self._told.add(end)
                self._latest = run.end_time or self._latest
                level = "" if run.state.is_completed() else "warning: " if run.state.is_cancelled() else "error: "
                name = (run.state.name or run.state.type.value).lower()
                why = printable(run.state.message or "no reason is known")
                say(f"{level}{printable(run.name)} {name}: {why}", run=run.name)


def _check_there(workspace: Workspace) -> None:
    if not workspace.exists():
        raise UsageError(workspace.root, "is no workspace any more", "bring it back and start desra serve again")


def _tidy_runs(workspace: Workspace, pool: str, *, own: bool) -> None:
    """Go on with runs that have ended without the server's knowing, as when it was down; drop what has piled up.

    Parameters
    ----------
    workspace, pool
        Whose runs.
    own
        As for `_prepare_server`.
    """
    try:
        with _client() as client:
            drop_missed(pool, client, settled=_SETTLED)
            if workspace.owner():
                return
            _replace_dead(pool, workspace, client, "the run died", own=own, settled=_SETTLED)
    except UsageError as error:
        say(f"warning: {printable(error)}")
