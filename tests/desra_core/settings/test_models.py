"""Times and lengths of time in words, and paths that may be words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from desra_core.errors import UsageError
from desra_core.settings import Mining, models
from desra_core.settings.models import (
    Comparing,
    Period,
    Serving,
    local_timezone,
    parse_period,
    parse_span,
    workspace_of,
)

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
        ("0 2 * jan-jul mon-wed", "0 2 * jan-jul mon-wed"),
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
     "0 2 * * * *", "a b c d e", "0 2 L * *", "0 0 LW * *", "0 0 15W * *", "0 2 * * 5L", "0 2 * * 1#2",
     "every 9999999999 weeks"],
)  # fmt: skip
def test_other_texts_are_refused_as_times(text) -> None:
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


@pytest.fixture
def set_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_to(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        monkeypatch.setattr("tzlocal.unix._cache_tz_name", None)  # it looks once per process
        time.tzset()

    yield set_to
    monkeypatch.undo()
    time.tzset()


def test_defaults_and_names(set_zone) -> None:
    serving = Serving(**CORPUS)
    assert (serving.title, Serving(**CORPUS, name="photos-2026").title) == ("ws", "photos-2026")
    assert parse_period(serving.mine_at).cron
    assert parse_period(serving.cycle_at).cron
    set_zone("America/Lima")
    assert serving.clock == local_timezone() == "America/Lima"
    assert Serving(**CORPUS, timezone="Asia/Tokyo").clock == "Asia/Tokyo"


def test_a_time_zone_without_a_name_is_not_taken_for_another(set_zone, monkeypatch) -> None:
    set_zone(":Europe/Rome")
    assert local_timezone() == "Europe/Rome"
    set_zone("CET-1CEST")
    with pytest.raises(UsageError, match="--timezone: is not given, and that of this machine has no name; give one"):
        local_timezone()
    set_zone("UTC")
    monkeypatch.setattr(models, "get_localzone_name", lambda: None)  # a copied file
    with pytest.raises(UsageError, match="--timezone"):
        local_timezone()
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    assert local_timezone() == "UTC"


def test_any_folder_gives_a_valid_name_of_deployments() -> None:
    assert Serving(**CORPUS | {"workspace": "/data/ws#1 (new)"}).title == "ws-1-new-"
    assert Serving(**CORPUS | {"workspace": "/data/Wäsche.1"}).title == "Wäsche.1"


def test_the_workspace_of_parameters() -> None:
    settings = {"photos": "/p", "workspace": "/ws"}
    assert workspace_of({"machine": {}, "mining": settings, "rescan": True}) == "/ws"
    assert workspace_of({"machine": {}}) is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("bicubic", "bicubic"),
        ("/m/mse.pth", "/m/mse.pth"),
        (Path("/m/mse.pth"), "/m/mse.pth"),
        ("mse.pth", "HERE/mse.pth"),
        ("./bicubic", "HERE/bicubic"),
        (Path("bicubic"), "HERE/bicubic"),
        ("~/bicubic", "HERE/home/bicubic"),
    ],
)
def test_the_word_for_a_reference_stays_and_paths_become_whole(given, kept, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept = kept.replace("HERE", str(tmp_path))
    mining = Mining(**CORPUS | {"mse_model": given})
    assert mining.mse_model == Serving(**CORPUS | {"mse_model": given}).mse_model == kept
    assert Mining.model_validate_json(mining.model_dump_json()) == mining
    assert Comparing(workspace="/ws", after="/a", mse_model=given).mse_model == kept
    assert Comparing(workspace="/ws", after="/a").mse_model is None


@pytest.mark.parametrize("given", [3, None, ["mse.pth"]])
def test_other_values_are_no_reference(given) -> None:
    with pytest.raises(ValidationError):
        Mining(**CORPUS | {"mse_model": given})
