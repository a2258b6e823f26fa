"""``desra compare`` as a user meets it: held-out images judge what became of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import TypeAdapter

from deployments.commands.demo import make_photos as make_demo_photos
from desra_core import load_model
from desra_core.files import content_key, read_document
from desra_core.gate.comparison import decide_and_publish, plan_comparison
from desra_core.gate.criteria import Verdict
from desra_core.gate.model_registry import current_model, history
from desra_core.settings import Detection, Mining
from desra_core.settings.models import Comparing, Finetuning
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import HUMAN_MASKS
from tests.conftest import MODELS, assert_told_in_help, photo, refusal
from tests.in_process import judge_all, process, train

# At this learning rate, artifacts go within a few steps.
TINY = {"preset": "cpu", "iterations": 8, "checkpoint_every": 4, "patch": 64, "batch": 2, "discriminator_features": 4,
        "warmup": 1, "images": 5, "learning_rate": 0.02}  # fmt: skip


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    status = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (found.st_ino, found.st_mtime_ns) for path, found in status.items()}


def judged(verdict: Verdict) -> dict[str, tuple[int, int, int]]:
    """Of each candidate, regions before, those that are gone, and images with an added one."""
    return {score.candidate: (score.regions, score.gone, score.images_added) for score in verdict.scores}


@pytest.fixture(scope="module")
def place(make_models, make_photos, tmp_path_factory) -> SimpleNamespace:
    """Photos, models, the workspace of their artifacts and a finetune of it."""
    root = tmp_path_factory.mktemp("compare")
    mse, gan = make_models(root / "models")
    make_photos(root / "photos", 18)
    process(Mining(photos=root / "photos", mse_model=mse, gan_model=gan, workspace=root / "ws"))
    run = train(Finetuning(workspace=root / "ws", output=root / "run", **TINY))
    return SimpleNamespace(root=root, photos=root / "photos", mse=mse, gan=gan, ws=root / "ws", run=run)


@pytest.fixture
def copied(place, tmp_path) -> Path:
    """The workspace, to be changed."""
    return Path(shutil.copytree(place.ws, tmp_path / "ws", symlinks=True))


@pytest.fixture
def compare() -> Callable[..., tuple[Verdict, dict[str, Any]]]:
    """Judge without servers; returns the verdict and its document."""

    def run(workspace: Path, after: Path, **settings: Any) -> tuple[Verdict, dict[str, Any]]:
        place = Workspace(workspace)
        with place.locked():
            comparison = plan_comparison(Comparing(workspace=workspace, after=after, **settings))
            judge_all(comparison)
            assert judge_all(comparison) == 0
            return decide_and_publish(comparison), json.loads(place.verdict.read_bytes())

    return run


def test_a_finetune_is_judged_by_images_that_it_has_not_seen(place, copied, compare, desra, desra_here) -> None:
    compare(copied, place.run.root)
    workspace = Workspace(copied)
    document = json.loads(workspace.verdict.read_bytes())
    verdict = TypeAdapter(Verdict).validate_python(document["verdict"])
    assert [score.candidate for score in verdict.scores] == ["000004 raw", "000004 ema", "000008 raw", "000008 ema"]
    assert verdict.control.regions == 4
    assert verdict.control.gone == verdict.control.images_added == 0

    pools = {row["id"]: row["pool"] for row in pq.read_table(workspace.split).to_pylist()}
    ids = {row["name"]: row["id"] for row in pq.read_table(workspace.manifest).to_pylist()}
    assert len(document["images"]) == 6
    assert {pools[ids[name]] for name in document["images"]} == {"held_out"}
    seen = {image["name"] for image in json.loads(place.run.document.read_bytes())["images"]}
    assert seen.isdisjoint(document["images"])
    assert document["finetune"] == read_document(place.run.document)
    assert document["before"] == {"path": str(place.gan), "key": content_key(place.gan)}
    best = document["best"]
    assert best["key"] == content_key(Path(best["path"]))
    assert load_model(Path(best["file"])).scale == 4
    for picture in document["pictures"]:
        for crop in picture["crops"].values():
            assert cv2.imread(str(workspace.gate / crop)) is not None
    assert not workspace.current.exists()

    before = everything(workspace.gate) | everything(workspace.maps) | everything(workspace.masks)
    again = desra_here("compare", "--workspace", copied, "--after", place.run.root)
    assert again.returncode == 0
    assert again.stdout.startswith("nothing to do: all was judged before\njudged by 6 held-out images, 2 of them clean")
    assert f"passed   {verdict.best}\n" in again.stdout
    assert "people " not in again.stdout
    found = json.loads(desra_here("compare", "--workspace", copied, "--after", place.run.root, "--json").stdout)
    assert f"{found['outcome']}   {found['best']}\n" in again.stdout
    control, marked = found["control"], again.stdout.splitlines()[1]
    told = f"{control['images']} held-out images, {control['clean_images']} of them clean, with {control['regions']}"
    assert marked == f"judged by {told} artifact regions"
    for score in (*found["scores"], control):
        [line] = [line for line in again.stdout.splitlines() if line.startswith(score["candidate"] + " ")]
        assert f" {score['gone']} of {score['regions']} " in line
        assert f" {100 * score['removal']:.1f} % " in line
        assert ("same" if score["psnr"] is None else f"{score['psnr']:.1f} dB") in line
    assert (found["before"], found["promoted"]) == (str(place.gan), None)
    assert_told_in_help(desra_here, "compare", found)
    scored = {name for name in control if not name.endswith("_interval")}
    assert_told_in_help(desra_here, "compare", scored)
    assert everything(workspace.gate) | everything(workspace.maps) | everything(workspace.masks) == before

    with workspace.locked():
        comparison = plan_comparison(Comparing(workspace=copied, after=place.run.root))
    judged = next(image for image in comparison.images if workspace.dataset("mask", image.names[0]).exists())
    workspace.publish(workspace.human_mask(judged.names[0]), workspace.mask(judged.names[0]).read_bytes())
    row = {
        "name": judged.names[0],
        "id": judged.id,
        "gan_sr_key": comparison.target.gan_sr_key,
        "pixels": 9,
        "regions": 1,
    }
    workspace.publish_table(workspace.human_manifest, pa.Table.from_pylist([row], HUMAN_MASKS))
    again = desra("compare", "--workspace", copied, "--after", place.run.root)  # judges that image by the mask, too
    assert "people   1 image with a human mask\n" in again.stdout
    (score, *_) = json.loads(desra_here("compare", "--workspace", copied, "--after", place.run.root, "--json").stdout)[
        "scores"
    ]
    assert score["human_images"] == 1
    assert score["iou_before"] == 1  # the mask that the detector marks, drawn by a person
    assert score["delta_iou"] == pytest.approx(100 * (score["iou_after"] - 1))


def test_an_image_that_cannot_be_judged_is_named_and_judged_later(
    place, copied, make_photos, desra, compare, tmp_path
) -> None:
    photos = tmp_path / "photos"
    make_photos(photos, 18)
    process(Mining(photos=photos, mse_model=place.mse, gan_model=place.gan, workspace=copied))
    workspace = Workspace(copied)
    with workspace.locked():
        comparison = plan_comparison(Comparing(workspace=copied, after=place.run.root))
    changed = comparison.images[0].path
    content = changed.read_bytes()
    cv2.imwrite(str(changed), photo(99, bright=True))
    arguments = ("compare", "--workspace", copied, "--after", place.run.root, "--promote", "--workers", 1)
    run = desra(*arguments)
    assert run.returncode == 1, run.stderr
    assert f"failed: {changed}: changed after the run had started; run again" in run.stderr
    assert "judging 4 candidates on 6 of 6 images\n" in run.stderr
    assert "5 of 6 images, 1 failed" in run.stderr
    assert "judged by 5 held-out images" in run.stdout
    entry = workspace.root / "models/0001"
    assert f"promoted {entry / 'model.pth'}; desra rollback --workspace {copied} undoes it" in run.stdout
    document = json.loads(workspace.verdict.read_bytes())
    assert current_model(workspace) == entry / "model.pth"
    assert (entry / "model.pth").read_bytes() == Path(document["best"]["file"]).read_bytes()
    record = json.loads((entry / "model.json").read_bytes())
    assert (record["source"], record["weights"]) == (document["best"]["path"], document["best"]["weights"])
    assert [event["kind"] for event in history(workspace)] == ["origin", "promotion"]

    changed.write_bytes(content)
    assert [image.id for image, _ in comparison.missing()] == [comparison.images[0].id]
    found = json.loads(desra(*arguments, "--json").stdout)
    assert (found["failures"], found["promoted"], found["control"]["images"]) == (0, str(entry), 6)
    assert compare(copied, place.run.root)[0].control.images == 6


def test_a_model_that_fails_is_not_promoted(place, copied, compare, desra_here) -> None:
    compare(copied, place.gan)
    run = desra_here("compare", "--workspace", copied, "--after", place.gan, "--promote")
    assert run.returncode == 3, run.stderr
    assert (
        "failed   0 of 4 artifact regions are gone, 0 % (95 % interval: 0 to 49 %), where 75 % are asked for."
        in run.stdout
    )
    assert not (copied / "models").exists()


def test_a_checkpoint_alone(place, copied, make_models, compare, tmp_path) -> None:
    """Both kinds of weights where it has two, one where it has one or where they are equal."""
    both = shutil.copy(place.run.models()[0], tmp_path / "both.pth")
    kinds = torch.load(both)
    one, alike = tmp_path / "one.pth", tmp_path / "alike.pth"
    torch.save({"params": kinds["params"]}, one)
    torch.save({"params": kinds["params"], "params_ema": kinds["params"]}, alike)
    first = judged(compare(copied, both)[0])
    assert list(first) == ["both raw", "both ema"]
    for path in (one, alike):
        verdict, document = compare(copied, path)
        assert judged(verdict) == {path.stem: first["both raw"]}
        assert document["finetune"] is None
        assert document["losses"] == []


def test_the_same_model_removes_and_adds_nothing(place, copied, compare, tmp_path) -> None:
    """Neither does one that has been saved anew."""
    other = tmp_path / "other.pth"
    torch.save(torch.load(place.gan)["params"], other)
    for after in (place.gan, other):
        verdict, _ = compare(copied, after)
        [score] = verdict.scores
        assert (score.regions, score.gone, score.regions_added, score.psnr) == (4, 0, 0, None)
        assert score.detail_loss == 0
        assert not verdict.passed


def test_another_model_before_leaves_the_workspace_alone(place, copied, make_models, compare, tmp_path) -> None:
    """Its results are not those that are stored."""
    before = everything(copied / "maps") | everything(copied / "masks") | everything(copied / "dataset")
    strong = make_models(tmp_path / "strong", strength=2.0)[1]
    verdict, document = compare(copied, place.run.root, before=strong)
    assert document["before"]["path"] == str(strong)
    assert judged(verdict)["000008 raw"][1] > 0
    other = make_models(tmp_path / "other", strength=0.1)[1]
    verdict, _ = compare(copied, place.gan, mse_model=other)
    assert verdict.control.regions == 4
    assert everything(copied / "maps") | everything(copied / "masks") | everything(copied / "dataset") == before


def test_bicubic_enlargement_in_place_of_an_mse_model(place, copied, compare, make_models, tmp_path) -> None:
    verdict, document = compare(copied, place.run.root, mse_model="bicubic")
    assert document["mse_model"]["path"] == "bicubic"
    assert document["mse_model"]["key"] != document["before"]["key"]
    assert verdict.control.regions == 4
    assert judged(verdict)["000008 raw"][1] > 0
    # Mined with it, its stored results are those that judge.
    ws = tmp_path / "bicubic"
    process(Mining(photos=place.photos, mse_model="bicubic", gan_model=place.gan, workspace=ws))
    same, document = compare(ws, place.run.root)
    assert document["mse_model"]["path"] == "bicubic"
    assert judged(same) == judged(verdict)
    run = train(Finetuning(workspace=ws, output=tmp_path / "run", **TINY))
    assert read_document(run.document)["parent"]["path"] == str(place.gan)


@pytest.mark.slow
def test_smoothing_away_all_detail_is_no_way_through_the_gate(compare, desra_here, tmp_path) -> None:
    """The MSE model in place of the GAN model removes all artifacts, and what people want a GAN model for."""
    make_demo_photos(tmp_path / "photos")
    mse, gan = (MODELS / f"{kind}.pth" for kind in ("mse", "gan"))
    process(Mining(photos=tmp_path / "photos", mse_model=mse, gan_model=gan, workspace=tmp_path / "ws"))
    scenes = {"group_by": "^[a-z]+", "held_out": 2, "clean": 2}
    verdict, _ = compare(tmp_path / "ws", mse, **scenes)
    assert not verdict.passed
    [score] = verdict.scores
    assert score.removal == 1
    assert score.detail_loss > 0.1
    run = desra_here("compare", "--workspace", tmp_path / "ws", "--after", mse, "--group-by", "^[a-z]+",
                     "--held-out", 2, "--clean", 2)  # fmt: skip
    assert run.returncode == 3
    [reason] = [line for line in run.stdout.splitlines() if line.startswith("failed ")]
    assert "of their sharpness, where 10 % are tolerated" in reason
    refused = desra_here("compare", "--workspace", tmp_path / "ws", "--after", mse)
    assert "--group-by: duplicates, but this workspace was split by ^[a-z]+" in refusal(refused)


def test_labels_and_weights_count_as_in_the_workspace(place, compare, tmp_path) -> None:
    """Of two halves, one is of a class that is never marked."""
    labels = np.zeros((200, 240), np.uint8)
    labels[:, 120:] = 1
    for path in place.photos.rglob("*.png"):
        target = tmp_path / "labels" / path.relative_to(place.photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), labels)
    weights = tmp_path / "weights.csv"
    weights.write_text(
        "ade20k_index,name,weight\n" + "".join(f"{index},a,{999 if index == 1 else 1}\n" for index in range(150))
    )
    process(Mining(photos=place.photos, mse_model=place.mse, gan_model=place.gan, workspace=tmp_path / "ws",
                   segmenter=f"labels:{tmp_path / 'labels'}", weights=str(weights)))  # fmt: skip
    verdict, document = compare(tmp_path / "ws", place.run.root)
    assert list(verdict.control.classes) == ["wall"]
    boxes = [picture["region"] for picture in document["pictures"]]
    assert boxes
    assert all(box["x"] + box["width"] <= 130 for box in boxes)
    marks = {name: cv2.imread(str(Workspace(tmp_path / "ws").mask(name)), cv2.IMREAD_UNCHANGED)
             for name in document["images"]}  # fmt: skip
    assert verdict.control.area_before == sum(int((mask > 0).sum()) for mask in marks.values())


def test_results_of_other_tools(place, desra_here, compare, tmp_path) -> None:
    dataset, ws = place.ws / "dataset", tmp_path / "ws"
    process(Detection(mse_sr=dataset / "mse_sr", gan_sr=dataset / "gan_sr", workspace=ws))
    run = ("compare", "--workspace", ws, "--after", place.run.root)
    before, lr = ("--before", place.gan), ("--lr", place.photos)
    assert "records no gan model: it belongs to desra detect; give --before" in refusal(desra_here(*run, *lr))
    assert "records no LR photos; give --lr" in refusal(desra_here(*run, *before))
    verdict, document = compare(ws, place.run.root, before=place.gan, lr=place.photos)
    assert document["mse_model"] is None
    regions, gone, _ = judged(verdict)["000008 raw"]
    assert gone == regions > 0
    told = desra_here(*run, *before, *lr)
    assert "No clean image with detail was judged" in told.stdout
    assert told.returncode == 3


def test_unusable_inputs_cost_one_line_and_no_server(place, copied, make_models, desra_here, tmp_path) -> None:
    other = make_models(tmp_path / "x2", scale=2)[1]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no checkpoint")
    before = everything(copied / "maps")
    for arguments, reason in {
        ("--after", tmp_path / "missing"): "missing: does not exist",
        ("--after", tmp_path / "empty"): "empty: holds no saved model; name the folder of a finetune",
        ("--after", tmp_path / "text.pth"): "text.pth: is not a checkpoint",
        ("--after", other): "gan.pth: enlarges by 2, but",
        ("--before", other): "enlarges by 2, but",
        ("--before", tmp_path / "missing.pth"): "missing.pth: does not exist",
        ("--mse-model", other): "enlarges by",
        ("--lpips", place.gan): "gan.pth: has no features.0.weight, so it is no AlexNet",
        ("--workspace", tmp_path / "nowhere"): "nowhere: does not exist",
        ("--min-removal", "2"): "--min-removal",
    }.items():
        run = desra_here("compare", "--workspace", copied, "--after", place.run.root, *arguments)
        if arguments[0] == "--min-removal":
            assert run.returncode == 2
        else:
            assert reason in refusal(run)
    assert everything(copied / "maps") == before
    assert not (copied / "gate/verdict.json").exists()
