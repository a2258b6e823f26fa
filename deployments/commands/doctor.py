"""``desra doctor``: tell what is installed, what this machine gives to runs, and what to do about problems."""

import contextlib
import os
import platform
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import psutil
import typer

from deployments import check
from deployments.commands.flags import AsJson
from deployments.commands.runs import show_json
from deployments.commands.workspace import bytes_in_words
from deployments.serving.connection import CONSOLE, check_server, connected
from deployments.serving.server import HISTORY, Server, cache_folder, is_full, temporary_folder
from desra_core import __version__
from desra_core.errors import DesraError, described, printable
from desra_core.evaluation.table import counted
from desra_core.files import locked, scratch_in, storage_errors
from desra_core.gpu import exact_on, is_unusable, lacks_memory
from desra_core.settings import Machine
from desra_core.workspace import Workspace

_PATIENCE_SECONDS = 60.0
_END_SECONDS = 20.0
# Below this, a run of some hundred photos may fill the disk.
_LITTLE_BYTES = 2 * 10**9
_REQUIREMENT = re.compile(r"([\w.-]+).*\bextra *== *[\"']([\w.-]+)[\"']")
# The files by which the kernel shows that a driver of NVIDIA is loaded.
_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


class Finding(NamedTuple):
    """What a check has found; a note or a problem may say what to do."""

    level: Literal["ok", "note", "problem"]
    subject: str
    fact: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding for people."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return printable(f"{self.level:<8} {self.subject:<15} {self.fact}{remedy}")


Check = Callable[[], Iterator[Finding]]


