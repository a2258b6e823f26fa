"""How long the embedded Prefect server remembers: runs, events and cached results. The workspace forgets nothing.

The numbers behind these settings are in docs/schedule.md.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from datetime import timedelta
from pathlib import Path

HISTORY = timedelta(days=90)

# Of events, where somebody has them stored.
_EVENTS = timedelta(days=3)
# Of the database, above which it is written anew. Freed space is used again, so this is rare.
_FREE_SHARE = 0.5
_LOG_BYTES = 10_000_000


def server_settings(history: timedelta) -> dict[str, str]:
    """Settings, as environment variables, by which Prefect's server keeps little and deletes what is old, once an hour.

    Events are not stored: they are three quarters of what a task run costs, each second of progress is one, and only
    the event feed of the UI shows them. Automations and live updates see them nevertheless.

    Parameters
    ----------
    history
        How long runs are kept, with their task runs, logs and artifacts.
    """
    return {
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(int(history.total_seconds())),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{int(min(history, _EVENTS).total_seconds())}S",
    }


def forget_results(home: Path, history: timedelta) -> int:
    """Delete cached results that were not written lately. What they told, the workspace knows better.

    Parameters
    ----------
    home
        Folder of the server.
    history
        How long they are kept.

    Returns
    -------
    How many were deleted.
    """
    oldest = time.time() - history.total_seconds()
    deleted = 0
    for path in (home / "storage").glob("*"):
        with contextlib.suppress(OSError):  # somebody else has deleted it, or writes it
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
                deleted += 1
    for path in home.glob("*.log"):
        with contextlib.suppress(OSError):
            if path.stat().st_size > _LOG_BYTES:
                os.truncate(path, 0)  # who writes it appends
    return deleted


def compact(home: Path) -> None:
    """Give back the space of what was deleted from the database, where it is most of it. No server may be running.

    Parameters
    ----------
    home
        Folder of the server.
    """
    database = home / "prefect.db"
    if not database.exists():
        return
    # A damaged or locked database is for the server to tell.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
        free, pages = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
        if free > _FREE_SHARE * pages:
            connection.execute("VACUUM")
