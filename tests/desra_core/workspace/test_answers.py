"""Answers of raters: every one is on the disk, and a kill, a second process or a damaged line changes no other."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from desra_core.errors import LockedError, TransientError, UsageError
from desra_core.housekeeping.verify import verify_documents
from desra_core.workspace import Workspace
from desra_core.workspace.answers import (
    Answer,
    AnswerFile,
    Noticed,
    Stroke,
    noticed,
    open_answers,
    raters,
    read_answers,
)

BOX, OTHER = (1, 2, 30, 40), (5, 6, 7, 8)


def rating(yes: str = "yes", **given: object) -> Answer:
    about = {"rater": "ann", "kind": "rating", "id": "1" * 32, "name": "set/a", "gan_sr_key": "gan", "mask_key": "m"}
    return Answer(**(about | {"box": BOX, "area": 900, "answer": yes} | given))  # type: ignore[arg-type]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    made.create()
    return made


def test_answers_are_read_as_they_were_written(workspace: Workspace) -> None:
    stroke = Stroke(((1, 2), (-3, 40)), 7, erase=True)
    with open_answers(workspace, "ann") as file:
        written = [file.append(rating()), file.append(rating(kind="decision", answer="drawn", stroke=stroke, box=None))]
        assert read_answers(workspace, "ann") == written == file.answers  # before the file is closed
    assert [one.line for one in read_answers(workspace, "ann")] == [1, 2]
    line = json.loads(workspace.answers("ann").read_text().splitlines()[0])
    assert (line["kind"], line["x"], line["height"], line["answer"]) == ("rating", 1, 40, "yes")
    assert line["time"].endswith("+00:00")


def test_a_long_file_is_read_at_once(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        for _ in range(20):
            file.append(rating())
    calls = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            calls.append(size)
            return super().read(size) or b""

    path = workspace.answers("ann")
    with Counted(path, "r+b") as counted:
        opened = AnswerFile(path, counted, read_answers(workspace, "ann"))
        assert opened.lines == 20
        assert len(calls) == 1
        assert opened.append(rating("no")).line == 21
    assert read_answers(workspace, "ann")[-1].answer == "no"


def test_an_undone_answer_is_named_by_a_line_and_does_not_stand(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        decision = file.append(rating(kind="decision", answer="accept"))
        first, second = file.append(rating()), file.append(rating("no", box=OTHER))
        assert file.undo("rating") == second
        assert file.undo("rating") == first
        assert file.undo("rating") is None
        again = file.append(rating("no"))
        assert file.answers == read_answers(workspace, "ann") == [decision, again]
    lines = [json.loads(line) for line in workspace.answers("ann").read_text().splitlines()]
    assert [line.get("undoes") for line in lines] == [None, None, None, 3, 2, None]


def test_a_torn_line_is_no_answer_and_the_next_answer_takes_its_place(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        first = file.append(rating())
    path = workspace.answers("ann")
    path.write_bytes(path.read_bytes() + path.read_bytes()[:57] + b"9" * 5000)
    assert read_answers(workspace, "ann") == [first]
    with open_answers(workspace, "ann") as file:
        second = file.append(rating("no"))
    assert read_answers(workspace, "ann") == [first, second]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_killed_process_loses_no_answer_that_it_has_confirmed(workspace: Workspace) -> None:
    script = f"""
from pathlib import Path
from desra_core.workspace import Workspace
from desra_core.workspace.answers import Answer, open_answers
with open_answers(Workspace(Path({str(workspace.root)!r})), "ann") as file:
    for number in range(10**6):
        file.append(Answer("ann", "rating", "1" * 32, "a", None, None, {BOX}, number, "yes"))
        print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        confirmed = [process.stdout.readline() for _ in range(20)]
        with pytest.raises(LockedError, match=f"--rater ann: reviews already, in process {process.pid} on "):
            open_answers(workspace, "ann").__enter__()
        os.kill(process.pid, signal.SIGKILL)
        confirmed += process.stdout.readlines()
    answers = read_answers(workspace, "ann")
    assert len(answers) >= len(confirmed)
    assert [one.area for one in answers] == list(range(len(answers)))
    with open_answers(workspace, "ann") as file:  # the lock is free
        file.append(rating())


