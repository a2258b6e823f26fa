"""Check on a worker that it may work for a run: its desra, packages, files and GPU, and what it sees of the results.

`tasks.dask_map.Admission` sends the source of this file, because a worker may have another desra, another Python or no
desra at all. So this file may import only the standard library and Dask.
"""

import contextlib
import hashlib
import os
import pickle
import signal
import sys
import time
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from distributed import get_worker

# Why a worker gets no work, and what to do about it.
Refusal = tuple[str, str]
# Address, reason and remedy of a worker that did not call a function, or None; the result of the call, or None. A
# worker that has not been asked yet gives no reason.
Answer = tuple[tuple[str, str, str] | None, Any]

_PACKAGES = ("desra_core", "tasks")
_PAUSE_SECONDS = 1
# A worker remembers so many runs. One that it has forgotten asks it again.
_MOST_RUNS = 16


def fingerprint() -> str:
    """Return the version of desra on this machine and a hash of its code; a change of either may change masks."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = util.find_spec(package)
        if spec is None or spec.origin is None:
            return "no desra"
        folder = Path(spec.origin).parent
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".csv")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    try:
        version = metadata.version("desra")
    except metadata.PackageNotFoundError:
        version = "of no version"
    return f"desra {version} (code {digest.hexdigest()[:12]})"


def known() -> dict[str, Any]:
    """Return what this process remembers, under a name by which workers of other versions find it too."""
    return vars(sys.modules.setdefault("desra_question", ModuleType("desra_question")))


def running_code() -> str:
    """Return the fingerprint of the code that this process runs; a later update of its files is ignored."""
    if "own" not in known():
        known()["own"] = fingerprint()
    return str(known()["own"])


def running_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed, as this process has first found them.

    Builds of one version, such as those of torch for CPU and for CUDA, count as equal.
    """
    found: dict[str, str] = known().setdefault("versions", {"python": ".".join(map(str, sys.version_info[:2]))})
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = found.get(name) or metadata.version(name).partition("+")[0]
    return {name: found[name] for name in ("python", *packages) if name in found}


def prepare_worker() -> None:
    """Let this worker ignore Ctrl-C, which is for the driver, and fingerprint its code before an update changes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running_code()


def introduce(
    code: str, versions: dict[str, str], files: dict[str, tuple[str, bytes]], file: str | None, content: str, gpu: bool
) -> tuple[Refusal | None, str | None]:
    """Return why this worker gets no work; where it may work, None and a file that it has written for the run to read.

    Args:
        code: The fingerprint of the run's code.
        versions: The versions of Python and of the packages of the run.
        files: Files that workers read, with the hash of their content; those at URLs and in tar files also as pickled
            `desra_core.remote.Remote`.
        file: A file that the run has written into the folder of its results; None for a run without such a folder.
        content: The content of that file, and of the one that this worker writes beside it.
        gpu: Whether this worker declares a GPU that the run would use.
    """
    if (here := running_code()) != code:
        return (f"this worker has {here}, this run {code}", "install the same there, and start it again"), None
    here_too = running_versions(tuple(versions))
    for name, version in versions.items():
        if (other := here_too.get(name, "none")) != version:
            reason = f"this worker has {name} {other}, this run {version}"
            return (reason, "install the same there, and start it again"), None
    if file is not None and (refused := lost_sight(file, content)):
        return refused, None
    for path, (hashed, remote) in files.items():
        if refused := _has_another(path, hashed, remote):
            return refused, None
    if gpu and not import_module("torch").cuda.is_available():
        reason = "this worker declares a GPU, but its PyTorch sees none"
        return (reason, "see desra doctor there, or start it without --resources GPU"), None
    return _write_beside(file, content) if file is not None else (None, None)


def lost_sight(file: str, content: str) -> Refusal | None:
    """Return why this worker cannot store results now, from what it sees of a file of the run; None where it can."""
    folder, seen = Path(file).parent, None
    with contextlib.suppress(OSError):
        seen = Path(file).read_text()
    if seen != content:
        return f"this worker does not see {folder}, where the results go", "have that folder there under the same path"
    if not os.access(folder, os.W_OK):
        return f"this worker cannot write to {folder}, where the results go", "give it write access there"
    return None


def _has_another(path: str, hashed: str, remote: bytes) -> Refusal | None:
    digest, remedy = hashlib.blake2b(digest_size=16), "have photos and models there under the same paths"
    try:
        if remote:
            digest.update(pickle.loads(remote).read_bytes())  # noqa: S301 - from the run itself
        else:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    except OSError as error:
        return f"this worker cannot read {path} ({os.strerror(error.errno or 0)})", remedy
    except Exception as error:
        if not remote:
            raise
        return f"this worker cannot read {path} ({error})", "have the drivers and the credentials of the run there"
    if digest.hexdigest() != hashed:
        return f"this worker sees another file as {path}", remedy
    return None


def _write_beside(file: str, content: str) -> tuple[Refusal | None, str | None]:
    own = Path(file).with_name(f".{uuid4().hex}{Path(file).suffix}")
    try:
        own.write_text(content)
    except OSError as error:
        reason = f"this worker cannot write to {own.parent}, where the results go ({os.strerror(error.errno or 0)})"
        return (reason, "give it write access there"), None
    return None, str(own)


def admit(run: str, file: str | None, content: str) -> None:
    """Let this worker work for a run, until it does not see the folder of the results any more."""
    runs = known().setdefault("runs", {})
    runs[run] = partial(work, file, content)
    for old in list(runs)[:-_MOST_RUNS]:
        runs.pop(old, None)


def work(file: str | None, content: str, function: bytes, arguments: bytes) -> Answer:
    """Call a pickled function with pickled arguments, unless this worker cannot store results now."""
    if file is not None and (refused := lost_sight(file, content)):
        time.sleep(_PAUSE_SECONDS)  # else it would take and refuse all work while other workers are busy
        return (str(get_worker().contact_address), *refused), None
    return None, pickle.loads(function)(*pickle.loads(arguments))  # noqa: S301 - from the run itself
