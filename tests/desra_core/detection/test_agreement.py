"""Whether two results can be a pair: real pairs are never doubted, each way to be wrong is found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from desra_core import read_image, super_resolve
from desra_core.detection.agreement import (
    CORRELATION,
    DIFFERENCE,
    FIRST,
    LEAST,
    SHIFT,
    Columns,
    PairAgreement,
    find_doubts,
    measure_agreement,
    strangers,
)
from desra_core.errors import DesraError, UsageError
from desra_core.images.codec import Pixels
from desra_core.networks.checkpoints import load_pair
from tests.conftest import MODELS
from tests.wrong_pairs import LIES, real_photos

pytestmark = pytest.mark.usefixtures("one_thread")

OPPOSITE = {"px to the right": "px to the left", "px to the left": "px to the right",
            "px below": "px above", "px above": "px below"}  # fmt: skip


class Pair(NamedTuple):
    lr: Pixels
    mse_sr: Pixels
    gan_sr: Pixels


def enlarged(photos: Iterable[Pixels], mse: Path | str, gan: Path | str) -> list[Pair]:
    models = load_pair(mse, gan)
    return [Pair(lr, *(super_resolve(model, lr).pixels for model in models)) for lr in photos]


def columns_of(pairs: Iterable[PairAgreement | None]) -> Columns:
    found = [pair for pair in pairs if pair is not None]
    return {name: np.array([getattr(pair, name) for pair in found], np.float64) for name in PairAgreement._fields}


def measured(pairs: Iterable[Pair], *, lr: bool = True) -> Columns:
    return columns_of(measure_agreement(pair.mse_sr, pair.gan_sr, pair.lr if lr else None) for pair in pairs)


def doubts(columns: Columns) -> list[DesraError]:
    return find_doubts(columns, "twin.pth", "gan.pth")


def refuse(doubt: DesraError) -> bool:
    return isinstance(doubt, UsageError)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """As many pairs of a trained twin and GAN model as a run judges at first."""
    return enlarged(real_photos(FIRST), MODELS / "mse.pth", MODELS / "gan.pth")


@pytest.mark.parametrize("lr", [True, False])
@pytest.mark.parametrize("count", [LEAST, FIRST])
def test_real_pairs_are_not_doubted(pairs, lr, count):
    columns = measured(pairs[:count], lr=lr)
    assert doubts(columns) == []
    assert not strangers(columns).any()


@pytest.mark.parametrize("lr", [True, False])
@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_found_and_named(pairs, lie, lr):
    """Of both results alike; with the photos, the doubt names the model at fault."""
    refuses, words, change = LIES[lie]
    for role, name in (("gan_sr", "gan.pth"), ("mse_sr", "twin.pth")):
        changed = [pair._replace(**{role: change(getattr(pair, role))}) for pair in pairs]
        found = doubts(measured(changed, lr=lr))
        assert {refuse(doubt) for doubt in found} == {refuses}, found
        if role == "mse_sr":  # what lies to the right of the other has the other on its left
            words = OPPOSITE.get(words, words)
        assert words in found[0].reason
        if lr and "px" not in words:
            assert found[0].subject == name


@pytest.mark.parametrize("lr", [True, False])
def test_an_exchanged_pair(pairs, lr):
    exchanged = [Pair(pair.lr, pair.gan_sr, pair.mse_sr) for pair in pairs]
    (doubt,) = doubts(measured(exchanged, lr=lr))
    assert doubt.subject == "twin.pth"
    part = f"in {FIRST} of {FIRST} images"
    assert doubt.reason == f"has more fine texture than gan.pth {part}, as if the two were exchanged"
    assert not refuse(doubt)


def test_a_reference_that_keeps_more_is_not_taken_for_an_exchanged_pair(pairs):
    """It has more texture than the GAN result, but is closer to the photo: noise, which the GAN model removes."""
    rng = np.random.default_rng(0)

    def noisy(pair: Pair) -> Pair:
        noise = rng.normal(0, 8, pair.lr.shape)
        both = zip((pair.lr, cv2.resize(pair.lr, pair.mse_sr.shape[1::-1], interpolation=cv2.INTER_CUBIC)),
                   (noise, noise.repeat(4, 0).repeat(4, 1)), strict=True)  # fmt: skip
        lr, mse_sr = (np.clip(pixels + more, 0, 255).astype(np.uint8) for pixels, more in both)
        return Pair(lr, mse_sr, cv2.GaussianBlur(pair.mse_sr, (0, 0), 2))

    kept = [noisy(pair) for pair in pairs]
    columns = measured(kept)
    assert np.median(columns["texture"]) < -1
    assert doubts(columns) == []


def test_results_of_other_photos(pairs):
    others = [pair._replace(gan_sr=other.gan_sr) for pair, other in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
    columns = measured(others)
    (doubt,) = doubts(columns)
    assert refuse(doubt)
    assert doubt.subject == "gan.pth"
    assert "does not show what is in the photos" in doubt.reason
    assert strangers(columns).all()
    (doubt,) = doubts(measured(others, lr=False))
    assert "does not show what twin.pth shows" in doubt.reason


def test_a_few_results_of_other_photos(pairs):
    mixed = [*pairs[:-2], pairs[-2]._replace(gan_sr=pairs[0].gan_sr), pairs[-1]._replace(mse_sr=pairs[1].mse_sr)]
    columns = measured(mixed)
    assert doubts(columns) == []
    assert strangers(columns).tolist() == [False] * (FIRST - 2) + [True] * 2


def test_exchanged_colours(pairs):
    swapped = [pair._replace(gan_sr=pair.gan_sr[:, :, ::-1]) for pair in pairs]
    (doubt,) = doubts(measured(swapped))
    assert doubt.subject == "gan.pth"
    assert "order of its colours" in doubt.remedy


def test_the_very_same_results(pairs):
    (doubt,) = doubts(measured([pair._replace(gan_sr=pair.mse_sr) for pair in pairs]))
    assert refuse(doubt)
    assert "has the very results of twin.pth" in doubt.reason


def test_the_photo_as_it_was(pairs):
    """No GAN model does that; as a reference it is as good as bicubic enlargement, which is allowed."""
    repeated = {pair.lr.tobytes(): pair.lr.repeat(4, 0).repeat(4, 1) for pair in pairs}
    (doubt,) = doubts(measured([pair._replace(gan_sr=repeated[pair.lr.tobytes()]) for pair in pairs]))
    assert refuse(doubt)
    assert doubt.reason == f"gives back the pixels of the photo in {FIRST} of {FIRST} images"
    (doubt,) = doubts(measured([pair._replace(mse_sr=repeated[pair.lr.tobytes()]) for pair in pairs]))
    assert (doubt.subject, refuse(doubt)) == ("twin.pth", False)


def test_flat_photos_say_nothing():
    flat = [Pair(np.full((32, 32, 3), value, np.uint8), np.full((128, 128, 3), value, np.uint8),
                 np.full((128, 128, 3), value + 1, np.uint8)) for value in range(FIRST)]  # fmt: skip
    columns = measured(flat)
    assert doubts(columns) == []
    assert not strangers(columns).any()


def test_too_few_photos_say_nothing(pairs):
    changed = [pair._replace(gan_sr=np.zeros_like(pair.gan_sr)) for pair in pairs[: LEAST - 1]]
    assert doubts(measured(changed)) == []


def test_depth_colours_and_size_change_nothing(pairs):
    pair = pairs[0]
    expected = measure_agreement(pair.mse_sr, pair.gan_sr, pair.lr)
    assert expected is not None
    deep = measure_agreement(*((pixels.astype(np.uint16) * 257) for pixels in (pair.mse_sr, pair.gan_sr, pair.lr)))
    assert deep == pytest.approx(expected, abs=2e-4)
    grey = [pixels[:, :, :1] for pixels in (pair.mse_sr, pair.gan_sr, pair.lr)]
    alone, thrice = measure_agreement(*grey), measure_agreement(*(np.repeat(pixels, 3, 2) for pixels in grey))
    assert alone == pytest.approx(thrice, abs=2e-3)
    strange_lr = measure_agreement(pair.mse_sr, pair.gan_sr, pair.lr[:-1])
    assert strange_lr == measure_agreement(pair.mse_sr, pair.gan_sr)
    assert measure_agreement(pair.mse_sr[:31], pair.gan_sr[:31]) is None


def test_only_the_middle_is_looked_at(pairs):
    """So that a large image costs no more; the photo is cut where the results are."""
    large = [np.tile(pixels, (4, 4, 1)) for pixels in (pairs[0].mse_sr, pairs[0].gan_sr, pairs[0].lr)]
    expected = measure_agreement(*large)
    changed = [pixels.copy() for pixels in large]
    for pixels, border in zip(changed, (300, 300, 75), strict=True):
        pixels[:border] = pixels[-border:] = 0
        pixels[:, :border] = pixels[:, -border:] = 0
    assert measure_agreement(*changed) == expected
    assert expected is not None
    assert expected.gan_off is not None
    assert expected.gan_off < DIFFERENCE


@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, 1), (-1, 2)])
def test_shifts_are_measured(pairs, x, y):
    moved = measured([pair._replace(gan_sr=np.roll(pair.gan_sr, (y, x), (0, 1))) for pair in pairs])
    still = measured(pairs)
    for name, by in (("shift_x", x), ("shift_y", y)):
        assert np.median(moved[name]) - np.median(still[name]) == pytest.approx(by, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mse", "gan"),
    [
        ("realesr-general-x4v3-l1-twin.safetensors", "realesr-general-x4v3.pth"),
        ("bicubic", "realesr-general-x4v3.pth"),
        ("bicubic", "realesr-animevideov3.pth"),
        ("rlfn-ntire2022-x4.pth", "realesr-general-wdn-x4v3.pth"),
        ("RealESRGAN_x4plus-l1-twin.safetensors", "RealESRGAN_x4plus.safetensors"),
    ],
)
def test_published_models_on_real_photos(shared_data, mse, gan):
    """No false alarm on any kind of photo; each lie is found among the first photos of each kind."""
    side = 32 if "plus" in gan else 64
    weights = shared_data / "weights"
    for folder in ("lr/realsrset", "hr/kodak"):
        photos = [read_image(path) for path in sorted((shared_data / folder).iterdir())[:FIRST]]
        cut = [np.ascontiguousarray(photo[:side, :side]) for photo in photos]
        pairs = enlarged(cut, mse if mse == "bicubic" else weights / mse, weights / gan)
        columns = measured(pairs)
        told = columns["contrast"] >= 4
        assert columns["correlation"][told].min() > CORRELATION
        assert np.median(columns["difference"][told]) < DIFFERENCE
        assert np.hypot(*(np.nanmedian(columns[name][told]) for name in ("shift_x", "shift_y"))) < SHIFT
        assert doubts(columns) == []
        for lie, (refuses, words, change) in LIES.items():
            found = doubts(measured([pair._replace(gan_sr=change(pair.gan_sr)) for pair in pairs]))
            assert any(words in doubt.reason for doubt in found), (lie, found)
            assert refuse(found[0]) == refuses, lie
        if mse == "bicubic" or "twin" in mse:
            swapped = doubts(measured([Pair(pair.lr, pair.gan_sr, pair.mse_sr) for pair in pairs]))
            assert any("as if the two were exchanged" in doubt.reason for doubt in swapped)


@pytest.mark.slow
def test_the_reference_pairs(shared_data):
    """Results of a network and of its finetune with a GAN loss, PCARN-M."""
    folder = shared_data / "pairs"
    found = []
    for path in sorted((folder / "gan_sr").iterdir()):
        lr, mse_sr, gan_sr = (read_image(folder / role / path.name) for role in ("lr", "mse_sr", "gan_sr"))
        found.append(Pair(lr, mse_sr, gan_sr))
    assert len(found) >= LEAST
    for lr in (True, False):
        columns = measured(found, lr=lr)
        assert doubts(columns) == []
        assert not strangers(columns).any()
