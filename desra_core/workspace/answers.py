"""What raters have answered in `desra review`: a file of lines for each rater, which only grows.

A line is a JSON object, and is on the disk before the page goes on. A line that a kill has cut off is no answer:
readers leave it out, and the next answer takes its place. Nothing is changed afterwards: what a rater takes back stays,
and a line of the kind ``undo`` names it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from desra_core.errors import LockedError, UsageError
from desra_core.files import locked, paths_in, reading_errors, storage_errors, sync_path, this_machine
from desra_core.workspace import Workspace

Kind = Literal["decision", "rating"]
Box = tuple[int, int, int, int]  # x, y, width and height of a region, in pixels of the result

ANSWERS: dict[Kind, tuple[str, ...]] = {
    "decision": ("accept", "reject", "unsure", "clean", "drawn"),
    "rating": ("yes", "no"),
}
_RATER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SIDES = ("x", "y", "width", "height")
_LARGEST_RADIUS, _MOST_POINTS = 500, 20_000
_FARTHEST = 2**24  # from the origin, in pixels


class Stroke(NamedTuple):
    """A stroke of the brush, or of the eraser: the pixels whose distance to the line through the points is small."""

    points: tuple[tuple[int, int], ...]  # x and y, in pixels of the result
    radius: int
    erase: bool = False

    def is_drawable(self) -> bool:
        """Check whether it has points, not too many of them, and is not too wide."""
        return 0 <= self.radius <= _LARGEST_RADIUS and 0 < len(self.points) <= _MOST_POINTS


@dataclass(frozen=True)
class Answer:
    """What a rater has answered about a region, or about a whole image."""

    rater: str
    kind: Kind
    id: str  # of the image
    name: str  # of the image
    gan_sr_key: str | None  # of the model on whose result the region lies; None for results in files
    mask_key: str | None  # of the settings under which the region was found
    box: Box | None  # of the region; None where the answer is about the whole image
    area: int | None  # of the region, in pixels
    answer: str  # see `ANSWERS`; ``drawn`` is a stroke
    check: str | None = None  # the known answer, where the region was mixed in as a check: it decides nothing
    stroke: Stroke | None = None
    time: str = ""  # UTC, ISO 8601; set when it is written
    line: int = field(default=0, compare=False)  # of the file, from 1; set when it is read or written

    @property
    def key(self) -> tuple[str, Box | None]:
        """What it is about: the id of the image, and the box of the region."""
        return self.id, self.box


class Noticed(NamedTuple):
    """How many raters have rated a region, and how many of them have noticed that something is wrong."""

    yes: int
    raters: int


def check_rater(rater: str) -> str:
    """Check that a rater's name may name a file; returns it.

    Raises:
        UsageError: It may not.
    """
    if _RATER.fullmatch(rater) is None:
        raise UsageError("--rater", f"{rater!r} is no name for a file", "take 1 to 64 of A-Z, a-z, 0-9, dot, _ and -")
    return rater


def raters(workspace: Workspace) -> list[str]:
    """List the raters who have a file of answers, sorted."""
    names = (path.stem for path in paths_in(workspace.review, "*.jsonl"))
    return [name for name in names if _RATER.fullmatch(name)]


def read_answers(workspace: Workspace, rater: str) -> list[Answer]:
    """Read the answers of a rater that stand, in their order; those that were undone are left out.

    Raises:
        UsageError: A line is damaged.
        TransientError: The file cannot be read now.
    """
    path = workspace.answers(rater)
    try:
        with reading_errors(path):
            data = path.read_bytes()
    except FileNotFoundError:
        return []
    # None in place of a damaged line that somebody has emptied: the numbers of the others stay, and it may be undone.
    standing: dict[int, Answer | None] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        if not line:
            standing[number] = None
            continue
        try:
            document = json.loads(line)
            if document["kind"] == "undo":
                del standing[document["undoes"]]
            else:
                standing[number] = _answer_of(document, number)
        except (ValueError, KeyError, TypeError, RecursionError):
            remedy = "bring the file back from a copy, or empty this line"
            raise UsageError(path, f"is damaged in line {number}", remedy) from None
    return [answer for answer in standing.values() if answer]


def noticed(workspace: Workspace, gan_sr_key: str | None) -> dict[tuple[str, Box], Noticed]:
    """Count who noticed what with `desra review --rate`, by image id and box of the region.

    The latest rating of each rater counts once; answers to checks do not count.

    Args:
        workspace: The workspace.
        gan_sr_key: The key of the model's results that were rated; None for results in files.

    Raises:
        UsageError: A line of a rater's file is damaged.
        TransientError: A file cannot be read now.
    """
    found: dict[tuple[str, Box], Noticed] = {}
    for rater in raters(workspace):
        latest = {
            (one.id, one.box): one.answer == "yes"
            for one in read_answers(workspace, rater)
            if one.kind == "rating" and one.check is None and one.gan_sr_key == gan_sr_key and one.box is not None
        }
        for key, yes in latest.items():
            before = found.get(key, Noticed(0, 0))
            found[key] = Noticed(before.yes + yes, before.raters + 1)
    return found


class AnswerFile:
    """The file of a rater, open to be written by this process alone: see `open_answers`.

    Attributes:
        answers: The answers that stand, in their order.
        lines: The number of lines, which grows with each answer, and with each that is undone.
    """

    def __init__(self, path: Path, file: IO[bytes], answers: list[Answer]) -> None:
        self.answers = answers
        self._path = path
        self._file = file
        self._latest = max((one.time for one in answers), default="")
        file.seek(0)
        data = file.read()  # at once: line by line, a file without a buffer is read byte by byte
        self.lines = data.count(b"\n")
        self._end = data.rfind(b"\n") + 1

    def append(self, answer: Answer) -> Answer:
        """Write an answer with the time, and wait until it is on the disk; returns it as written.

        Raises:
            TransientError: The disk is full or failed; nothing has changed.
        """
        # Never before those that are there: a clock may be set back, and answers count in the order of time.
        written = replace(answer, time=max(_now(), self._latest), line=self.lines + 1)
        self._write(_document_of(written))
        self._latest = written.time
        self.answers.append(written)
        return written

    def undo(self, kind: Kind) -> Answer | None:
        """Take the latest answer of a kind back; returns it, or None where there is none (raises as `append`)."""
        latest = next((one for one in reversed(self.answers) if one.kind == kind), None)
        if latest is not None:
            self._write({"time": _now(), "rater": latest.rater, "kind": "undo", "undoes": latest.line})
            self.answers.remove(latest)
        return latest

    def _write(self, document: dict[str, Any]) -> None:
        line = json.dumps(document).encode() + b"\n"
        with storage_errors(self._path):
            try:
                self._file.truncate(self._end)  # cuts a line off that a kill has torn
                self._file.seek(self._end)
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # a whole line may be there, of which the disk is not sure
                    self._file.truncate(self._end)
                raise
        self.lines += 1
        self._end += len(line)


@contextlib.contextmanager
def open_answers(workspace: Workspace, rater: str) -> Iterator[AnswerFile]:
    """Open the file of a rater to write it, for as long as the block lasts.

    Raises:
        UsageError: The name is no name for a file, or a line of the file is damaged.
        LockedError: Another process writes it.
        TransientError: The file cannot be written.
    """
    path = workspace.answers(check_rater(rater))
    note = {"host": socket.gethostname(), "machine": this_machine(), "pid": os.getpid()}
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            other = stack.enter_context(locked(path.with_suffix(".lock"), note))
        if other is not None:
            reason = f"reviews already, in process {other.get('pid', '?')} on {other.get('host', '?')}"
            raise LockedError(f"--rater {rater}", reason, "open its page in another tab, or give another name")
        answers = read_answers(workspace, rater)
        with storage_errors(path):
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0))
            sync_path(path.parent)  # so that a power cut leaves a new file in its folder
        yield AnswerFile(path, file, answers)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _document_of(answer: Answer) -> dict[str, Any]:
    """Convert an answer to the object of its line."""
    document = {name: value for name, value in answer.__dict__.items() if name not in ("box", "line", "stroke")}
    document = {"time": document.pop("time")} | document
    document |= dict(zip(_SIDES, answer.box or (None,) * 4, strict=True))
    return document | ({"stroke": answer.stroke._asdict()} if answer.stroke else {})


def _answer_of(document: dict[str, Any], line: int) -> Answer:
    """Convert the object of a line to an answer (raises `ValueError`, `KeyError` or `TypeError`: it is none)."""
    sides = [document.pop(name) for name in _SIDES]
    stroke = document.pop("stroke", None)
    if stroke is not None:
        points = tuple((_checked(x, int), _checked(y, int)) for x, y in stroke["points"])
        stroke = Stroke(points, _checked(stroke["radius"], int), _checked(stroke["erase"], bool))
        if not (stroke.is_drawable() and all(-_FARTHEST <= value <= _FARTHEST for point in points for value in point)):
            raise ValueError(stroke)
    x, y, width, height = (side if sides == [None] * 4 else _checked(side, int) for side in sides)
    answer = Answer(**document, box=None if x is None else (x, y, width, height), stroke=stroke, line=line)
    for text in (answer.time, answer.rater, answer.id, answer.name):
        _checked(text, str)
    for value, kind in ((answer.gan_sr_key, str), (answer.mask_key, str), (answer.check, str), (answer.area, int)):
        if value is not None:
            _checked(value, kind)
    if datetime.fromisoformat(answer.time).utcoffset() != timedelta(0):
        raise ValueError(answer.time)
    if answer.answer not in ANSWERS[answer.kind] or (answer.answer == "drawn") != (stroke is not None):
        raise ValueError(answer.answer)
    return answer


def _checked(value: Any, kind: type) -> Any:
    """Return a value of a JSON object that is of a kind (raises `TypeError`: it is not)."""
    if type(value) is not kind:  # bool is an int otherwise
        raise TypeError(value)
    return value
