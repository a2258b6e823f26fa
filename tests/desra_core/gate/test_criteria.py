"""Scores compared with sums by hand, and the gate at each of its thresholds."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from desra_core.evaluation.metrics import wilson_interval
from desra_core.gate.criteria import Judgement, NewRegion, OldRegion, Score, Verdict, decide, score, score_rows
from desra_core.gate.judge import detect, judge, noisy
from desra_core.settings.models import Gate

PLAIN = Judgement(
    image="a", id="0", candidate="new", pixels=1000, regions=[], added=[], artifact_pixels_before=0,
    artifact_pixels_after=0, outside_pixels=1000, squared_error=0, ssim=1, gradient_similarity=1, lpips=None,
    sharpness_before=10, sharpness_after=10,
)  # fmt: skip
GOOD = Score(
    candidate="good", images=150, clean_images=50, regions=200, gone=180, removal=0.9, removal_interval=(0.85, 0.93),
    images_added=0, addition=0, addition_interval=(0, 0.02), regions_added=0, area_before=10**6, area_after=10**5,
    psnr=40, ssim=0.99, gradient_similarity=0.98, lpips=None, detail_loss=0.01, classes={"": (200, 180)},
)  # fmt: skip
CONTROL = replace(GOOD, candidate="control", gone=0, removal=0, detail_loss=0, psnr=45)
GATE = Gate()
VERDICT = TypeAdapter(Verdict)


def fate(class_name: str | None, gone: bool) -> OldRegion:
    return OldRegion(0, 0, 10, 10, 100, class_name, 30.0, gone)


def test_score_by_hand() -> None:
    new = NewRegion(0, 0, 9, 9, 70, "sky", 20.0)
    judgements = [
        replace(PLAIN, regions=[fate("sky", True), fate("tree", False)], artifact_pixels_before=200,
                artifact_pixels_after=120, outside_pixels=800, squared_error=800, ssim=0.9, gradient_similarity=0.8,
                sharpness_before=99, sharpness_after=1, lpips=0.25),
        replace(PLAIN, regions=[fate("sky", True)], added=[new, new], artifact_pixels_before=100,
                artifact_pixels_after=150, outside_pixels=900, squared_error=1000, ssim=0.8, lpips=0.5,
                iou_before=0.5, iou_after=0.0),
        replace(PLAIN, added=[new], artifact_pixels_after=70, sharpness_after=9, iou_before=0.25, iou_after=0.25),
        replace(PLAIN, sharpness_before=30, sharpness_after=29),
    ]  # fmt: skip
    assert score("new", judgements) == Score(
        candidate="new",
        images=4,
        clean_images=2,
        regions=3,
        gone=2,
        removal=2 / 3,
        removal_interval=wilson_interval(2, 3),
        images_added=2,
        addition=0.5,
        addition_interval=wilson_interval(2, 4),
        regions_added=3,
        area_before=300,
        area_after=340,
        psnr=pytest.approx(10 * math.log10(255**2 * 3700 / 1800)),
        ssim=pytest.approx((800 * 0.9 + 900 * 0.8 + 2000) / 3700),
        gradient_similarity=pytest.approx((800 * 0.8 + 2900) / 3700),
        lpips=0.375,
        detail_loss=pytest.approx(1 - 38 / 40),
        classes={"sky": (2, 2), "tree": (1, 0)},
        human_images=2,
        iou_before=0.375,
        iou_after=0.125,
        delta_iou=-25,
    )


def test_iou_is_told_where_people_have_drawn() -> None:
    """Also where they have drawn on images of one candidate alone."""
    drawn = replace(GOOD, human_images=3, iou_before=0.511, iou_after=0.129, delta_iou=-38.2)
    told = [row["IoU with people"] for row in score_rows(decide([drawn, GOOD], CONTROL, GATE))]
    assert told == ["51.1 to 12.9, -38.2", "", ""]
    assert "IoU with people" not in score_rows(decide([GOOD], CONTROL, GATE))[0]


def test_classes_are_ordered_by_their_regions() -> None:
    regions = [fate(name, False) for name in ("wall", "tree", "sky", "tree")]
    assert list(score("new", [replace(PLAIN, regions=regions)]).classes) == ["tree", "sky", "wall"]
    unlabelled = score("new", [replace(PLAIN, regions=[fate(None, True), fate(None, False)])])
    assert unlabelled.classes == {"": (2, 1)}


def test_score_of_nothing() -> None:
    empty = score("new", [])
    undefined = (empty.removal, empty.addition, empty.psnr, empty.ssim, empty.gradient_similarity, empty.detail_loss)
    assert undefined == (None,) * 6
    assert empty.removal_interval == empty.addition_interval == (0, 1)
    assert empty.classes == {}


def test_score_of_a_candidate_that_changes_nothing() -> None:
    equal = score("new", [replace(PLAIN, regions=[fate(None, False)]), PLAIN])
    assert (equal.psnr, equal.ssim, equal.gradient_similarity, equal.detail_loss) == (None, 1, 1, 0)
    assert (equal.removal, equal.addition, equal.lpips) == (0, 0, None)
    blank = score("new", [replace(PLAIN, sharpness_before=0, sharpness_after=0)])
    assert blank.detail_loss is None


CRITERIA = [
    ({"removal": 0.75}, None),
    ({"removal": 0.7499, "gone": 150, "regions": 200}, "150 of 200 artifact regions are gone, 74.99 % (95 % interval: "
     "85 to 93 %), where 75 % are asked for."),
    ({"removal": None, "regions": 0, "gone": 0}, "No held-out image has an artifact region, so nothing shows that "
     "artifacts are deleted."),
    ({"images_added": 2}, None),
    ({"images_added": 3}, "3 of 150 images gained an artifact region; of the control, which is noise of 2 "
     "grey levels, 2 did."),
    ({"detail_loss": 0.1}, None),
    ({"detail_loss": -0.2}, None),
    ({"detail_loss": 0.1001}, "Clean images lost 10.01 % of their sharpness, where 10 % are tolerated."),
    ({"detail_loss": None}, "No clean image with detail was judged, so nothing shows that detail was kept."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), CRITERIA)
def test_each_criterion_at_its_threshold(change: dict[str, float], reason: str | None) -> None:
    verdict = decide([replace(GOOD, **change)], replace(CONTROL, images_added=2), GATE)
    assert verdict.passed == (reason is None)
    assert verdict.best == "good"
    assert verdict.reasons == (() if reason is None else (reason,))
    assert verdict.undecided == (None in change.values())
    assert verdict.outcome == ("passed" if reason is None else "undecided" if verdict.undecided else "failed")


def test_a_missed_criterion_fails_even_where_another_cannot_be_shown() -> None:
    unshown = {"detail_loss": None}
    added = replace(GOOD, images_added=1, **unshown)
    verdict = decide([added], CONTROL, GATE)
    assert (verdict.outcome, len(verdict.reasons)) == ("failed", 2)
    verdict = decide([added, replace(GOOD, candidate="other", **unshown)], CONTROL, GATE)
    assert (verdict.outcome, verdict.best, len(verdict.reasons)) == ("undecided", "other", 1)
    nothing = decide([score("new", [])], score("control", []), GATE)
    assert (nothing.outcome, len(nothing.reasons)) == ("undecided", 2)
    assert decide([], CONTROL, GATE).outcome == "failed"


def test_older_verdicts_are_never_undecided_and_drop_nobody() -> None:
    document = VERDICT.dump_python(decide([GOOD], CONTROL, GATE))
    assert document.pop("undecided") is False
    assert document.pop("dropped") == ()
    assert VERDICT.validate_python(document) == decide([GOOD], CONTROL, GATE)


def test_thresholds_are_those_of_the_gate() -> None:
    strict = Gate(min_removal=0.95, max_detail_loss=0.005)
    verdict = decide([GOOD], CONTROL, strict)
    assert not verdict.passed
    assert len(verdict.reasons) == 2
    assert verdict.thresholds == {"min_removal": 0.95, "max_detail_loss": 0.005}
    assert decide([GOOD], CONTROL, GATE).passed


RANKINGS = [
    # The first of each row is the best one.
    ({"removal": 0.9}, {"removal": 0.89, "psnr": 50}),
    ({"removal": 0.8, "detail_loss": 0.02}, {"removal": 0.99, "detail_loss": 0.04}),
    ({"removal": 0.99, "detail_loss": 0.03}, {"removal": 0.8, "detail_loss": 0.02}),
    ({"removal": 0.8}, {"removal": 0.99, "detail_loss": 0.11}),
    ({"removal": 0.8, "detail_loss": 0, "psnr": 41}, {"removal": 0.8, "detail_loss": -0.2}),
    ({"removal": 0.8}, {"removal": 0.99, "images_added": 1}),
    ({"detail_loss": 0.01}, {"detail_loss": 0.02, "psnr": 50}),
    ({"psnr": 41}, {"psnr": 40}),
    ({"psnr": None}, {"psnr": 60}),
    ({"removal": 0.5}, {"removal": 0.74, "images_added": 1}),
    ({"removal": 0.5}, {"removal": 0.4, "detail_loss": 0}),
    ({"removal": 0.1}, {"removal": None, "detail_loss": 0}),
    ({"detail_loss": 0.5}, {"detail_loss": None}),
    ({}, {}),
]


@pytest.mark.parametrize(("better", "worse"), RANKINGS)
def test_the_best_candidate(better: dict[str, float], worse: dict[str, float]) -> None:
    first, second = replace(GOOD, candidate="1", **better), replace(GOOD, candidate="2", **worse)
    assert decide([first, second], CONTROL, GATE).best == "1"
    if better != worse:
        assert decide([second, first], CONTROL, GATE).best == "1"


def test_scores_stay_in_their_order() -> None:
    candidates = [replace(GOOD, candidate=name, removal=removal) for name, removal in (("a", 0.1), ("b", 0.8))]
    verdict = decide(candidates, CONTROL, GATE)
    assert verdict.scores == tuple(candidates)
    assert verdict.passed
    assert verdict.reasons == ()


def test_a_dropped_candidate_is_listed_but_never_the_best() -> None:
    scores = [replace(GOOD, candidate="a", images=8, removal=1), GOOD, replace(GOOD, candidate="b", images=9)]
    verdict = decide(scores, CONTROL, GATE, dropped={"b", "a"})
    assert (verdict.best, verdict.dropped, verdict.scores) == ("good", ("a", "b"), tuple(scores))
    told = [row["judged on"] for row in score_rows(verdict)]
    assert told == ["8 images, dropped", "150 images", "9 images, dropped", "150 images"]
    assert "judged on" not in score_rows(decide(scores, CONTROL, GATE))[0]


def test_no_candidate() -> None:
    verdict = decide([], CONTROL, GATE)
    assert not verdict.passed
    assert verdict.best is None
    assert verdict.reasons == ("There is no candidate.",)


SHARES = st.none() | st.floats(0, 1)
INTERVALS = st.tuples(st.floats(0, 1), st.floats(0, 1))
SCORES = st.builds(
    Score,
    removal=SHARES,
    removal_interval=INTERVALS,
    addition=SHARES,
    addition_interval=INTERVALS,
    psnr=st.none() | st.floats(0, 100),
    ssim=SHARES,
    gradient_similarity=SHARES,
    lpips=SHARES,
    detail_loss=st.none() | st.floats(-1, 1),
    classes=st.dictionaries(st.text(), st.tuples(st.integers(0), st.integers(0)), max_size=3),
)


@settings(deadline=None, max_examples=20)
@given(st.lists(SCORES, max_size=3), SCORES)
def test_verdicts_survive_json(scores: list[Score], control: Score) -> None:
    verdict = decide(scores, control, GATE)
    assert VERDICT.validate_json(VERDICT.dump_json(verdict)) == verdict
    assert verdict.passed == (verdict.reasons == ())


def test_gate_settings() -> None:
    limits = {"min_removal": 0.75, "max_detail_loss": 0.1, "held_out": 100, "clean": 50}
    assert GATE.model_dump() == limits | {"rounds": True}
    assert all(field.description for field in Gate.model_fields.values())
    for wrong in ({"min_removal": 1.01}, {"max_detail_loss": -0.1}, {"held_out": 0}, {"clean": 0}, {"removal": 1}):
        with pytest.raises(ValidationError):
            Gate(**wrong)


def test_the_gate_is_light_to_import() -> None:
    code = (
        "import sys, desra_core.gate.criteria\n"
        "assert not {'torch', 'numba', 'skimage', 'lpips', 'prefect', 'dask'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def held_out(seed: int, blotch: bool) -> tuple[np.ndarray, np.ndarray]:
    """A pair of results: a smooth one, and one with fine texture and maybe a blotch of wrong texture."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3)).astype(np.float32), (0, 0), 4)
    mse_sr = np.clip(128 + 3 * (smooth - 128), 30, 225)
    gan_sr = mse_sr + rng.normal(0, 4, mse_sr.shape)
    if blotch:
        gan_sr[30:90, 40:110] += rng.normal(0, 45, (60, 70, 3))
    return mse_sr.astype(np.uint8), np.clip(gan_sr, 0, 255).astype(np.uint8)


