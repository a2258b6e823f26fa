"""Settings of `desra serve`: times of runs, the address for failures, and how long runs are kept."""

import contextlib
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator
from tzlocal import get_localzone_name

from desra_core.errors import UsageError
from desra_core.settings import Frozen
from desra_core.settings.models import Cycling

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_SPAN = re.compile(rf"(\d+)? ?({'|'.join(_UNITS)})s?")
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_CLOCK = re.compile(rf"(daily|weekdays|(?:{'|'.join(_DAYS)})s?) at (\d\d?):(\d\d)")
# Lowest and highest value of each field of a cron expression; both 0 and 7 are Sunday.
_CRON_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
_SHORTEST_PERIOD = timedelta(seconds=10)  # with shorter periods, a server is busy with planning runs
_SHORTEST_HISTORY = timedelta(days=1)  # Prefect keeps no run for less
_LONGEST_SPAN = timedelta(days=36500)  # longer spans lead to dates that Python does not have


class Period(NamedTuple):
    """The times at which a flow runs: a cron expression or a period; neither where it never runs by itself."""

    cron: str | None = None
    every: timedelta | None = None


class FinetuneTrigger(Frozen):
    """The number of new images with artifacts at which a mining run starts a finetune."""

    artifacts: int = Field(
        ge=1,
        description="Start a finetune when so many images with artifacts have joined the training pool since the last "
        "one.",
    )
    group_by: str = Field("duplicates", description="As for the finetune.")


class Serving(Cycling):
    """Settings of desra serve, which mines a growing folder of photos and finetunes the model at set times."""

    verb: ClassVar[str] = "serve"

    name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="Name of the deployments and of their work pool; by default that of the workspace folder.",
    )
    mine_at: str = Field(
        "daily at 2:00",
        description="When new photos are mined: daily at 2:00, weekdays at 6:30, sundays at 4:00, every 15 minutes, a "
        "cron expression, or never.",
    )
    cycle_at: str = Field("sundays at 4:00", description="When a whole cycle runs, given in the same way.")
    finetune_after: int = Field(
        200,
        ge=0,
        description="Finetune when so many images with artifacts have joined the training pool since the last "
        "finetune; 0 for never.",
    )
    timezone: str | None = Field(
        None, description="Time zone of the clock times, like Europe/Berlin; by default that of this machine."
    )
    webhook: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Address that gets a JSON message, with a text field as Slack and Mattermost read it, of each run "
        "that failed; by default $DESRA_WEBHOOK.",
    )
    history: str = Field(
        "90 days", description="How long runs stay in the UI, with their logs, artifacts and cached results."
    )
    port: int = Field(
        4200,
        ge=0,
        le=65533,
        description="Port of the Prefect server on this machine; the report and Dask's dashboard are at the next two. "
        "0 for any free ports.",
    )

    @field_validator("mine_at", "cycle_at")
    @classmethod
    def _known_period(cls, text: str) -> str:
        parse_period(text)
        return text

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, timezone: str | None) -> str | None:
        try:
            ZoneInfo(timezone or "UTC")
        except (LookupError, OSError, ValueError):
            raise ValueError("no such time zone") from None
        return timezone

    @field_validator("history")
    @classmethod
    def _long_enough(cls, history: str) -> str:
        if parse_span(history) < _SHORTEST_HISTORY:
            raise ValueError("is less than a day")
        return history

    @property
    def title(self) -> str:
        """Name of the deployments and of their work pool."""
        return self.name or re.sub(r"[^\w.-]+", "-", self.workspace.name)

    @property
    def clock(self) -> str:
        """The time zone of the schedules."""
        return self.timezone or local_timezone()


def workspace_of(parameters: Mapping[str, Any]) -> str | None:
    """Find the workspace in the parameters of a flow, as a server stores them; None where there is no workspace."""
    given = (each for each in parameters.values() if isinstance(each, dict) and "workspace" in each)
    return next((str(settings["workspace"]) for settings in given), None)


def parse_span(text: str) -> timedelta:
    """Parse a length of time like ``90 days``; other texts raise ValueError."""
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError("no length of time like 90 days or 12 hours")
    seconds = int(found[1] or 1) * _UNITS[found[2]]
    if seconds > _LONGEST_SPAN.total_seconds():
        raise ValueError("no length of time below a hundred years")
    return timedelta(seconds=seconds)


def parse_period(text: str) -> Period:
    """Parse times in words or as a cron expression; other texts raise ValueError.

    Examples:
        >>> parse_period("daily at 2:00")
        Period(cron='0 2 * * *', every=None)
        >>> parse_period("every 15 minutes").every.seconds
        900
    """
    words = " ".join(text.lower().split())
    if words == "never":
        return Period()
    if found := _CLOCK.fullmatch(words):
        hour, minute = int(found[2]), int(found[3])
        if hour > 23 or minute > 59:
            raise ValueError("no time of day")
        days = {"daily": "*", "weekdays": "1-5"}.get(found[1]) or str(_DAYS.index(found[1].removesuffix("s")))
        return Period(cron=f"{minute} {hour} * * {days}")
    if words.startswith("every "):
        every = parse_span(words.removeprefix("every "))
        if every < _SHORTEST_PERIOD:
            raise ValueError("is more often than every 10 seconds")
        return Period(every=every)
    fields = words.split()
    if len(fields) != len(_CRON_RANGES) or not all(map(_is_cron_field, fields, _CRON_RANGES)):
        raise ValueError("no time like daily at 2:00 or every 15 minutes, and no cron expression of five fields")
    return Period(cron=words)


def _is_cron_field(field: str, bounds: tuple[int, int]) -> bool:
    """Check whether each part of a field is ``*``, a number or a range of numbers, perhaps with a step."""
    low, high = bounds
    for part in field.split(","):
        found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
        if found is None:
            return False
        first, step = int(found[1] or low), int(found[3] or 1)
        if not (low <= first <= int(found[2] or first) <= high and 1 <= step <= high):
            return False
    return True


def local_timezone() -> str:
    """Find the name of this machine's time zone; UTC where it has none.

    Raises:
        UsageError: The name of its zone cannot be found, as in a container that has only a copy of the zone's file.
    """
    name = None
    with contextlib.suppress(LookupError, OSError, ValueError):
        name = get_localzone_name()
    if name is None and not os.path.exists("/etc/localtime"):
        name = "UTC"
    if name:
        now = datetime.now(UTC)
        moments = (now, now + timedelta(days=182))  # winter and summer
        if all(moment.astimezone().utcoffset() == moment.astimezone(ZoneInfo(name)).utcoffset() for moment in moments):
            return name
    raise UsageError("--timezone", "is not given, and that of this machine has no name", "give one like Europe/Berlin")
