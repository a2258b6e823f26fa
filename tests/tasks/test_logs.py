"""Lines of a run on stderr, records of shards and images, and both as JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime

import pytest

from tasks.logs import carry, configure, is_json, record, say


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    configure("warning", "text")
    carry(run=None, workspace=None)


def test_lines_are_plain_and_records_are_kept_to_themselves(capsys) -> None:
    say("hello")
    record(logging.INFO, "3 images", run="r", shard="00001")
    record(logging.DEBUG, "done", run="r", shard="00001", image="ab")
    assert capsys.readouterr().err == "hello\n"
    assert not is_json()


def test_each_level_takes_in_the_ones_above(capsys) -> None:
    configure("info", "text")
    record(logging.INFO, "3 images", run="r 1", shard="00001", image=None)
    record(logging.DEBUG, "done", image="ab")
    assert capsys.readouterr().err.split(" ", 1)[1] == "info    run=r 1 shard=00001 3 images\n"
    configure("debug", "text")
    record(logging.DEBUG, "done", image="ab", seconds=0.5)
    assert capsys.readouterr().err.endswith("debug   image=ab seconds=0.5 done\n")


def test_json_is_one_object_per_line_for_lines_too(capsys) -> None:
    configure("debug", "json")
    assert is_json()
    say('a "line"\nwith a break')
    record(logging.DEBUG, "done: ü", run=None, shard="00001", image="ab", seconds=0.25)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("info", 'a "line"\nwith a break')
    assert datetime.fromisoformat(second.pop("time")).tzinfo is not None
    assert second == {"level": "debug", "shard": "00001", "image": "ab", "seconds": 0.25, "message": "done: ü"}


def test_errors_and_warnings_are_of_their_level(capsys) -> None:
    lines = ["error: a.png: is bad; mend it", "warning: no labels", "a.png: error: not at the beginning"]
    for line in lines:
        say(line)
    assert capsys.readouterr().err.splitlines() == lines
    configure("warning", "json")
    for line in lines:
        say(line)
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in told] == [
        ("error", "a.png: is bad; mend it"), ("warning", "no labels"), ("info", lines[2]),
    ]  # fmt: skip


def test_json_lines_carry_their_ids(capsys) -> None:
    configure("info", "json")
    carry(workspace="/ws")
    say("planning")
    carry(run="mine photos")
    say("error: it fails")
    say("another one fails", run="cycle photos")
    record(logging.INFO, "3 images", run="mine photos", shard="00001")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["workspace"] for line in told] == ["/ws"] * 4
    assert [line.get("run") for line in told] == [None, "mine photos", "cycle photos", "mine photos"]
    configure("info", "text")
    say("error: it fails")
    assert capsys.readouterr().err == "error: it fails\n"
