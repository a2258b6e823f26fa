"""One mask against its ground truth: the valid region, classes, prominent regions, and the size of the image."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from desra_core.detection.mask import Components
from desra_core.errors import ImageError
from desra_core.evaluation.mask_files import MaskPair
from desra_core.evaluation.metrics import (
    Agreement,
    MaskRegion,
    compare_masks,
    compare_pair,
    mask_regions,
    prominent_agreement,
)
from desra_core.images.codec import encode_mask, encode_png
from tests.desra_core.evaluation.published_scripts import components, lies_inside


def saved(folder: Path, **masks: np.ndarray) -> MaskPair:
    """Write a pair of files; further arrays are labels and GAN result."""
    for name, pixels in masks.items():
        data = encode_mask(pixels) if pixels.dtype == bool else encode_png(pixels)
        (folder / f"{name}.png").write_bytes(data)
    others = {name: folder / f"{name}.png" for name in ("labels", "gan_sr") if name in masks}
    return MaskPair("a", folder / "mask.png", folder / "truth.png", **others)


def blobs(seed: int, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 2.5) > 0.51


def test_one_of_the_masks_lacks_its_frame(tmp_path: Path) -> None:
    mask, truth = blobs(1), blobs(2)
    expected = compare_masks(mask[5:-5, 5:-5], truth[5:-5, 5:-5])
    assert 0 < expected.right < expected.detected
    for one, two in ((mask, truth), (mask[5:-5, 5:-5], truth), (mask, truth[5:-5, 5:-5])):
        found = compare_pair(saved(tmp_path, mask=one, truth=two))
        assert found.agreement == expected
        assert found.shape == (60, 80)
        assert found.size_assumed == (one.shape == two.shape)
        assert len(found.marked) == expected.marked
        assert sum(region.covered for region in found.detected) == expected.right


def test_masks_of_one_size(tmp_path: Path) -> None:
    """Assumed to be the image's, unless --size, the labels or the GAN result say otherwise."""
    mask, truth = blobs(1), blobs(2)
    cropped, all_of_it = compare_masks(mask[5:-5, 5:-5], truth[5:-5, 5:-5]), compare_masks(mask, truth)
    assert cropped != all_of_it
    pair = saved(tmp_path, mask=mask, truth=truth)
    assert compare_pair(pair).agreement == cropped
    assert compare_pair(pair).marks_border
    valid = compare_pair(pair, sizes="valid")
    assert (valid.agreement, valid.shape, valid.size_assumed) == (all_of_it, (70, 90), True)
    assert compare_pair(pair._replace(whole=True), sizes="valid").agreement == cropped
    for kind, pixels in (("labels", np.zeros((70, 90), np.uint8)), ("gan_sr", np.zeros((70, 90, 3), np.uint8))):
        shown = compare_pair(saved(tmp_path, mask=mask, truth=truth, **{kind: pixels}))
        assert (shown.agreement, shown.shape, shown.size_assumed) == (all_of_it, (70, 90), False)
        shown = compare_pair(saved(tmp_path, mask=mask, truth=truth, **{kind: pixels[5:-5, 5:-5]}), sizes="valid")
        assert (shown.agreement, shown.shape, shown.size_assumed) == (cropped, (60, 80), False)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_gan_result_that_is_stored_turned(tmp_path: Path, orientation: int) -> None:
    """Its size is that of the upright picture, in every format that can record a rotation."""
    pair = saved(tmp_path, mask=blobs(1), truth=blobs(2))
    stored = Image.fromarray(np.zeros((90, 70) if orientation > 4 else (70, 90), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("tif", "png", "jpg", "webp"):
        stored.save(tmp_path / f"turned.{suffix}", exif=exif)
        assert compare_pair(pair._replace(gan_sr=tmp_path / f"turned.{suffix}")).shape == (70, 90)


def test_whether_the_mask_marks_its_frame(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:-5, 5:-5] = True
    assert not compare_pair(saved(tmp_path, mask=mask, truth=~mask)).marks_border
    mask[4, 20] = True
    assert compare_pair(saved(tmp_path, mask=mask, truth=~mask)).marks_border


def test_coordinates_are_the_images(tmp_path: Path) -> None:
    """Regions that the frame cuts are measured without it."""
    mask, truth = np.zeros((40, 50), bool), np.zeros((40, 50), bool)
    truth[0:10, 12:20] = mask[6:9, 12:20] = True
    (region,) = compare_pair(saved(tmp_path, mask=mask, truth=truth)).marked
    assert region[:6] == (12, 5, 8, 5, 40, 24)
    (region,) = compare_pair(saved(tmp_path, mask=mask[5:-5, 5:-5], truth=truth)).detected
    assert region[:6] == (12, 6, 8, 3, 24, 24)


def slow_classes(mask: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> dict[int, Agreement]:
    classes: dict[int, list[int]] = {}
    for label in np.unique(labels).tolist():
        here = labels == label
        classes[label] = [(mask & truth & here).sum(), ((mask | truth) & here).sum(), 0, 0, 0, 0,
                          (mask & here).sum(), (truth & here).sum(), here.sum(), 0]  # fmt: skip
    for column, (one, other) in ((2, (mask, truth)), (4, (truth, mask))):
        for component in components(one):
            counts = np.bincount(labels[component])
            classes[int(counts.argmax())][column] += 1
            classes[int(counts.argmax())][column + 1] += lies_inside(component, other)
    for row in classes.values():
        row[-1] = row[5]
    return {label: Agreement(*map(int, row)) for label, row in classes.items() if row[1]}


@pytest.mark.parametrize("seed", range(4))
def test_classes(tmp_path: Path, seed: int) -> None:
    mask, truth = blobs(seed), blobs(seed + 10)
    labels = np.random.default_rng(seed).choice([0, 7, 149], (60, 80)).astype(np.uint8)
    labels[:, 40:] = 12
    labels[:20, :20] = 99  # perhaps a class of pixels without a region of its own
    found = compare_pair(saved(tmp_path, mask=mask, truth=truth, labels=labels))
    inner = (slice(5, -5), slice(5, -5))
    assert found.classes == slow_classes(mask[inner], truth[inner], labels[inner])
    total = [sum(column) for column in zip(*(vars(row).values() for row in found.classes.values()), strict=True)]
    assert Agreement(*total) == found.agreement


def test_labels_that_a_workspace_stores(tmp_path: Path) -> None:
    mask, truth, labels = blobs(1), blobs(2), np.full((60, 80), 4, np.uint8)
    labels[:, 30:] = 9
    stored = zarr.create_array(tmp_path / "labels", data=labels, chunks=(32, 32))
    stored.attrs["crc32"] = zlib.crc32(labels.data)
    pair = saved(tmp_path, mask=mask, truth=truth)
    in_a_file = compare_pair(saved(tmp_path, mask=mask, truth=truth, labels=labels))
    assert compare_pair(pair._replace(labels=tmp_path / "labels")).classes == in_a_file.classes
    stored.attrs["crc32"] = 7
    with pytest.raises(ImageError, match="labels: is damaged"):
        compare_pair(pair._replace(labels=tmp_path / "labels"))


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    mask = blobs(1)
    for wrong in (np.zeros((61, 80), np.uint8), np.zeros((50, 70), np.uint8)):
        for kind in ("labels", "gan_sr"):
            with pytest.raises(
                ImageError, match=rf"{kind}.png: is {wrong.shape[1]}x{wrong.shape[0]} but .*mask.png is 80"
            ):
                compare_pair(saved(tmp_path, mask=mask, truth=mask, **{kind: wrong}))
    with pytest.raises(ImageError, match=r"labels\.png: is 70x50"):
        compare_pair(saved(tmp_path, mask=mask[5:-5, 5:-5], truth=mask, labels=np.zeros((50, 70), np.uint8)))
    with pytest.raises(ImageError, match=r"labels.png: holds the label 150; labels are ADE20K indices 0..149"):
        compare_pair(saved(tmp_path, mask=mask, truth=mask, labels=np.full((60, 80), 150, np.uint8)))


def slow_prominent(mask: np.ndarray, truth: np.ndarray, flags: np.ndarray) -> Agreement:
    """Compute the agreement region by region, as the docstring of `prominent_agreement` defines it."""
    marked = components(truth)
    asked = np.any([np.zeros_like(mask), *(part for part, flag in zip(marked, flags, strict=True) if flag)], axis=0)
    ignored = truth & ~asked
    detected, right = 0, 0
    for region in components(mask):
        rest = region & ~ignored
        is_right = (region & asked).any() and (rest & asked).sum() / rest.sum() >= 0.5
        right += bool(is_right)
        detected += bool(is_right or not lies_inside(region, truth))
    found = sum(lies_inside(part, mask) for part, flag in zip(marked, flags, strict=True) if flag)
    kept = mask & ~ignored
    return Agreement(int((kept & asked).sum()), int((kept | asked).sum()), detected, right, int(flags.sum()), found,
                     int(kept.sum()), int(asked.sum()), int((~ignored).sum()), found)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.floats(0.05, 0.6), st.floats(0, 1))
def test_prominent_regions(seed: int, share: float, prominent: float) -> None:
    rng = np.random.default_rng(seed)
    mask, truth = rng.random((2, 14, 14)) < share
    flags = rng.random(len(components(truth))) < prominent
    found, everything = prominent_agreement(mask, truth, flags), compare_masks(mask, truth)
    assert found == slow_prominent(mask, truth, flags)
    # Who leaves regions out makes nothing right wrong and nothing wrong right.
    assert found.detected - found.right == everything.detected - everything.right
    assert prominent_agreement(mask, truth, np.ones(len(flags), bool)) == everything


def test_regions_that_are_not_prominent_are_neither_right_nor_wrong() -> None:
    truth = np.zeros((20, 60), bool)
    truth[5:15, 5:15] = truth[5:15, 30:40] = True
    mask = np.zeros_like(truth)
    mask[4:16, 30:40] = mask[0:3, 50:58] = True  # the second one with a rim, and something that is not there
    first_only = prominent_agreement(mask, truth, np.array([True, False]))
    assert (first_only.detected, first_only.right, first_only.marked, first_only.found) == (1, 0, 1, 0)
    assert (first_only.intersection, first_only.union) == (0, 100 + 20 + 24)
    second_only = prominent_agreement(mask, truth, np.array([False, True]))
    assert (second_only.detected, second_only.right, second_only.marked, second_only.found) == (2, 1, 1, 1)
    assert prominent_agreement(mask, truth, np.zeros(2, bool)).recall is None


def test_prominent_regions_by_number(tmp_path: Path) -> None:
    truth = np.zeros((40, 60), bool)
    truth[6:12, 6:12] = truth[20:26, 20:26] = truth[20:26, 40:46] = True
    mask = truth.copy()
    mask[:30, :30] = False
    pair = saved(tmp_path, mask=mask, truth=truth)
    assert compare_pair(pair).prominent is None
    # The mask marks the third region in reading order only.
    for numbers, marked, found in (({2}, 1, 0), ({1, 2, 3}, 3, 1), ({3}, 1, 1), (set(), 0, 0)):
        prominent = compare_pair(pair, prominent=numbers).prominent
        assert prominent is not None
        assert (prominent.marked, prominent.found) == (marked, found)


def test_lossy_files_are_named(tmp_path: Path) -> None:
    mask = blobs(1)
    pair = saved(tmp_path, mask=mask, truth=mask)
    assert compare_pair(pair).lossy == ()
    (tmp_path / "truth.jpg").write_bytes(cv2.imencode(".jpg", mask.astype(np.uint8) * 255)[1].tobytes())
    assert compare_pair(pair._replace(ground_truth=tmp_path / "truth.jpg")).lossy == (tmp_path / "truth.jpg",)


def test_a_mask_against_itself(tmp_path: Path) -> None:
    """One file on both sides."""
    pair = saved(tmp_path, mask=blobs(1))
    found = compare_pair(pair._replace(ground_truth=pair.mask))
    assert (found.agreement.iou, found.agreement.f1) == (1, 1)


def slow_regions(mask: np.ndarray, other: np.ndarray, labels: np.ndarray, offset: int) -> list[MaskRegion]:
    regions = []
    for component in components(mask):
        rows, columns = np.nonzero(component)
        classes = Counter(labels[component].tolist())
        dominant = min(classes, key=lambda label: (-classes[label], label))
        regions.append(
            MaskRegion(
                int(columns.min()) + offset, int(rows.min()) + offset, int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1,
                int(component.sum()), int((component & other).sum()), dominant,
            )
        )  # fmt: skip
    return regions


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, 0.7), st.integers(0, 2**32))
def test_random_masks(height: int, width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, other = rng.random((2, height, width)) < share
    labels = rng.integers(147, 150, (height, width)).astype(np.uint8)
    found = Components(mask)
    regions = mask_regions(found, other, labels, 5)
    assert regions == slow_regions(mask, other, labels, 5)
    assert [region.covered for region in regions] == [lies_inside(part, other) for part in components(mask)]
    assert [region.dominant_class for region in mask_regions(found, other, None, 0)] == [None] * len(regions)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1)])
def test_nothing_and_everything(shape: tuple[int, int]) -> None:
    nothing, everything = np.zeros(shape, bool), np.ones(shape, bool)
    assert len(Components(nothing)) == 0
    assert mask_regions(Components(nothing), everything, np.zeros(shape, np.uint8), 5) == []
    (region,) = mask_regions(Components(everything), nothing, np.full(shape, 149, np.uint8), 5)
    assert region == MaskRegion(5, 5, shape[1], shape[0], shape[0] * shape[1], 0, 149)