def doctor(
    workspace: Annotated[Path | None, typer.Option(help="Check this workspace, too, or the place for one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: installed packages, GPUs, memory, disks, and whether Prefect and Dask start.

    A line each: ok, note (worth knowing; runs do without it) or problem (with what to do). Exit code 2 where there is a
    problem. --json prints one object: problems (their number) and findings (level, subject, fact and remedy of each).
    """
    os.environ.setdefault(CONSOLE, "CRITICAL")  # the findings are the lines to read
    found = []
    background = _Background()
    try:
        for subject, each in _checks(workspace, background):
            for finding in _carried_out(subject, each):
                found.append(finding)
                if not as_json:
                    typer.echo(finding.line)
    finally:
        background.close()
    problems = sum(finding.level == "problem" for finding in found)
    if as_json:
        show_json({"problems": problems, "findings": [each._asdict() for each in found]})
    else:
        typer.echo(counted(problems, "problem") if problems else "no problems")
    if problems:
        raise typer.Exit(2)


def _checks(workspace: Path | None, background: "_Background") -> Iterator[tuple[str, Check]]:
    """Yield the checks, each with its subject; those that take seconds begin early."""
    if url := os.environ.get("PREFECT_API_URL"):
        prefect = partial(_configured_server, url)
    else:
        prefect = partial(_in_time, "Prefect server", background.open(_own_server(background.over)))
    yield "software", _software
    yield "extras", _extras
    yield "libraries", _libraries
    if workspace is not None:
        yield "workspace", partial(_workspace, Workspace(workspace.absolute()))
    yield "temporary files", partial(_folder, "temporary files", temporary_folder())
    yield "cache", _cache
    yield "bfloat16", _bfloat16  # imports Prefect and Dask, which should not be imported on two threads at once
    worker = background.open(_own_worker())
    yield "torch", _torch
    yield "GPU", _gpus
    yield "cores", _cores
    yield "memory", _memory
    yield "Dask worker", partial(_in_time, "Dask worker", worker)
    yield "Prefect server", prefect


def _carried_out(subject: str, each: Check) -> Iterator[Finding]:
    """Yield the findings of a check; a check that fails is a problem."""
    try:
        yield from each()
    except DesraError as error:
        yield Finding("problem", subject, f"{error.subject}: {error.reason}", error.remedy)
    except Exception as error:  # noqa: BLE001 - whatever fails is what the user wants to know
        yield Finding("problem", subject, f"the check failed ({described(error)})", "mend that, or install desra again")


def _software() -> Iterator[Finding]:
    yield Finding("ok", "desra", __version__)
    yield Finding("ok", "Python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("ok", "Prefect", version("prefect"))
    yield Finding("ok", "Dask", f"{version('dask')}, distributed {version('distributed')}")


def _extras() -> Iterator[Finding]:
    """Compare each extra of the installed package with the packages that are there."""
    about = metadata("desra")
    needed: dict[str, list[str]] = {name: [] for name in about.get_all("Provides-Extra") or ()}
    for requirement in about.get_all("Requires-Dist") or ():
        if match := _REQUIREMENT.match(requirement):
            needed[match[2]].append(match[1])
    for extra, names in needed.items():
        if "desra" in names:  # an extra that is made of others
            continue
        there, missing = [], []
        for name in names:
            try:
                there.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            yield Finding("note", extra, f"without {', '.join(missing)}", f"to add it: pip install 'desra[{extra}]'")
        else:
            yield Finding("ok", extra, ", ".join(there))


def _libraries() -> Iterator[Finding]:
    problems = check.platform_problems()
    for problem in problems:
        fact, _, remedy = problem.partition(": ")
        yield Finding("problem", "libraries", fact, remedy)
    if not problems:
        yield Finding("ok", "libraries", "the system has those that desra needs")


def _workspace(workspace: Workspace) -> Iterator[Finding]:
    with storage_errors(workspace.root):
        workspace.check_content()
    if os.path.lexists(workspace.root):
        owner = workspace.owner()
        yield Finding("note" if owner else "ok", "workspace", f"is in use by {owner}" if owner else "no run holds it")
        place = workspace.root
    else:
        yield Finding("note", "workspace", f"{workspace.root} does not exist; a run would make it")
        place = next(folder for folder in workspace.root.parents if folder.exists())
    yield from _folder("workspace", place)


def _folder(subject: str, folder: Path) -> Iterator[Finding]:
    """Write a file to a folder, lock it, and look how much space is left."""
    probe = scratch_in(folder)
    with storage_errors(folder):
        try:
            with locked(probe, {"pid": os.getpid()}):
                pass
        finally:
            probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    fact = f"{folder} can be written and locked, {bytes_in_words(free)} free"
    if is_full(folder):
        yield Finding("problem", subject, fact, "free some space")
    elif free < _LITTLE_BYTES:
        yield Finding("note", subject, fact, "that is little for the results of a run")
    else:
        yield Finding("ok", subject, fact)


def _cache() -> Iterator[Finding]:
    """Check the user's cache, without which each new workspace takes some seconds longer."""
    folder = cache_folder()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        yield from _folder("cache", there)
    except DesraError as error:
        yield Finding("note", "cache", f"{there} {error.reason}, so new workspaces start slower", "set XDG_CACHE_HOME")


def _torch() -> Iterator[Finding]:
    import torch

    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("ok", "torch", f"{torch.__version__}, {cuda}")


def _bfloat16() -> Iterator[Finding]:
    from flows.desra_flow import bfloat16_share

    if share := bfloat16_share():
        yield Finding("ok", "bfloat16", f"this CPU is fast in it: --precision bfloat16 takes about {share} of the time")
    else:
        yield Finding("note", "bfloat16", "this CPU has no instructions for it: stay with float32")


def _gpus() -> Iterator[Finding]:
    import torch

    from tasks.dask_cluster import gpus_wanted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where a driver is too old; `_without_gpu` has its reason
        count = gpus_wanted(True, Machine())
    if not count:
        yield _without_gpu()
    for index in range(count):
        try:
            with exact_on(f"cuda:{index}"):
                about = torch.cuda.get_device_properties(index)
                torch.ones(8, 8, device=f"cuda:{index}").mm(torch.ones(8, 8, device=f"cuda:{index}")).cpu()
        except RuntimeError as error:
            remedy = "see nvidia-smi, and start the machine again if it shows an error"
            if is_unusable(error):
                remedy = "install a torch for this GPU and its driver, or hide it by CUDA_VISIBLE_DEVICES"
            elif lacks_memory(error):
                remedy = "see in nvidia-smi which process has its memory"
            yield Finding("problem", f"GPU {index}", described(error), remedy)
        else:
            yield Finding("ok", f"GPU {index}", f"{about.name}, {bytes_in_words(about.total_memory)}")


def _without_gpu() -> Finding:
    """Say why torch sees no GPU: a problem only where a driver is there."""
    import torch

    if not torch.version.cuda:
        return Finding("note", "GPU", "none that this torch could use: networks run on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("note", "GPU", "hidden by CUDA_VISIBLE_DEVICES: networks run on the CPU")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "torch sees none"
    except (RuntimeError, AssertionError) as error:
        reason = described(error)
    if any(os.path.exists(driver) for driver in _DRIVERS):
        return Finding("problem", "GPU", reason, "see nvidia-smi; the driver must be new enough for the CUDA of torch")
    remedy = "where there is a GPU, install its driver"
    return Finding("note", "GPU", f"torch has CUDA, but there is no driver: networks run on the CPU ({reason})", remedy)


def _cores() -> Iterator[Finding]:
    from tasks.dask_cluster import threads_of

    yield Finding("ok", "cores", f"{threads_of(1)} of {os.cpu_count()} for this process")


def _memory() -> Iterator[Finding]:
    from tasks.dask_cluster import NETWORK_WORKER_BYTES, granted_memory, share_of

    memory, limit = psutil.virtual_memory(), granted_memory()
    limited = f", limited to {bytes_in_words(limit)}" if limit < memory.total else ""
    share = share_of(Machine(), NETWORK_WORKER_BYTES, 0)
    fact = (
        f"{bytes_in_words(memory.total)}{limited}, {bytes_in_words(memory.available)} available: a run starts "
        f"{counted(share.workers, 'worker')} of {bytes_in_words(share.memory)}"
    )
    if memory.available < NETWORK_WORKER_BYTES:
        yield Finding("note", "memory", fact, "end other programs, or a run may lack memory")
    else:
        yield Finding("ok", "memory", fact)


class _Background:
    """Open contexts on daemon threads, which close them once this is over: a stopped process waits for none."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._threads: list[threading.Thread] = []

    def open(self, context: AbstractContextManager[object]) -> Future[None]:
        """Enter a context manager; the future tells when that is done, or its error."""
        entered: Future[None] = Future()

        def hold() -> None:
            try:
                with context:
                    entered.set_result(None)
                    self.over.wait()
            except BaseException as error:  # noqa: BLE001 - raised by the check
                if not entered.done():
                    entered.set_exception(error)

        self._threads.append(threading.Thread(target=hold, daemon=True))
        self._threads[-1].start()
        return entered

    def close(self) -> None:
        """Close all contexts, and give up waiting after some seconds."""
        self.over.set()
        for thread in self._threads:
            thread.join(_END_SECONDS)


@contextlib.contextmanager
def _own_server(unwanted: threading.Event) -> Iterator[None]:
    """Run a Prefect server as runs do, in a temporary workspace; once it is unwanted, it need not start any more."""
    with tempfile.TemporaryDirectory(prefix="desra-doctor-", ignore_cleanup_errors=True) as folder:
        server = Server(Workspace(Path(folder)), history=HISTORY)
        server.unwanted = unwanted
        with server.running():
            yield


@contextlib.contextmanager
def _own_worker() -> Iterator[None]:
    """Start a Dask worker as runs do, and have it answer."""
    from tasks.dask_cluster import open_dask

    with open_dask(Machine(workers=1), alone=True) as dask:
        dask.call(os.getpid, resources={})
        yield


def _configured_server(url: str) -> Iterator[Finding]:
    """Ask the server that PREFECT_API_URL names for something that it tells only with the key."""
    check_server(url)
    with connected() as client:
        yield Finding("ok", "Prefect server", f"PREFECT_API_URL answers, version {client.api_version()}")


def _in_time(subject: str, entered: Future[None]) -> Iterator[Finding]:
    """Wait for something that starts (raises its errors)."""
    if wait([entered], timeout=_PATIENCE_SECONDS).done:
        entered.result()
        yield Finding("ok", subject, "starts and answers")
    else:
        reason = f"has not answered for {_PATIENCE_SECONDS:.0f} s"
        yield Finding("problem", subject, reason, "see what keeps this machine busy, and try again")
