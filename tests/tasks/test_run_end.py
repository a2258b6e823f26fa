"""The end of a run over a corpus in a line, and shard numbers in few words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desra_core.errors import TransientError
from tasks.run_end import line_of, problem_of, ranges

FULL = TransientError("/ws/masks", "the disk is full", "free some space")


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"pending": 5}, "5 of 20 images computed: 31 artifact regions in all, 0 images failed"),
        ({"failures": 1}, "nothing new: 31 artifact regions in all, 1 image failed"),
        (
            {"pending": 3, "failed": 3, "failures": 4, "regions": 1},
            "0 of 20 images computed: 1 artifact region in all, 4 images failed",
        ),
    ],
)
def test_the_line_of_a_run(counts, line) -> None:
    assert line_of(**({"images": 20, "pending": 0, "failed": 0, "regions": 31, "failures": 0} | counts)) == line


def test_a_failure_that_may_pass_is_a_problem_and_a_broken_photo_is_none() -> None:
    assert problem_of([], []) is None
    reason = "failed for a reason that may pass, the first: /ws/masks: the disk is full; free some space"
    assert str(problem_of([], [FULL, FULL])) == f"2 images: {reason}"
    assert str(problem_of(["worker gone", "again"], [FULL])) == "2 shards could not finish: worker gone; run again"
    assert str(problem_of(["worker gone"], [])) == "1 shard could not finish: worker gone; run again"


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
