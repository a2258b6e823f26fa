"""Times and lengths of time in words."""

from __future__ import annotations

from datetime import timedelta

import pytest
from pydantic import ValidationError

from desra_core.serving_settings import Period, Serving, local_timezone, parse_period, parse_span

CORPUS = {"photos": "p", "mse_model": "m", "gan_model": "g", "workspace": "/data/ws"}


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("daily at 2:00", "0 2 * * *"),
        ("Daily  at 23:59", "59 23 * * *"),
        ("weekdays at 6:30", "30 6 * * 1-5"),
        ("saturday at 0:05", "5 0 * * 6"),
        ("sundays at 4:00", "0 4 * * 0"),
        ("*/10 8-18 * * 1-5", "*/10 8-18 * * 1-5"),
        ("0 2,14 1 1-12/2 7", "0 2,14 1 1-12/2 7"),
    ],
)
def test_times_become_cron_expressions(text, cron) -> None:
    assert parse_period(text) == Period(cron=cron)


def test_intervals() -> None:
    assert parse_period("every 15 minutes") == Period(every=timedelta(minutes=15))
    assert parse_period("every hour") == Period(every=timedelta(hours=1))
    assert parse_period("never") == Period()
    assert parse_span("2 weeks") == timedelta(days=14)


@pytest.mark.parametrize(
    "text",
    ["", "soon", "daily at 24:00", "daily at 2:60", "daily at 2", "every 5 seconds", "every", "every -1 hours",
     "0 2 * *", "60 2 * * *", "0 24 * * *", "0 2 0 * *", "0 2 * 13 *", "0 2 * * 8", "5-2 * * * *", "*/0 * * * *",
     "*/99 * * * *",
     "0 2 * * * *", "a b c d e", "every 9999999999 weeks"],
)  # fmt: skip
def test_what_is_no_time_is_refused(text) -> None:
    with pytest.raises(ValueError, match=r"no |is more often"):
        parse_period(text)


@pytest.mark.parametrize(
    "given",
    [{"mine_at": "now and then"}, {"cycle_at": "61 * * * *"}, {"history": "5 minutes"}, {"history": "long"},
     {"history": "23 hours"}, {"history": "40000 days"},
     {"timezone": "Mars/Olympus"}, {"timezone": "../../etc/passwd"}, {"webhook": "hooks.example/x"},
     {"finetune_after": -1}, {"port": 70000}, {"name": "a/b"}, {"threshold": 2}, {"mine": "daily at 2:00"}],
)  # fmt: skip
def test_bad_settings_are_refused(given) -> None:
    with pytest.raises(ValidationError):
        Serving(**(CORPUS | given))


def test_defaults_and_names(monkeypatch) -> None:
    serving = Serving(**CORPUS)
    assert (serving.title, Serving(**CORPUS, name="photos-2026").title) == ("ws", "photos-2026")
    assert parse_period(serving.mine_at).cron
    assert parse_period(serving.cycle_at).cron
    monkeypatch.setenv("TZ", "America/Lima")
    assert serving.clock == local_timezone() == "America/Lima"
    assert Serving(**CORPUS, timezone="Asia/Tokyo").clock == "Asia/Tokyo"


@pytest.mark.parametrize("prefix", ["", ":"])
def test_a_time_zone_may_be_a_file(prefix, monkeypatch, tmp_path) -> None:
    zone = tmp_path / "zoneinfo" / "posix" / "Europe" / "Rome"
    zone.parent.mkdir(parents=True)
    zone.touch()
    (tmp_path / "localtime").symlink_to(zone)
    monkeypatch.setenv("TZ", f"{prefix}{tmp_path / 'localtime'}")
    assert local_timezone() == "Europe/Rome"
    (tmp_path / "copied").touch()
    monkeypatch.setenv("TZ", f"{prefix}{tmp_path / 'copied'}")
    assert local_timezone() == "UTC"
