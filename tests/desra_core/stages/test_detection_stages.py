"""The stages of detection on small real pairs: the files that they leave, their failures, and a second run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from desra_core import artifact_mask, find_regions, variance_similarity
from desra_core.detection.class_weights import Weights, load_weights
from desra_core.errors import ImageError, TransientError
from desra_core.files import digest
from desra_core.images.codec import encode_png
from desra_core.settings import Detection
from desra_core.stages import StageJob, failure, run_stage
from desra_core.stages.mask import mask_stage
from desra_core.stages.similarity import similarity_stage
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array
from desra_core.workspace.manifest import File, ImageRef
from desra_core.workspace.products import Record, Target, read_shard

RNG = np.random.default_rng(3)
BASE = np.clip(128 + 5 * (cv2.GaussianBlur(RNG.random((64, 72, 3)) * 255, (0, 0), 6) - 128), 40, 210)
NOISE = RNG.normal(0, 40, (64, 72, 3)) * np.pad(np.ones((34, 40, 1)), ((15, 15), (16, 16), (0, 0)))
MSE_SR = BASE.astype(np.uint8)
GAN_SR = np.clip(BASE + NOISE, 0, 255).astype(np.uint8)
JOB = StageJob(
    Detection(mse_sr="mse_sr", gan_sr="gan_sr", workspace="ws"),
    Target("similarity-key", "none", "weighting-key", 1.0, 0.7, "200", "artifacts", "mask-key"),
    load_weights("none"),
    key="",
    device="cpu",
    tile=32,
    threads=1,
    max_pixels=10**6,
)


def for_target(**changes: Any) -> StageJob:
    return replace(JOB, target=replace(JOB.target, **changes))


LABELLED = replace(for_target(segmentation_key="labels"), weights=load_weights("published"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def stored(path: Path, content: np.ndarray | bytes) -> File:
    data = content if isinstance(content, bytes) else encode_png(content)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return File(path, digest(data))


def pair(
    workspace: Workspace,
    gan_sr: np.ndarray | bytes = GAN_SR,
    mse_sr: np.ndarray | bytes = MSE_SR,
    labels: np.ndarray | bytes | None = None,
    names: tuple[str, ...] = ("a",),
) -> ImageRef:
    root = workspace.root.parent
    return ImageRef(
        id="ab" * 16,
        shard=0,
        names=names,
        mse_sr=stored(root / "mse_sr/a.png", mse_sr),
        gan_sr=stored(root / "gan_sr/a.png", gan_sr),
        lr=None,
        labels=None if labels is None else stored(root / "labels/a.png", labels),
    )


def process(image: ImageRef, workspace: Workspace, job: StageJob = JOB) -> Record:
    record = Record(image.id)
    for stage in (similarity_stage, mask_stage):
        record = run_stage(stage, image, record, workspace, job)
        if record.failed:
            break
    return record


def read_mask(workspace: Workspace, name: str = "a") -> np.ndarray:
    mask = cv2.imread(str(workspace.mask(name)), cv2.IMREAD_UNCHANGED)
    assert mask is not None
    return mask


def files(workspace: Workspace) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in workspace.root.rglob("*") if path.is_file() and path.suffix != ".json"]
    paths += list(workspace.maps.rglob("zarr.json"))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_an_artifact(workspace: Workspace) -> None:
    record = process(pair(workspace), workspace)
    similarity = variance_similarity(MSE_SR, GAN_SR)
    expected = artifact_mask(similarity, min_area=200)
    assert np.array_equal(read_mask(workspace), np.where(expected, 255, 0))
    assert np.array_equal(read_array(workspace, "ab" * 16, "similarity", key="similarity-key"), similarity)
    assert record.regions == [region._asdict() for region in find_regions(expected, similarity)]
    assert record.artifact_pixels == expected.sum() > 200
    assert (record.height, record.width, record.min_area, record.threshold) == (64, 72, 200, 0.7)
    assert (record.similarity_key, record.mask_key) == ("similarity-key", "mask-key")
    assert record.similarity_kept
    assert record.proven_weight is None
    assert set(record.seconds) == {"similarity", "mask"}
    assert read_shard(workspace, 0) == {record.id: record}


def test_masks_have_the_size_of_the_image_and_an_empty_frame(workspace: Workspace) -> None:
    noisy = RNG.integers(0, 256, MSE_SR.shape, dtype=np.uint8)
    process(pair(workspace, gan_sr=noisy), workspace)
    mask = read_mask(workspace)
    assert mask.shape == (64, 72)
    assert mask[5:-5, 5:-5].all()
    mask[5:-5, 5:-5] = 0
    assert not mask.any()


def test_another_window_has_another_frame(workspace: Workspace) -> None:
    noisy = RNG.integers(0, 256, MSE_SR.shape, dtype=np.uint8)
    process(
        pair(workspace, gan_sr=noisy), workspace, replace(JOB, settings=JOB.settings.model_copy(update={"window": 7}))
    )
    mask = read_mask(workspace)
    assert mask[3:-3, 3:-3].all()
    assert mask.sum() == 255 * 58 * 66


@pytest.mark.parametrize("gan_sr", [MSE_SR, MSE_SR // 2 * 2], ids=["equal", "alike"])
def test_a_clean_image_stores_no_map(workspace: Workspace, gan_sr: np.ndarray) -> None:
    image = pair(workspace, gan_sr=gan_sr)
    record = run_stage(similarity_stage, image, Record(image.id), workspace, JOB)
    assert not workspace.maps.exists()
    assert (record.artifact_pixels, record.proven_weight, record.similarity_kept) == (0, 1.0, False)
    assert not workspace.mask("a").exists()
    record = run_stage(mask_stage, image, record, workspace, JOB)
    assert not read_mask(workspace).any()
    assert (record.artifact_pixels, record.regions, record.proven_weight) == (0, [], 1.0)
    assert record.mask_key == "mask-key"


def test_keep_artifacts_drops_the_map_of_an_image_that_turns_out_clean(workspace: Workspace) -> None:
    """Suspect under the smallest weight, clean under the weight of its class."""
    image = pair(workspace, labels=np.zeros((64, 72), np.uint8))
    heavy = replace(LABELLED, weights=Weights(np.full(150, 20.0), "heavy"))
    record = run_stage(similarity_stage, image, Record(image.id), workspace, JOB)
    assert workspace.group(image.id).exists()
    record = run_stage(mask_stage, image, record, workspace, heavy)
    assert not workspace.group(image.id).exists()
    assert not record.similarity_kept
    assert record.proven_weight is None, "labels may change"


def test_keep_maps_keeps_all(workspace: Workspace) -> None:
    image = pair(workspace, gan_sr=MSE_SR)
    record = process(image, workspace, for_target(keep="maps"))
    assert record.similarity_kept
    assert (read_array(workspace, image.id, "similarity", key="similarity-key") == 1).all()
    assert not read_mask(workspace).any()


def test_labels_from_a_folder_weigh_and_name_regions(workspace: Workspace) -> None:
    labels = np.full((64, 72), 4, np.uint8)
    labels[:, 40:] = 16
    record = process(pair(workspace, labels=labels), workspace, LABELLED)
    weighting: dict[str, Any] = {"labels": labels, "weights": LABELLED.class_weights}
    similarity = variance_similarity(MSE_SR, GAN_SR)
    expected = artifact_mask(similarity, min_area=200, **weighting)
    assert expected.any()
    assert np.array_equal(read_mask(workspace) > 0, expected)
    assert record.regions == [region._asdict() for region in find_regions(expected, similarity, **weighting)]
    assert record.regions[0]["dominant_class"] in (4, 16)
    assert record.labels_hash == digest(encode_png(labels))


def test_every_name_gets_the_mask(workspace: Workspace) -> None:
    process(pair(workspace, names=("a", "deep/er/b", "c.jpg")), workspace)
    for name in ("deep/er/b", "c.jpg"):
        assert workspace.mask(name).read_bytes() == workspace.mask("a").read_bytes()


def test_gray_16_bits_and_colour_compare(workspace: Workspace) -> None:
    gray = (MSE_SR[:, :, :1].astype(np.uint16) * 257)[:, :, 0]
    record = process(pair(workspace, mse_sr=gray), workspace)
    assert not record.failed
    assert np.array_equal(
        read_array(workspace, "ab" * 16, "similarity", key="similarity-key"), variance_similarity(gray, GAN_SR)
    )


def test_alpha_does_not_count(workspace: Workspace) -> None:
    alpha = RNG.integers(0, 256, (64, 72, 1), dtype=np.uint8)
    record = process(pair(workspace, gan_sr=np.dstack([MSE_SR, alpha])), workspace)
    assert record.artifact_pixels == 0


def test_twice_leaves_the_same_files(workspace: Workspace) -> None:
    image = pair(workspace)
    first = process(image, workspace)
    before = files(workspace)
    second = process(image, workspace)
    after = files(workspace)
    assert {path: data for path, (data, _) in after.items()} == {path: data for path, (data, _) in before.items()}
    assert after[str(workspace.mask("a"))] == before[str(workspace.mask("a"))]
    assert replace(second, seconds={}) == replace(first, seconds={})
    assert run_stage(mask_stage, image, second, workspace, JOB).regions == first.regions


@pytest.mark.parametrize(
    ("gan_sr", "reason"),
    [
        (GAN_SR[:60], "is 72x60 but .*mse_sr/a.png is 72x64; both results"),
        (b"", "is empty"),
        (b"text", "is not an image"),
        (encode_png(GAN_SR)[:2000], "is truncated"),
    ],
    ids=["size", "empty", "text", "truncated"],
)
def test_bad_images_become_failures(workspace: Workspace, gan_sr: np.ndarray | bytes, reason: str) -> None:
    image = pair(workspace, gan_sr=gan_sr, names=("a", "b"))
    for name in image.names:
        workspace.publish(workspace.mask(name), b"of an earlier run")
    record = process(image, workspace)
    assert (record.failed_stage, record.failed_key, record.transient) == ("similarity", "mask-key", False)
    assert record.subject == str(image.gan_sr.path)
    with pytest.raises(ImageError, match=reason):
        raise record.error
    assert not any(workspace.mask(name).exists() for name in image.names)
    assert read_shard(workspace, 0)[image.id] == record


@pytest.mark.parametrize("shape", [(1, 1), (10, 10), (10, 64), (64, 10)])
def test_images_smaller_than_the_window(workspace: Workspace, shape: tuple[int, int]) -> None:
    image = pair(workspace, gan_sr=GAN_SR[: shape[0], : shape[1]], mse_sr=MSE_SR[: shape[0], : shape[1]])
    record = process(image, workspace)
    assert record.reason == f"has results of {shape[1]}x{shape[0]}, smaller than the 11 px window"


def test_the_smallest_image(workspace: Workspace) -> None:
    assert not process(pair(workspace, gan_sr=GAN_SR[:11, :11], mse_sr=MSE_SR[:11, :11]), workspace).failed
    assert read_mask(workspace).shape == (11, 11)


def test_images_larger_than_a_worker(workspace: Workspace) -> None:
    with pytest.raises(TransientError, match="more than fit into a worker's memory"):
        process(pair(workspace), workspace, replace(JOB, max_pixels=64 * 72 - 1))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((63, 72), np.uint8), "is 72x63 but its image is 72x64"),
        (np.full((64, 72), 150, np.uint8), "holds the label 150"),
        (np.zeros((64, 72, 3), np.uint8), "has colour channels"),
        (b"", "is empty"),
    ],
    ids=["size", "value", "colour", "empty"],
)
@pytest.mark.parametrize("gan_sr", [GAN_SR, MSE_SR], ids=["artifact", "clean"])
def test_bad_labels_become_failures(
    workspace: Workspace, gan_sr: np.ndarray, labels: np.ndarray | bytes, reason: str
) -> None:
    image = pair(workspace, gan_sr=gan_sr, labels=labels)
    record = process(image, workspace, LABELLED)
    assert image.labels is not None
    assert (record.failed_stage, record.subject) == ("mask", str(image.labels.path))
    assert reason in (record.reason or "")
    assert record.labels_hash == image.labels.hash
    assert not workspace.mask("a").exists()


@pytest.mark.parametrize("role", ["mse_sr", "gan_sr", "labels"])
def test_a_file_that_changes_after_the_scan_is_transient(workspace: Workspace, role: str) -> None:
    image = pair(workspace, labels=np.zeros((64, 72), np.uint8))
    changed: File = getattr(image, role)
    changed.path.write_bytes(changed.path.read_bytes() + b"more")
    with pytest.raises(TransientError, match="changed after the run had started") as caught:
        process(image, workspace, LABELLED)
    assert caught.value.subject == str(changed.path)
    assert not any(record.failed for record in read_shard(workspace, 0).values())


def test_a_vanished_file_is_named(workspace: Workspace) -> None:
    image = pair(workspace)
    image.gan_sr.path.unlink()
    with pytest.raises(TransientError, match="there is no such file"):
        process(image, workspace)


def test_a_failure_is_cleared_by_success(workspace: Workspace) -> None:
    good = pair(workspace)
    failed = failure(good, Record(good.id), "similarity", JOB.target, TransientError("a", "b", "c"))
    assert failed.transient
    record = run_stage(similarity_stage, good, failed, workspace, JOB)
    assert not record.failed
    assert record.reason is None


def test_a_record_is_small_and_plain(workspace: Workspace) -> None:
    record = process(pair(workspace), workspace)
    assert json.loads(json.dumps(asdict(record))) == asdict(record)
    assert len(json.dumps(asdict(record))) < 2000
