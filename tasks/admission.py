"""Give work only to workers that have the desra of the run and see the folder that it writes to."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
from distributed import Client

from desra_core.errors import AbsentError
from desra_core.files.content import scratch_in, storage_errors
from tasks import question
from tasks.logs import say

# A function, and the arguments of each of its calls.
Calls = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]

# Workers evaluate these with the source that is sent along, since their own desra may be another version.
_SOURCE = Path(question.__file__).read_text("utf-8")
_ASK = "exec(source) or refusal(*question)"
_WORK = "exec(source) or work(question, function, arguments)"


class Admission:
    """Ask the workers of a cluster, at the beginning and before each call, whether they may work for the run.

    Args:
        client: The client of the cluster.
        folder: The folder that workers write to, if they do.

    Attributes:
        refused: Addresses of the workers that may not work; a warning was printed for each.
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
            AbsentError: None of them may work.
            TransientError: The folder cannot be written to.
        """
        if self._sign:
            with storage_errors(self._sign.parent):
                self._sign.write_text(self._question[2])
        answers = self._refusals(None)
        failed = {address: answer for address, answer in answers.items() if answer is not None}
        if failed and failed.keys() == answers.keys():
            address, (reason, remedy) = next(iter(failed.items()))
            raise AbsentError(address, reason, remedy)
        for address, (reason, remedy) in failed.items():
            self._refuse(address, reason, remedy)

    def before(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Calls:
        """Make each call of a function ask its worker first; the calls return answers, which `others` reads."""
        asked = {"source": _SOURCE, "question": self._question, "function": cloudpickle.dumps(function)}
        return eval, [(_WORK, asked | {"arguments": cloudpickle.dumps(call)}) for call in calls]

    def others(self, answer: question.Answer, resources: dict[str, float]) -> dict[str, Any] | None:
        """Find out where to resubmit a call that a worker has refused, such as a worker that joined later.

        Returns:
            Dask's options for resubmitting the call to other workers; None if the worker did not refuse it.
        """
        refused, _ = answer
        if refused is None:
            return None
        self._refuse(*refused)
        able = self.able(resources)
        # Work that needs resources must stay on these workers: others that Dask would choose may lack the resource.
        return {"workers": able or None, "allow_other_workers": bool(able) and not resources}

    def able(self, resources: dict[str, float]) -> list[str]:
        """List the addresses of the workers that may do work which needs these resources."""
        there = self._client.nthreads().keys() - self.refused
        known = self._client.scheduler_info(n_workers=-1)["workers"]
        return [name for name in there & known.keys() if resources.keys() <= known[name]["resources"].keys()]

    def ask_again(self) -> None:
        """Ask the refused workers again: a folder may be back, or a new worker may have the same address."""
        answers = self._refusals([*self._client.nthreads().keys() & self.refused])
        with self._lock:
            self.refused -= {address for address, answer in answers.items() if answer is None}

    def close(self) -> None:
        """Delete the file that workers had to find in the folder."""
        if self._sign:
            self._sign.unlink(missing_ok=True)

    def _refusals(self, workers: list[str] | None) -> dict[str, tuple[str, str] | None]:
        """Return reason and remedy of each refusal by address of the worker; None for a worker that may work."""
        asked = {"source": _SOURCE, "question": self._question}
        answers = self._client.run(eval, _ASK, asked, workers=workers, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                reason = f"this worker cannot be asked ({type(answer).__name__}: {answer})"
                answers[address] = (reason, "start it again")
        return dict(answers)

    def _refuse(self, address: str, reason: str, remedy: str) -> None:
        with self._lock:
            known = address in self.refused
            self.refused.add(address)
        if not known:
            say(f"warning: {address}: {reason}; {remedy}")