def verdict_of(model) -> Verdict:
    """Decide on a candidate ``model(mse_sr, gan_sr, mask)`` by four images with an artifact and two without."""
    judgements: dict[str, list[Judgement]] = {"new": [], "control": []}
    for seed in range(6):
        mse_sr, gan_sr = held_out(seed, seed < 4)
        before = detect(mse_sr, gan_sr, min_area=1000)
        results = {"new": model(mse_sr, gan_sr, before.mask[:, :, None]), "control": noisy(gan_sr, str(seed))}
        for name, result in results.items():
            after = detect(mse_sr, result, min_area=1000)
            judgements[name].append(judge(str(seed), str(seed), name, before, after))
    return decide([score("new", judgements["new"])], score("control", judgements["control"]), GATE)


def test_a_model_that_deletes_artifacts_only_passes() -> None:
    verdict = verdict_of(lambda mse_sr, gan_sr, mask: np.where(mask, mse_sr, gan_sr))
    assert verdict.passed
    assert (verdict.scores[0].regions, verdict.scores[0].gone, verdict.scores[0].images_added) == (4, 4, 0)
    assert verdict.scores[0].psnr is None
    assert verdict.scores[0].detail_loss == 0
    assert (verdict.control.gone, verdict.control.images_added) == (0, 0)


