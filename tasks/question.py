"""What a worker is asked before each piece of work: whether it has our desra, and sees the folder of the results.

This file travels as source, for a worker may have another desra, another Python or no desra at all: it may import
nothing but what each of them has. `tasks.admission` asks.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import time
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from distributed import get_worker

# The fingerprint of the run, and a file with its content that shows whose folder a worker sees, if there is one.
Question = tuple[str, str | None, str]
# Address, reason and remedy of a worker that gets no work, or what the work has come to.
Answer = tuple[tuple[str, str, str] | None, Any]

_PACKAGES = ("desra_core", "tasks")
_PAUSE_SECONDS = 1


def fingerprint() -> str:
    """Tell the version of desra on this machine, and of its code: both change what masks come out."""
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


def own() -> str:
    """The fingerprint of the code that this process runs: taken once, whatever is installed later."""
    known = vars(sys.modules.setdefault("desra_question", ModuleType("desra_question")))
    if "own" not in known:
        known["own"] = fingerprint()
    return str(known["own"])


def refusal(ours: str, sign: str | None, content: str) -> tuple[str, str] | None:
    """Say why this worker gets no work, and what to do about that; None where nothing is wrong."""
    if (theirs := own()) != ours:
        return (
            f"this worker has {theirs}, this run {ours}",
            "install the same there, and start it again",
        )
    if sign is not None:
        try:
            seen = Path(sign).read_text()
        except OSError:
            seen = ""
        if seen != content:
            reason = f"this worker does not see {Path(sign).parent}, where the results go"
            return reason, "have that folder there under the same path"
    return None


def work(question: Question, function: bytes, arguments: bytes) -> Answer:
    """Call a pickled function with pickled arguments, if this worker gets work."""
    if refused := refusal(*question):
        time.sleep(_PAUSE_SECONDS)  # or it would take all that others have no time for
        return (str(get_worker().contact_address), *refused), None
    return None, pickle.loads(function)(*pickle.loads(arguments))  # noqa: S301 - from the run itself
