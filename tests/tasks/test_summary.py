"""What a run over a corpus says of itself."""

from __future__ import annotations

import pytest

from desra_core.errors import TransientError
from tasks.summary import Summary

FULL = TransientError("/ws/masks", "the disk is full", "free some space")


def summary(**given: object) -> Summary:
    ended = {"flow_run": "", "task_runs": 5, "regions": 31, "failures": 0, "broken_shards": (), "images": 20,
             "computed": 0, "failed": 0, "passing": 0, "trouble": None}  # fmt: skip
    return Summary(**(ended | given))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"computed": 5}, "5 of 20 images computed: 31 artifact regions in all, 0 images failed"),
        ({"failures": 1}, "nothing new: 31 artifact regions in all, 1 image failed"),
        ({"failed": 3, "failures": 4}, "0 of 20 images computed: 31 artifact regions in all, 4 images failed"),
    ],
)
def test_what_it_says(given, line) -> None:
    assert summary(**given).in_one_line == line
    assert summary(**given).problem is None


def test_what_may_pass_is_a_problem_and_a_broken_photo_is_none() -> None:
    assert summary(computed=2, failed=3, failures=3).problem is None
    reason = "failed for what may pass, the first: /ws/masks: the disk is full; free some space"
    assert str(summary(failed=3, passing=2, trouble=FULL).problem) == f"2 images: {reason}"
    broken = summary(broken_shards=("worker gone", "again"), failed=3, passing=2, trouble=FULL).problem
    assert str(broken) == "2 shards could not finish: worker gone; run again"