def test_a_model_that_blurs_fails_by_its_loss_of_detail() -> None:
    """All results become the smooth one: all artifacts are gone, and all texture with them."""
    verdict = verdict_of(lambda mse_sr, gan_sr, mask: mse_sr)
    assert verdict.scores[0].removal == 1
    assert verdict.scores[0].images_added == 0
    assert not verdict.passed
    (reason,) = verdict.reasons
    assert reason.startswith("Clean images lost ")
    mild = verdict_of(lambda mse_sr, gan_sr, mask: cv2.GaussianBlur(np.where(mask, mse_sr, gan_sr), (3, 3), 0.6))
    assert not mild.passed
    assert mild.scores[0].detail_loss > GATE.max_detail_loss


def test_a_model_that_changes_nothing_fails_by_its_removal() -> None:
    verdict = verdict_of(lambda mse_sr, gan_sr, mask: gan_sr)
    assert [reason.partition(" artifact")[0] for reason in verdict.reasons] == ["0 of 4"]


def test_a_model_that_moves_artifacts_fails_by_its_additions() -> None:
    def moved(mse_sr: np.ndarray, gan_sr: np.ndarray, mask: np.ndarray) -> np.ndarray:
        result = np.where(mask, mse_sr, gan_sr)
        result[60:, :60] = np.random.default_rng(9).integers(0, 256, (60, 60, 3))
        return result

    verdict = verdict_of(moved)
    assert verdict.scores[0].images_added >= 2
    assert any(reason.startswith(f"{verdict.scores[0].images_added} of 6 images gained") for reason in verdict.reasons)
