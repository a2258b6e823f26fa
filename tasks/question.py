"""Check on a worker, before each call, that it has the desra of the run and sees the folder of the results.

`tasks.dask_map.Admission` sends the source of this file, because a worker may have another desra, another Python or no
desra at all. So this file may import only the standard library and Dask.
"""

import contextlib
import hashlib
import pickle
import signal
import sys
import time
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from distributed import get_worker

# The arguments of `refusal`.
Question = tuple[str, str | None, str]
# Address, reason and remedy of a worker that refused a call, or None; the result of the call, or None.
Answer = tuple[tuple[str, str, str] | None, Any]

_PACKAGES = ("desra_core", "tasks")
_PAUSE_SECONDS = 1


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


def running_code() -> str:
    """Return the fingerprint of the code that this process runs; a later update of its files is ignored."""
    known = vars(sys.modules.setdefault("desra_question", ModuleType("desra_question")))
    if "own" not in known:  # a worker that runs an earlier version knows it by this name
        known["own"] = fingerprint()
    return str(known["own"])


def prepare_worker() -> None:
    """Let this worker ignore Ctrl-C, which is for the driver, and fingerprint its code before an update changes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running_code()


def refusal(code: str, file: str | None, content: str) -> tuple[str, str] | None:
    """Return the reason why this worker gets no work, and the remedy; None where it may work.

    Args:
        code: The fingerprint of the run's code.
        file: A file that the run has written into the folder of its results; None for a run without such a folder.
        content: The content of that file.
    """
    if (here := running_code()) != code:
        return f"this worker has {here}, this run {code}", "install the same there, and start it again"
    if file is not None:
        seen = None
        with contextlib.suppress(OSError):
            seen = Path(file).read_text()
        if seen != content:
            reason = f"this worker does not see {Path(file).parent}, where the results go"
            return reason, "have that folder there under the same path"
    return None


def work(question: Question, function: bytes, arguments: bytes) -> Answer:
    """Call a pickled function with pickled arguments, unless this worker gets no work."""
    if refused := refusal(*question):
        time.sleep(_PAUSE_SECONDS)  # else it would take and refuse all work while other workers are busy
        return (str(get_worker().contact_address), *refused), None
    return None, pickle.loads(function)(*pickle.loads(arguments))  # noqa: S301 - from the run itself
