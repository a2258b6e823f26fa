"""How long the embedded Prefect server keeps runs, events and cached results; the workspace keeps everything.

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

# Of events, where they are stored after all.
_EVENTS = timedelta(days=3)
# Of the database, above which it is written anew. Freed space is used again, so this is rare.
_FREE_SHARE = 0.5
_LOG_BYTES = 10_000_000


def server_settings(history: timedelta) -> dict[str, str]:
    """Give the environment by which Prefect's server keeps runs for ``history``, with tasks, logs and artifacts.

    Events are not stored: they are three quarters of what a task run costs, each second of progress is one, and only
    the event feed of the UI shows them. Automations and live updates see them nevertheless.
    """
    return {
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(int(history.total_seconds())),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{int(min(history, _EVENTS).total_seconds())}S",
    }


def forget_results(home: Path, history: timedelta) -> int:
    """Delete cached results older than ``history`` from the server's folder, and empty long logs; returns how many."""
    oldest = time.time() - history.total_seconds()
    deleted = 0
    for path in (home / "storage").glob("*"):
        with contextlib.suppress(OSError):  # another process has deleted it, or writes it
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()
                deleted += 1
    for path in home.glob("*.log"):
        with contextlib.suppress(OSError):
            if path.stat().st_size > _LOG_BYTES:
                os.truncate(path, 0)  # who writes it appends
    return deleted


def compact(home: Path) -> None:
    """Give back the space of deleted rows of the server's database, where most of it is free. No server may run."""
    database = home / "prefect.db"
    if not database.exists():
        return
    # The server itself reports a damaged or locked database.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
        free, pages = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count"))
        if free > _FREE_SHARE * pages:
            connection.execute("VACUUM")
