"""The end of a run over a corpus in a line, and shard numbers in few words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desra_core.errors import TransientError
from tasks.artifacts import Summary, ranges, summarize

FULL = TransientError("/ws/masks", "the disk is full", "free some space")


def summary(**fields: object) -> Summary:
    ended = {"task_runs": 5, "regions": 31, "failures": 0, "broken_shards": (), "images": 20, "pending": 0,
             "failed": 0, "passing": []}  # fmt: skip
    return summarize(**(ended | fields))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"pending": 5}, "5 of 20 images computed: 31 artifact regions in all, 0 images failed"),
        ({"failures": 1}, "nothing new: 31 artifact regions in all, 1 image failed"),
        (
            {"pending": 3, "failed": 3, "failures": 4, "regions": 1},
            "0 of 20 images computed: 1 artifact region in all, 4 images failed",
        ),
    ],
)
def test_the_line_of_a_summary(fields, line) -> None:
    assert summary(**fields).in_one_line == line
    assert summary(**fields).problem is None


def test_a_failure_that_may_pass_is_a_problem_and_a_broken_photo_is_none() -> None:
    assert summary(pending=5, failed=3, failures=3).problem is None
    reason = "failed for a reason that may pass, the first: /ws/masks: the disk is full; free some space"
    assert str(summary(pending=3, failed=3, passing=[FULL, FULL]).problem) == f"2 images: {reason}"
    broken = summary(broken_shards=("worker gone", "again"), pending=3, failed=3, passing=[FULL]).problem
    assert str(broken) == "2 shards could not finish: worker gone; run again"
    broken = summary(broken_shards=("worker gone",)).problem
    assert str(broken) == "1 shard could not finish: worker gone; run again"


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_each_number_once(numbers: set[int]) -> None:
    line = ranges(sorted(numbers))
    count, _, named = line.removesuffix(")").partition(" (")
    found: list[int] = []
    for part in named.split(", ") if numbers else []:
        first, _, last = part.partition("–")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)
    assert count == (str(len(numbers)) if numbers else "none")
