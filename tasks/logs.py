"""Print to stderr: lines for people, and records of shards and images for log collectors.

Errors and warnings are lines, too. Records have the levels of Python's logging: a record per shard has the level info,
a record per image debug, and each names its run, shard and image. With the format ``json``, each line and each record
is a JSON object.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, cast

from desra_core.errors import printable

LINE_SECONDS = 5.0
SHOWN_FAILURES = 20

_LINES = logging.getLogger("desra.lines")
_RECORDS = logging.getLogger("desra.records")


def say(line: str, **ids: Any) -> None:
    """Print a line on stderr.

    Args:
        line: The line. A leading ``error:`` or ``warning:`` sets its level; the default is info.
        ids: The run, workspace and so on, as for `record`; shown where lines are JSON.
    """
    _handled()
    level, _, message = line.partition(": ")
    if level not in ("error", "warning"):
        level, message = "info", line
    _LINES.log(logging.getLevelNamesMapping()[level.upper()], message, extra={"ids": ids})


def say_each(kind: str, troubles: Iterable[object], rest: str = "", *, most: int | None = SHOWN_FAILURES) -> None:
    """Print a line ``kind: trouble`` for the first ``most`` troubles (None: for all), then the number of the others."""
    lines = list(troubles)
    for line in lines[:most]:
        say(f"{kind}: {printable(line)}")
    if most is not None and len(lines) > most:
        say(f"and {len(lines) - most} more{rest}")


class NowAndThen:
    """Print a progress line such as ``reading new files: {} of {}``, at most every five seconds."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Print the line with the number done and the total, if five seconds have passed."""
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(self._line.format(done, total))


def carry(**ids: Any) -> None:
    """Add ids, of a run or a workspace, to all lines of this process where lines are JSON."""
    _handled().about.update(ids)


def record(level: int, message: str, **ids: Any) -> None:
    """Log the result of a shard or an image.

    Args:
        level: A level of Python's logging.
        message: The result in a line.
        ids: Ids of the run, shard, image and so on.
    """
    _handled()
    _RECORDS.log(level, message, extra={"ids": ids})


def configure(level: str, form: str) -> None:
    """Set level and format of the log of this process; see `desra_core.settings.Machine`."""
    _handled().setFormatter(_Json() if form == "json" else _Text())
    _RECORDS.setLevel(level.upper())


def is_json() -> bool:
    """Check whether stderr gets one JSON object per line."""
    return isinstance(_handled().formatter, _Json)


class _Stderr(logging.Handler):
    """Write to the current ``sys.stderr``; all lines carry the ids ``about``."""

    def __init__(self) -> None:
        super().__init__()
        self.about: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        record.about = self.about
        try:
            sys.stderr.write(f"{self.format(record)}\n")
        except Exception:  # noqa: BLE001 - the work goes on without its log
            self.handleError(record)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.name == _LINES.name:
            level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            return level + record.getMessage()
        ids = " ".join(f"{name}={value}" for name, value in _ids(record, "ids"))
        moment = self.formatTime(record, "%H:%M:%S")
        return f"{moment} {record.levelname.lower():7} {ids} {record.getMessage()}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).astimezone()
        fields = {"time": moment.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        return json.dumps(fields | dict(_ids(record, "about", "ids")) | {"message": record.getMessage()})


def _ids(record: logging.LogRecord, *kinds: str) -> list[tuple[str, Any]]:
    ids = (item for kind in kinds for item in getattr(record, kind, {}).items())
    return [(name, value) for name, value in ids if value is not None]


def _handled() -> _Stderr:
    """Return the handler of both loggers; the first use makes it."""
    if not _LINES.handlers:
        handler = _Stderr()
        handler.setFormatter(_Text())
        for logger in (_LINES, _RECORDS):
            logger.propagate = False
            logger.addHandler(handler)
        _LINES.setLevel(logging.INFO)
        _RECORDS.setLevel(logging.WARNING)
    return cast(_Stderr, _LINES.handlers[0])