def test_a_damaged_line_is_named(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        file.append(rating())
        file.append(rating("no"))
    path = workspace.answers("ann")
    for damage in (b"{", b'{"kind": "undo", "undoes": 9}', path.read_bytes().splitlines()[0].replace(b"yes", b"may")):
        path.write_bytes(damage + b"\n" + path.read_bytes().splitlines()[1] + b"\n")
        with pytest.raises(UsageError, match=r"ann\.jsonl: is damaged in line 1; bring the file back"):
            read_answers(workspace, "ann")
        with pytest.raises(UsageError, match="is damaged in line 1"):
            open_answers(workspace, "ann").__enter__()
        assert [found.path for found in verify_documents(workspace).damaged] == [path]
    path.write_bytes(b"\n" + path.read_bytes().splitlines()[1] + b"\n")  # as the remedy says
    assert [one.line for one in read_answers(workspace, "ann")] == [2]
    assert verify_documents(workspace).damaged == ()


@pytest.mark.parametrize(
    "wrong",
    [{"x": float("inf")}, {"x": 1.5}, {"x": None}, {"x": "1"}, {"time": 5}, {"time": "noon"},
     {"time": "2026-01-01T00:00:00+02:00"}, {"time": "2026-01-01T00:00:00"}, {"id": ["a"]}, {"name": None},
     {"rater": 1}, {"kind": []}, {"gan_sr_key": 1}, {"mask_key": []}, {"check": 1}, {"area": "large"}, {"answer": []},
     {"stroke": {"points": [], "radius": 1, "erase": False}},
     {"stroke": {"points": [[1, 1]] * 20_001, "radius": 1, "erase": False}},
     {"stroke": {"points": [[1, 10**30]], "radius": 1, "erase": False}},
     {"stroke": {"points": [[1, 1]], "radius": 501, "erase": False}},
     {"stroke": {"points": [[1, 1]], "radius": True, "erase": False}},
     {"stroke": {"points": [[1, 1]], "radius": 1, "erase": 0}}],
    ids=lambda wrong: str(wrong)[:60],
)  # fmt: skip
def test_a_line_that_holds_no_answer_is_named(workspace: Workspace, wrong: dict[str, object]) -> None:
    drawn = {"kind": "decision", "answer": "drawn", "stroke": Stroke(((1, 1),), 1), "box": None, "area": None}
    with open_answers(workspace, "ann") as file:
        file.append(rating(**(drawn if "stroke" in wrong else {})))
    path = workspace.answers("ann")
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong) + "\n")
    with pytest.raises(UsageError, match="is damaged in line 1"):
        read_answers(workspace, "ann")


@pytest.mark.parametrize("line", [b"null", b"[]", b"5", b'"undo"', b"{}"])
def test_a_line_that_is_no_object_is_named(workspace: Workspace, line: bytes) -> None:
    with open_answers(workspace, "ann") as file:
        file.append(rating())
    workspace.answers("ann").write_bytes(line + b"\n")
    with pytest.raises(UsageError, match="is damaged in line 1"):
        read_answers(workspace, "ann")


def test_a_line_that_was_emptied_may_be_undone(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        file.append(rating())
        file.append(rating("no"))
        file.undo("rating")
    path = workspace.answers("ann")
    first, _, undo = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b"", undo, b""]))
    with open_answers(workspace, "ann") as file:
        assert [one.line for one in file.answers] == [1]


def test_answers_of_a_rater_stay_in_their_order_when_the_clock_is_set_back(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        file.append(rating())
    path = workspace.answers("ann")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time": "2999-01-01T00:00:00.000+00:00"}) + "\n")
    with open_answers(workspace, "ann") as file:
        for _ in range(2):
            assert file.append(rating("no")).time >= file.answers[0].time
        file.undo("rating")
        file.append(rating("no"))
    times = [one.time for one in read_answers(workspace, "ann")]
    assert times == sorted(times)


def test_an_answer_that_the_disk_does_not_take_changes_nothing(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        first = file.append(rating())
        whole = file._file
        with Path("/dev/full").open("r+b", buffering=0) as full:
            file._file = full
            with pytest.raises(TransientError, match=r"ann\.jsonl"):
                file.append(rating("no"))
        file._file = whole
        assert file.answers == [first]
        second = file.append(rating("no"))
    assert read_answers(workspace, "ann") == [first, second]


@pytest.mark.parametrize("name", ["", "a b", "../ann", "ä", "a/b", "x" * 65, "a\n"])
def test_a_rater_whose_name_names_no_file_is_refused(workspace: Workspace, name: str) -> None:
    with pytest.raises(UsageError, match=r"--rater: .* is no name for a file"):
        open_answers(workspace, name).__enter__()
    assert not workspace.review.exists()


def test_the_latest_rating_of_each_rater_counts_once(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file:
        for one in (rating("no"), rating("yes"), rating("no", box=OTHER), rating("yes", box=OTHER, check="no")):
            file.append(one)
        file.append(rating("yes", gan_sr_key="older"))
        file.append(rating(kind="decision", answer="reject"))
    with open_answers(workspace, "bob.2") as file:
        file.append(rating("no", rater="bob.2"))
        file.append(rating("no", rater="bob.2", box=OTHER))
        file.undo("rating")
    assert raters(workspace) == ["ann", "bob.2"]
    key = "1" * 32
    assert noticed(workspace, "gan") == {(key, BOX): Noticed(1, 2), (key, OTHER): Noticed(0, 1)}
    assert noticed(workspace, "older") == {(key, BOX): Noticed(1, 1)}
    assert noticed(workspace, None) == {}
