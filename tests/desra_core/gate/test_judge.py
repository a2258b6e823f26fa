"""The judge stage on photos whose artifacts are known, with real networks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch

from desra_core.errors import ImageError, TransientError, UsageError
from desra_core.gate import judge as judging
from desra_core.gate.comparison import Comparison, plan_comparison, verdict_of
from desra_core.gate.criteria import Judgement
from desra_core.gate.judge import CONTROL, enlarge_stage, judge_stage, read_judgement
from desra_core.settings import Mining
from desra_core.settings.models import Comparing
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import File, ImageRef
from tests.desra_core.workspace.test_human_masks import draw
from tests.in_process import judge_job, process

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mined(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("judge")
    mse, gan = make_models(root / "models")
    make_photos(root / "photos", 12)
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    return SimpleNamespace(root=root, mse=mse, gan=gan)


@pytest.fixture
def workspace(mined, tmp_path) -> Workspace:
    return Workspace(Path(shutil.copytree(mined.root / "ws", tmp_path / "ws")))


def planned(workspace: Workspace, after: Path, **settings: object) -> Comparison:
    with workspace.locked():
        return plan_comparison(Comparing(workspace=workspace.root, after=after, **settings))


def judged(image: ImageRef, missing: tuple[str, ...], workspace: Workspace, comparison: Comparison) -> None:
    judge_stage(image, missing, workspace, comparison, judge_job(comparison))


def marked_and_clean(workspace: Workspace, comparison: Comparison) -> tuple[ImageRef, ImageRef]:
    with_artifacts = [image for image in comparison.images if workspace.dataset("lr", image.names[0]).exists()]
    return with_artifacts[0], comparison.images[-1]


def published(workspace: Workspace) -> dict[str, bytes]:
    folder = workspace.gate / "judgements"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def judgements(workspace: Workspace, comparison: Comparison, image: ImageRef) -> dict[str, Judgement | None]:
    return {candidate.name: read_judgement(workspace, candidate, image) for candidate in comparison.candidates}


def test_every_candidate_and_the_control_are_judged(mined, workspace) -> None:
    """The MSE model has no artifact; the same bytes come out whenever an image is judged."""
    comparison = planned(workspace, mined.mse)
    marked, clean = marked_and_clean(workspace, comparison)
    for image in (marked, clean):
        judged(image, ("mse", CONTROL), workspace, comparison)
    found = judgements(workspace, comparison, marked)
    assert [fate.gone for fate in found["mse"].regions] == [True]
    assert [fate.gone for fate in found[CONTROL].regions] == [False]
    assert found[CONTROL].added == found["mse"].added == []
    mask = cv2.imread(str(workspace.mask(marked.names[0])), cv2.IMREAD_UNCHANGED)
    assert found["mse"].artifact_pixels_before == (mask > 0).sum()
    assert found["mse"].image == marked.names[0]
    assert judgements(workspace, comparison, clean)["mse"].clean

    before = published(workspace)
    pictures = {path.rpartition("-")[2] for path in before if path.endswith(".webp")}
    assert pictures == {"lr.webp", "mse_sr.webp", "before.webp", "after.webp"}
    assert not any(clean.id in path for path in before if path.endswith(".webp"))
    shutil.rmtree(workspace.gate / "judgements")
    for image in (clean, marked):
        judged(image, (CONTROL, "mse"), workspace, comparison)
    assert published(workspace) == before


def test_only_what_is_missing_is_judged(mined, workspace) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    judged(image, (CONTROL,), workspace, comparison)
    assert {name for name, found in judgements(workspace, comparison, image).items() if found} == {CONTROL}
    assert dict(comparison.missing())[image] == ("mse",)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"{}", b'{"labels": null}', b"\xff"])
def test_a_damaged_judgement_is_made_anew(mined, workspace, damage: bytes) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    judged(image, ("mse", CONTROL), workspace, comparison)
    whole = published(workspace)
    path = workspace.judgement(comparison.candidates[0].key, image.id)
    path.write_bytes(damage)
    assert read_judgement(workspace, comparison.candidates[0], image) is None
    assert dict(comparison.missing())[image] == ("mse",)
    judged(image, ("mse",), workspace, comparison)
    assert published(workspace) == whole


def test_a_judgement_holds_for_the_labels_it_was_made_with(mined, workspace) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    judged(image, (CONTROL,), workspace, comparison)
    labelled = dataclasses.replace(image, labels=File(Path("labels.png"), "0f"))
    assert read_judgement(workspace, comparison.candidates[-1], image) is not None
    assert read_judgement(workspace, comparison.candidates[-1], labelled) is None


def test_a_judgement_holds_for_the_mask_that_people_drew(mined, workspace, tmp_path) -> None:
    """Drawn on the old model's results; with another old model it does not count."""
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    judged(image, ("mse", CONTROL), workspace, comparison)
    assert judgements(workspace, comparison, image)["mse"].iou_before is None
    draw(workspace, {image.names[0]: (40, 40, 190, 150)})
    comparison = planned(workspace, mined.mse)
    assert comparison.human_masks == 1
    assert dict(comparison.missing())[image] == ("mse", CONTROL)
    judged(image, ("mse", CONTROL), workspace, comparison)
    assert image not in dict(comparison.missing())
    by_name = {c.name: read_judgement(workspace, c, image, comparison.human) for c in comparison.candidates}
    mask = cv2.imread(str(workspace.mask(image.names[0])), cv2.IMREAD_UNCHANGED)[5:-5, 5:-5] > 0
    human = cv2.imread(str(workspace.human_mask(image.names[0])), cv2.IMREAD_UNCHANGED)[5:-5, 5:-5] > 0
    assert by_name["mse"].iou_before == by_name[CONTROL].iou_before == (mask & human).sum() / (mask | human).sum() > 0
    assert by_name["mse"].iou_after == 0  # the MSE model has no artifact
    verdict = verdict_of(comparison)
    assert (verdict.control.human_images, verdict.control.iou_before) == (1, by_name[CONTROL].iou_before)
    assert planned(workspace, mined.gan, before=mined.mse).human == {}


