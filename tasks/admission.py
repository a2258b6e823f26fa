"""Give work only to workers that have the desra of the run and see the folder that it writes to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
from distributed import Client

from desra_core.errors import AbsentError
from desra_core.files.atomic import scratch_in, storage_errors
from tasks import question
from tasks.logs import say

# A function, and the arguments of each of its calls.
Calls = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]

# Evaluated on a worker without its own desra, which may be another version.
_SOURCE = Path(question.__file__).read_text("utf-8")
_ASK = "exec(source) or refusal(*question)"
_WORK = "exec(source) or work(question, function, arguments)"


class Admission:
    """Ask the workers of a cluster, at the beginning and before each call, whether they may work for the run.

    Args:
        client: Of the cluster.
        folder: Where workers write, if they do.

    Attributes:
        refused: Addresses of the workers that failed it last; a warning was printed for each.
    """

    def __init__(self, client: Client, folder: Path | None) -> None:
        self._client = client
        content = uuid4().hex
        self._sign = scratch_in(folder.absolute()) if folder else None
        self._question = (question.own(), str(self._sign) if self._sign else None, content)
        self.refused: set[str] = set()
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Ask all present workers.

        Raises:
            AbsentError: All fail.
            TransientError: The folder cannot be written to.
        """
        if self._sign:
            with storage_errors(self._sign.parent):
                self._sign.write_text(self._question[2])
        answers = self._answers(None)
        failed = {address: _reason(answer) for address, answer in answers.items() if answer is not None}
        if failed and failed.keys() == answers.keys():
            address, (reason, remedy) = next(iter(failed.items()))
            raise AbsentError(address, reason, remedy)
        for address, (reason, remedy) in failed.items():
            self._refuse(address, reason, remedy)

    def before(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """Put the question before calls of a function; their results are answers, to be given to `others`."""
        asked = {"source": _SOURCE, "question": self._question, "function": cloudpickle.dumps(function)}
        return eval, [(_WORK, asked | {"arguments": cloudpickle.dumps(call)}) for call in calls]

    def others(self, answer: question.Answer, resources: dict[str, float]) -> dict[str, Any] | None:
        """Say where to resubmit a call that a worker has refused, as one may that joined later.

        Returns:
            Options for resubmitting the task, with its resources, to other workers; None if this worker did it.
        """
        refused, _ = answer
        if refused is None:
            return None
        self._refuse(*refused)
        able = self.able(resources)
        # Work with resources must stay on these: among others Dask would also choose workers without the resource.
        return {"workers": able or None, "allow_other_workers": bool(able) and not resources}

    def able(self, resources: dict[str, float]) -> list[str]:
        """List the addresses of the workers that may do work which needs these resources."""
        there = self._client.nthreads().keys() - self.refused
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        return [name for name in there & known.keys() if resources.keys() <= known[name]["resources"].keys()]

    def ask_again(self) -> None:
        """Ask the refused workers again: a folder may be back, or a new worker may have the address of an old one."""
        answers = self._answers([*self._client.nthreads().keys() & self.refused])
        with self._lock:
            self.refused -= {address for address, answer in answers.items() if answer is None}

    def close(self) -> None:
        """Delete the file in the folder by which workers were asked."""
        if self._sign:
            self._sign.unlink(missing_ok=True)

    def _answers(self, workers: list[str] | None) -> dict[str, Any]:
        asked = {"source": _SOURCE, "question": self._question}
        answers: dict[str, Any] = self._client.run(eval, _ASK, asked, workers=workers, on_error="return")
        return answers

    def _refuse(self, address: str, reason: str, remedy: str) -> None:
        with self._lock:
            known = address in self.refused
            self.refused.add(address)
        if not known:
            say(f"warning: {address}: {reason}; {remedy}")


def _reason(answer: Any) -> tuple[str, str]:
    if isinstance(answer, Exception):
        return f"this worker cannot be asked ({type(answer).__name__}: {answer})", "start it again"
    reason, remedy = answer
    return reason, remedy
