"""Reviews: what is asked, what follows from the answers, and that masks go where those of desra import go."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from desra_core.annotations.corrections import publish_corrections, read_corrections, undo_import
from desra_core.annotations.export import export_workspace
from desra_core.annotations.review import (
    CHECK_EVERY,
    RaterAgreement,
    Review,
    StaleError,
    agreement,
    box_of,
    decided,
    draw_stroke,
)
from desra_core.errors import UsageError
from desra_core.images.codec import encode_mask, read_image
from desra_core.images.parts import Rectangle
from desra_core.planning.plan import load_settings
from desra_core.settings import Mining
from desra_core.workspace import Workspace
from desra_core.workspace.answers import Stroke, open_answers, read_answers
from desra_core.workspace.human_masks import read_human_masks
from tests.conftest import held
from tests.in_process import process

SIZE = (120, 160)


def boxes(*corners: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for x, y in corners:
        mask[y : y + 20, x : x + 30] = True
    return mask


MASKS = {"a": boxes((5, 5), (60, 40), (110, 90)), "set/b": boxes((20, 30)), "c": boxes()}


@pytest.fixture
def workspace(make_workspace) -> Workspace:
    return make_workspace(MASKS)


@contextlib.contextmanager
def reviewing(workspace: Workspace, rater: str = "ann", **given: object) -> Iterator[Review]:
    with open_answers(workspace, rater) as file:
        yield Review(workspace, file, rater, **given)  # type: ignore[arg-type]


def say(review: Review, answer: str) -> tuple[str, tuple[int, int, int, int] | None]:
    """Answer what is asked; returns the name of the image and the box."""
    place = review.current()
    assert place is not None
    review.answer(place.key, answer, review.state())
    return place.image.name, place.key[1]


def human(workspace: Workspace) -> dict[str, np.ndarray]:
    masks = read_human_masks(workspace, load_settings(workspace)[1].gan_sr_key).values()
    return {mask.name: mask.read() for mask in masks}


def test_regions_are_asked_by_severity_and_each_once(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        assert [image.name for image in review.images] == ["a", "set/b"]
        severities = []
        while place := review.current():
            assert place.region is not None
            severities.append(place.region["severity"])
            following = review.following()
            review.answer(place.key, "accept", review.state())
            assert review.current() == following
        assert severities == sorted(severities, reverse=True)
        assert review.counts() == {"answered": 4, "left": 0, "all": 4}
    with reviewing(workspace) as review:
        assert review.current() is None


def test_an_image_gets_its_mask_once_all_its_regions_are_decided(workspace: Workspace) -> None:
    rejected = []
    with reviewing(workspace) as review:
        while place := review.current():
            answer = "reject" if place.image.name == "a" and not rejected else "accept"
            assert "a" not in human(workspace)
            rejected += [place.key[1]] if answer == "reject" else []
            review.answer(place.key, answer, review.state())
            imported = review.bring()
            assert (imported.waiting, imported.why) == (0, None)
            assert ("set/b" in human(workspace)) == all(one.key[0] != review.images[1].id for one in _left(review))
    expected = MASKS["a"].copy()
    x, y, width, height = rejected[0]
    expected[y : y + height, x : x + width] = False
    found = human(workspace)
    assert np.array_equal(found["a"], expected)
    assert np.array_equal(found["set/b"], MASKS["set/b"])
    with workspace.locked() as locked:  # the import of a review is an import
        undo_import(locked)
    assert len(human(workspace)) == 1


def _left(review: Review) -> list:
    return list(review._open())


def test_undo_restores_the_state_before_and_asks_again(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        before = []
        while review.current():
            before.append(review.current())
            say(review, "accept")
        review.bring()
        assert set(human(workspace)) == {"a", "set/b"}
        for place in reversed(before):
            undone = review.undo(review.state())
            assert undone is not None
            assert undone.key == place.key
            assert review.current() == place
        review.bring()
        assert human(workspace) == {}
        assert not any(workspace.human.rglob("*.png"))
        assert review.undo(review.state()) is None
        assert json.loads(workspace.reviewed.read_bytes()) == {}


def test_what_was_answered_before_a_kill_is_imported_by_the_next_review(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
    assert human(workspace) == {}
    with reviewing(workspace, "bob") as review:
        assert review.bring().images == 2
    assert set(human(workspace)) == {"a", "set/b"}


def test_answers_are_kept_while_a_run_holds_the_workspace(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
        with held(workspace) as pid:
            imported = review.bring()
            assert imported.waiting == 2
            assert imported.why is not None
            assert f"is in use by process {pid}" in imported.why
            assert "answers are kept, and their masks follow when it has ended" in imported.why
        assert len(read_answers(workspace, "ann")) == 4
        assert review.bring()[1:] == (0, None)
    assert set(human(workspace)) == {"a", "set/b"}


def test_a_killed_import_is_completed_and_its_mask_is_known(workspace: Workspace, monkeypatch) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")

        def killed(*given: object, **_: object) -> None:
            publish_corrections(*given)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("desra_core.annotations.review.publish_corrections", killed)
            with pytest.raises(KeyboardInterrupt):
                review.bring()
    with reviewing(workspace) as review:
        assert review.left_out == 0
        review.bring()
        review.undo(review.state())
        review.bring()
    assert len(human(workspace)) == 1


def test_imports_that_fail_one_after_the_other_do_not_make_a_mask_somebody_elses(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        place = review.current()
        assert place is not None
        while review.current():
            say(review, "accept")
        review.bring()
        review.draw(place.key, Stroke(((1, 1),), 1), review.state())
        parked = workspace.imports.rename(workspace.imports.with_name("parked"))
        workspace.imports.write_bytes(b"")  # no folder, so that nothing can be written below it
        for _ in range(2):
            assert "imports" in str(review.bring().why)
        workspace.imports.unlink()
        parked.rename(workspace.imports)
        assert not human(workspace)[place.image.name][1, 1]
        assert review.bring()[1:] == (0, None)
        assert human(workspace)[place.image.name][1, 1]
    with reviewing(workspace) as review:
        assert review.left_out == 0


def test_an_unsure_region_is_not_decided_and_is_asked_again_in_the_next_review(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        first = say(review, "unsure")
        while review.current():
            assert say(review, "accept") != first
        review.bring()
        assert review.images[0].name not in human(workspace) or review.images[1].name not in human(workspace)
    with reviewing(workspace) as review:
        assert review.counts()["left"] == 1
        assert say(review, "accept") == first
        review.bring()
    assert set(human(workspace)) == {"a", "set/b"}


def test_next_asks_about_a_region_after_the_others(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        order = [place.key for place in _left(review)]
        review.skip(order[0])
        assert [place.key for place in _left(review)] == [*order[1:], order[0]]
        assert read_answers(workspace, "ann") == []


def test_a_clean_image_rejects_all_its_regions_and_strokes(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        place = next(place for place in _left(review) if place.image.name == "a")
        review.draw(place.key, Stroke(((1, 1),), 3), review.state())
        assert review.mask(place.image)[1, 1]
        review.answer(place.key, "clean", review.state())
        assert [left.image.name for left in _left(review)] == ["set/b"]
        review.bring()
        assert not human(workspace)["a"].any()
        assert review.undo(review.state()).answer == "clean"  # type: ignore[union-attr]
        assert review.current().image.name == "a"  # type: ignore[union-attr]
        assert review.mask(place.image)[1, 1]


def test_a_clean_image_of_one_rater_leaves_the_strokes_of_others_until_more_say_so(workspace: Workspace) -> None:
    with reviewing(workspace, "ann", passes=2) as ann, reviewing(workspace, "bob", passes=2) as bob:
        place = next(place for place in _left(ann) if place.image.name == "a")
        ann.draw(place.key, Stroke(((1, 1),), 0), ann.state())
        while ann.current():
            say(ann, "accept")
        bob.draw(place.key, Stroke(((3, 3),), 0), bob.state())
        bob.answer(place.key, "clean", bob.state())
        mask = bob.mask(place.image)
        assert mask[1, 1]
        assert not mask[3, 3]  # bob's own
        with reviewing(workspace, "cat", passes=2) as cat:
            cat.answer(place.key, "clean", cat.state())
            cat.bring()
            assert not human(workspace)["a"].any()
            cat.draw(place.key, Stroke(((5, 5),), 0), cat.state())  # so it is not clean to cat any more
            assert cat.mask(place.image)[[1, 5], [1, 5]].all()


def test_strokes_mend_the_mask_in_their_order(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        (place,) = (place for place in _left(review) if place.image.name == "set/b")
        for stroke in (Stroke(((0, 0), (50, 0)), 4), Stroke(((35, 0), (35, 119)), 2, erase=True)):
            review.draw(place.key, stroke, review.state())
        assert review.current() is not None
        review.answer(place.key, "accept", review.state())
        review.bring()
        expected = MASKS["set/b"].copy()
        expected[:5, :51] = True
        y, x = np.mgrid[:5, 51:60]
        expected[:5, 51:60] |= (x - 50) ** 2 + y**2 <= 16
        expected[:, 33:38] = False
        assert np.array_equal(human(workspace)["set/b"], expected)
        region, detected = review.region_masks(place, Rectangle(0, 0, *SIZE))
        assert np.array_equal(region, MASKS["set/b"])
        assert np.array_equal(detected, MASKS["set/b"])
        review.undo(review.state())
        review.undo(review.state())
        review.answer(place.key, "accept", review.state())
        review.bring()
        assert human(workspace)["set/b"][:, 33:38].any()


@given(
    points=st.lists(st.tuples(st.integers(-10, 40), st.integers(-10, 30)), min_size=1, max_size=4),
    radius=st.integers(0, 6),
    erase=st.booleans(),
)
def test_a_stroke_marks_the_pixels_near_its_line(points, radius: int, erase: bool) -> None:
    mask = np.full((20, 30), erase)
    draw_stroke(mask, Stroke(tuple(points), radius, erase))
    line = [*points, points[-1]]
    for y in range(20):
        for x in range(30):
            near = False
            for (x0, y0), (x1, y1) in pairwise(line):
                dx, dy = x1 - x0, y1 - y0
                share = max(0.0, min(1.0, ((x - x0) * dx + (y - y0) * dy) / ((dx * dx + dy * dy) or 1)))
                near |= abs(complex(x0 + share * dx - x, y0 + share * dy - y)) <= radius + 1e-9
            assert mask[y, x] == (near != erase)


def test_raters_share_the_work_and_see_what_the_others_have_not_done(workspace: Workspace) -> None:
    with reviewing(workspace, "ann") as ann, reviewing(workspace, "bob") as bob:
        asked = []
        while ann.current():
            asked.append(say(ann, "accept"))
            if bob.current():
                asked.append(say(bob, "accept"))
        assert bob.current() is None
        assert len(asked) == len(set(asked)) == 4
        ann.bring()
    assert set(human(workspace)) == {"a", "set/b"}


def test_with_two_passes_each_region_has_two_answers_and_disagreement_goes_to_a_third(workspace: Workspace) -> None:
    with reviewing(workspace, "ann", passes=2) as ann, reviewing(workspace, "bob", passes=2) as bob:
        for number in range(4):
            say(ann, "accept")
            say(bob, "accept" if number else "reject")
        assert ann.current() is bob.current() is None
        ann.bring()
        assert len(human(workspace)) == 1
        agreed = ann.agreement()
        assert (agreed.regions, agreed.raters, agreed.share) == (4, 2, 0.75)
        with reviewing(workspace, "cat", passes=2) as cat:
            assert cat.counts()["left"] == 1
            say(cat, "accept")
            cat.bring()
    assert set(human(workspace)) == {"a", "set/b"}
    assert human(workspace)["a"].sum() == MASKS["a"].sum()


def test_another_tab_that_has_answered_is_noticed(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        place, shown = review.current(), review.state()
        assert place is not None
        review.answer(place.key, "accept", shown)
        for act in (
            lambda: review.answer(place.key, "reject", shown),
            lambda: review.undo(shown),
            lambda: review.draw(place.key, Stroke(((1, 1),), 1), shown),
        ):
            with pytest.raises(StaleError, match="this tab: is behind: another tab of this rater has answered; here"):
                act()
        assert [one.answer for one in read_answers(workspace, "ann")] == ["accept"]


def test_answers_on_another_model_do_not_count(workspace: Workspace) -> None:
    with open_answers(workspace, "ann") as file, open_answers(workspace, "bob") as other:
        review = Review(workspace, file, "ann")
        while place := review.current():
            written = review.answer(place.key, "reject", review.state())
            other.append(dataclasses.replace(written, rater="bob", gan_sr_key="another", answer="accept"))
    workspace.answers("ann").unlink()
    with reviewing(workspace) as review:
        assert review.counts() == {"answered": 0, "left": 4, "all": 4}
        assert review.agreement().regions == 0


def test_a_mask_of_another_result_is_not_imported_and_says_so(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
        document = json.loads(workspace.settings.read_bytes())
        document["target"]["gan_sr_key"] = "another"
        workspace.settings.write_text(json.dumps(document))
        review.bring()
        assert sorted(review.failed.values()) == [
            f"the review of {name}: is about another result than the workspace holds; start desra review again"
            for name in ("a", "set/b")
        ]
    assert not workspace.human_manifest.exists() or human(workspace) == {}


def test_a_mask_that_a_run_has_changed_meanwhile_is_not_imported(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
        workspace.mask("a").write_bytes(encode_mask(boxes((5, 5))))
        review.bring()
        (failed,) = review.failed.values()
        assert failed.endswith("a.png: is not the mask whose regions are reviewed; start desra review again")
    assert set(human(workspace)) == {"set/b"}


def test_masks_that_are_gone_do_not_count_as_imported(workspace: Workspace, tmp_path: Path) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
        assert review.bring().images == 2
        give(workspace, tmp_path / "out", "a")  # in place of the review's
        assert review.imported().images == 1
        with workspace.locked() as locked:
            undo_import(locked)
            undo_import(locked)
        assert review.imported().images == 0


def test_masks_that_people_gave_elsewhere_stay_and_are_not_asked_about(workspace: Workspace, tmp_path: Path) -> None:
    with reviewing(workspace) as review:
        say_on(review, "set/b")
        give(workspace, tmp_path / "out", "a")  # during the review
        while review.current():
            say(review, "reject")
        review.bring()
    found = human(workspace)
    assert not found["a"].any()
    assert found["set/b"].any()
    with reviewing(workspace) as review:
        assert (review.left_out, [image.name for image in review.images]) == (1, ["set/b"])


def say_on(review: Review, name: str) -> None:
    place = next(place for place in _left(review) if place.image.name == name)
    review.answer(place.key, "accept", review.state())


def give(workspace: Workspace, folder: Path, name: str) -> None:
    """Import an empty mask of an image, as a person saves it in LabelMe."""
    export_workspace(workspace, folder, "labelme")
    for path in folder.rglob("*.json"):
        if path.stem == name:
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"shapes": []}))
    with workspace.locked() as locked:
        corrections, errors = read_corrections(locked, "labelme", folder / f"{name}.json")
        assert errors == []
        publish_corrections(locked, corrections)


def test_images_without_regions_are_asked_about_on_demand(workspace: Workspace) -> None:
    with reviewing(workspace, everything=True) as review:
        *_, last = _left(review)
        assert (last.image.name, last.key[1]) == ("c", None)
        review.draw(last.key, Stroke(((80, 60),), 5), review.state())
        review.answer(last.key, "accept", review.state())
        review.bring()
        assert 75 <= human(workspace)["c"].sum() <= 85
        review.undo(review.state())
        assert review.current() == last
        review.answer(last.key, "clean", review.state())
        review.bring()
        assert not human(workspace)["c"].any()


def test_a_rating_counts_for_itself(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        while review.current():
            say(review, "accept")
    with (
        reviewing(workspace, rating=True, passes=None) as ann,
        reviewing(workspace, "bob", rating=True, passes=2) as bob,
    ):
        orders = [[place.key for place in _left(review)] for review in (ann, bob)]
        assert sorted(orders[0]) == sorted(orders[1])
        assert len(orders[0]) == 4
        say(ann, "yes")
        with pytest.raises(UsageError, match="is none; give one of yes, no"):
            say(ann, "accept")
        while ann.current():
            say(ann, "no")
        while bob.current():
            say(bob, "no")
        assert ann.agreement().share == 0.75
        assert ann.counts()["left"] == 0
        with reviewing(workspace, "cat", rating=True, passes=2) as cat, pytest.raises(AssertionError):
            say(cat, "yes")  # two have rated already
    assert human(workspace) == {}


def test_checks_are_asked_now_and_then_and_decide_nothing(make_workspace) -> None:
    corners = [(x, y) for x in range(5, 130, 40) for y in range(5, 100, 30)]
    workspace = make_workspace({f"i{number}": boxes(*corners) for number in range(2)} | {"other": boxes((0, 0))})
    with reviewing(workspace, "expert") as expert:
        (other,) = (place for place in _left(expert) if place.image.name == "other")
        expert.answer(other.key, "reject", expert.state())
    with reviewing(workspace, "ann", checks="expert", passes=1) as ann:
        asked = []
        while place := ann.current():
            asked.append(ann.answer(place.key, "accept", ann.state()).check)
        assert [index for index, check in enumerate(asked) if check] == [CHECK_EVERY - 1]
        assert ann.checked() == (1, 0)
        assert ann.agreement() == RaterAgreement(0, 0, None, None)
    (check,) = (one for one in read_answers(workspace, "ann") if one.check)
    assert (check.key, check.answer, check.check) == (other.key, "accept", "reject")
    with pytest.raises(
        UsageError, match="--checks: nobody has answered nothing here; name a rater who has: ann, expert"
    ):
        reviewing(workspace, "dan", checks="nobody").__enter__()
    with pytest.raises(
        UsageError, match="--checks: ann has answered no region that is asked about; name a rater who has"
    ):
        reviewing(workspace, "dan", checks="ann", rating=True).__enter__()


def test_a_check_that_is_answered_by_a_clean_image_decides_nothing_either(make_workspace) -> None:
    corners = [(x, y) for x in range(5, 130, 40) for y in range(5, 100, 30)]
    workspace = make_workspace({"many": boxes(*corners), "other": boxes((0, 0), (60, 60))})
    with reviewing(workspace, "expert") as expert:
        for place in [place for place in _left(expert) if place.image.name == "other"]:
            expert.answer(place.key, "reject" if place.key[1] == (0, 0, 30, 20) else "accept", expert.state())
        expert.bring()
        before = human(workspace)["other"]
    with reviewing(workspace, "ann", checks="expert") as ann:
        while place := ann.current():
            ann.answer(place.key, "clean" if place.image.name == "other" else "accept", ann.state())
        (check,) = (one for one in read_answers(workspace, "ann") if one.answer == "clean")
        assert check.box is not None
        assert ann.checked() == (1, check.check == "reject")
        assert ann.agreement().regions == 0
        ann.bring()
    assert np.array_equal(human(workspace)["other"], before)


def test_known_answers_are_those_that_stand(workspace: Workspace) -> None:
    with reviewing(workspace, "expert") as expert, open_answers(workspace, "older") as older:
        place = next(place for place in _left(expert) if place.image.name == "a")
        accepted = expert.answer(place.key, "accept", expert.state())
        expert.answer(place.key, "clean", expert.state())
        older.append(dataclasses.replace(accepted, rater="older", gan_sr_key="another"))
        older.append(dataclasses.replace(accepted, rater="older", area=1))
    with reviewing(workspace, checks="expert") as ann:
        assert list(ann._known.values()) == ["reject"] * 3
    with pytest.raises(UsageError, match="--checks: older has answered no region that is asked about"):
        reviewing(workspace, "dan", checks="older").__enter__()


def test_a_known_answer_is_one_of_two_passes(workspace: Workspace) -> None:
    with reviewing(workspace, "expert", passes=2) as expert:
        while expert.current():
            say(expert, "accept")
    with reviewing(workspace, "ann", passes=2, checks="expert") as ann:
        assert ann.counts()["left"] == 4
        while ann.current():
            say(ann, "accept")
        assert ann.agreement().regions == 4
        assert ann.checked() == (0, 0)
        ann.bring()
    assert set(human(workspace)) == {"a", "set/b"}


def test_a_workspace_without_regions_is_refused(make_workspace) -> None:
    with pytest.raises(UsageError, match="has no region to review; mine or detect first; --all asks about images"):
        reviewing(make_workspace({"c": boxes()})).__enter__()


@pytest.mark.parametrize(
    ("votes", "passes", "outcome"),
    [({}, 1, None), ({"a": "accept"}, 1, True), ({"a": "reject"}, 1, False), ({"a": "unsure"}, 1, None),
     ({"a": "accept"}, 2, None), ({"a": "accept", "b": "reject"}, 1, None), ({"a": "clean", "b": "unsure"}, 1, False),
     ({"a": "accept", "b": "reject", "c": "accept"}, 2, True)],
)  # fmt: skip
def test_decisions(votes, passes: int, outcome: bool | None) -> None:
    assert decided(votes, passes) is outcome


def test_cohens_kappa() -> None:
    """The example of 50 grant applications, with kappa 0.4."""
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    found = agreement([{"a": one, "b": two} for one, two in pairs] + [{"a": "yes"}])
    assert found[:3] == (50, 2, 0.7)
    assert found.kappa == pytest.approx(0.4)


def test_fleiss_kappa() -> None:
    """Fleiss' own form, over a table of counts: the example of ten subjects and fourteen raters, with kappa 0.210."""
    table = np.array(
        [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
         [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    )  # fmt: skip
    each = (table * (table - 1)).sum(axis=1) / (14 * 13)
    by_chance = ((table.sum(axis=0) / table.sum()) ** 2).sum()
    regions = [
        {str(rater): str(answer) for rater, answer in enumerate(np.repeat(np.arange(5), counts))} for counts in table
    ]
    found = agreement(regions)
    assert found.kappa == pytest.approx((each.mean() - by_chance) / (1 - by_chance))
    assert found.kappa == pytest.approx(0.210, abs=5e-4)


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["yes", "no"])), max_size=12))
def test_agreement_is_the_share_of_equal_pairs(regions) -> None:
    found = agreement(regions)
    shares = [Counter(a == b for a, b in combinations(votes.values(), 2)) for votes in regions if len(votes) > 1]
    assert found.regions == len(shares)
    if shares:
        assert found.share == pytest.approx(np.mean([count[True] / count.total() for count in shares]))
    if found.kappa is not None:
        assert found.kappa <= 1
    assert (found.kappa is None) == (
        len({answer for votes in regions if len(votes) > 1 for answer in votes.values()}) < 2
    )