def test_stored_results_serve_and_lost_ones_are_inferred(mined, workspace, monkeypatch) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    inferred = []
    super_resolve = judging.super_resolve
    monkeypatch.setattr(judging, "super_resolve", lambda *given: inferred.append(0) or super_resolve(*given))
    judged(image, ("mse", CONTROL), workspace, comparison)
    assert len(inferred) == 1
    with_stored = published(workspace)
    shutil.rmtree(workspace.gate / "judgements")
    shutil.rmtree(workspace.maps)
    inferred.clear()
    for name in ("mse", CONTROL):
        judged(image, (name,), workspace, comparison)
    assert len(inferred) == 3, "what was inferred for the first candidate serves the second one, too"
    assert published(workspace) == with_stored
    assert not workspace.maps.exists()


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_without_a_gpu_finds_all_that_one_with_a_gpu_has_inferred(mined, workspace, monkeypatch, lost) -> None:
    comparison = planned(workspace, mined.mse)
    marked, clean = marked_and_clean(workspace, comparison)
    names = ("mse", CONTROL)
    for image in (marked, clean):
        judged(image, names, workspace, comparison)
    whole = published(workspace)
    shutil.rmtree(workspace.gate / "judgements")
    shutil.rmtree(workspace.gate_results)
    for image in (marked, clean):
        enlarge_stage(image, names, workspace, comparison, judge_job(comparison))
    assert not (workspace.gate / "judgements").exists()
    if lost:
        shutil.rmtree(workspace.gate_results)
    else:
        monkeypatch.setattr(judging, "super_resolve", None)
    for image in (marked, clean):
        judged(image, names, workspace, comparison)
    assert published(workspace) == whole
    kept = [path.parent.parent.stem for path in workspace.gate_results.glob("maps/*/*/*/zarr.json")]
    assert kept == [clean.id, clean.id], "the pair of the clean image; mining keeps the other one"


def test_a_photo_that_has_changed_or_gone(mined, workspace, tmp_path) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    changed = Path(shutil.copy(image.path, tmp_path / "changed.png"))
    changed.write_bytes(changed.read_bytes() + b"0")
    for path, kind, reason in (
        (changed, TransientError, "changed after the run had started"),
        (tmp_path / "gone.png", ImageError, "gone.png: "),
    ):
        other = dataclasses.replace(image, lr=File(path, image.lr.hash))
        with pytest.raises(kind, match=reason):
            judged(other, (CONTROL,), workspace, comparison)
    assert not published(workspace)


def test_a_candidate_whose_numbers_overflow_is_refused(mined, workspace, tmp_path) -> None:
    weights = torch.load(mined.gan)["params"]
    for name in ("body.2.weight", "body.4.weight"):
        weights[name] *= 1e30
    torch.save(weights, tmp_path / "huge.pth")
    with pytest.raises(UsageError, match=r"huge\.pth: gives values that are not finite; copy or train it again"):
        planned(workspace, tmp_path / "huge.pth")


def test_results_of_two_sizes(mined, workspace, make_models, tmp_path) -> None:
    """The results in files may come from a model of another scale."""
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    other = make_models(tmp_path / "x2", scale=2)[1]
    comparison = dataclasses.replace(comparison, before=other)
    with pytest.raises(ImageError, match="becomes 120x100 and 240x200 px by the models that are compared"):
        judged(image, (CONTROL,), workspace, comparison)


def test_a_judgement_is_plain_json(mined, workspace) -> None:
    comparison = planned(workspace, mined.mse)
    image, _ = marked_and_clean(workspace, comparison)
    judged(image, (CONTROL,), workspace, comparison)
    document = json.loads(workspace.judgement(comparison.candidates[-1].key, image.id).read_bytes())
    assert document["id"] == image.id
    assert document["candidate"] == CONTROL