def test_boxes_of_records_are_those_of_opencv(workspace: Workspace) -> None:
    with reviewing(workspace) as review:
        mask = MASKS["a"].astype(np.uint8)
        found = {tuple(box) for box in cv2.connectedComponentsWithStats(mask)[2][1:, :4].tolist()}
        assert {box_of(place.region) for place in _left(review) if place.image.name == "a"} == found


def test_the_pseudo_gt_of_a_mined_image_follows_its_answers(make_models, make_photos, tmp_path: Path) -> None:
    mse, gan = make_models(tmp_path / "models")
    make_photos(tmp_path / "photos", 2)
    workspace = process(
        Mining(photos=tmp_path / "photos", mse_model=mse, gan_model=gan, workspace=tmp_path / "ws", keep="maps")
    )
    with reviewing(workspace) as review:
        place = review.current()
        assert place is not None
        name, (height, width) = place.image.name, place.image.shape
        before = read_image(workspace.dataset("pseudo_gt", name))
        review.draw(place.key, Stroke(((0, 0), (width, 0)), 3), review.state())
        while review.current():
            say(review, "reject")
        review.bring()
        drawn = np.zeros((height, width), bool)
        drawn[:4] = True
        assert np.array_equal(human(workspace)[name], drawn)
        mse_sr, gan_sr, found = (
            read_image(workspace.dataset(kind, name)) for kind in ("mse_sr", "gan_sr", "pseudo_gt")
        )
        assert np.array_equal(found, np.where(drawn[..., np.newaxis], mse_sr, gan_sr))
        while review.undo(review.state()):
            pass
        review.bring()
        assert human(workspace) == {}
        assert np.array_equal(read_image(workspace.dataset("pseudo_gt", name)), before)
