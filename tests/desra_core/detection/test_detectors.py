"""The detectors against slow formulations, and files of a user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from desra_core import third_party
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import (
    METHODS,
    Detector,
    DetectorInputs,
    detector_key,
    load_detector,
    score_pair,
)
from desra_core.detection.detectors.desra import Desra
from desra_core.detection.detectors.niqe import block_features
from desra_core.detection.mask import artifact_mask, score_mask
from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ImageError, UsageError

OWN = """
import numpy as np
from dataclasses import dataclass

@dataclass(frozen=True)
class Difference:
    threshold: float = 0.25
    smallest: int = 1
    inputs: tuple[str, ...] = ()

    def __call__(self, mse_sr, gan_sr, lr, labels, /):
        return np.abs(mse_sr / 255 - gan_sr / 255).max(axis=2)

detector = Difference()
"""


def pair(seed: int, shape: tuple[int, ...], dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    smooth = np.cumsum(np.cumsum(rng.normal(0, 1, shape), 0), 1)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    rough = np.clip(smooth + rng.normal(0, 0.1, shape) * (rng.random(shape) < 0.3), 0, 1)
    return (smooth * top).astype(dtype), (rough * top).astype(dtype)


def slow_ldl(mse_sr: np.ndarray, gan_sr: np.ndarray) -> np.ndarray:
    """Compute the map as LDL's own code does, in torch, with every window unfolded."""
    top = np.iinfo(mse_sr.dtype).max
    colours = [
        torch.from_numpy(np.broadcast_to(image / top, (*image.shape[:2], 3)).copy()) for image in (mse_sr, gan_sr)
    ]
    residual = torch.abs(colours[0] - colours[1]).sum(2)[None, None]
    windows = F.pad(residual, [3] * 4, mode="reflect").unfold(2, 7, 1).unfold(3, 7, 1)
    local = torch.var(windows, dim=(-1, -2), unbiased=True)
    return (local * torch.var(residual, dim=(-1, -2, -3), keepdim=True) ** 0.2)[0, 0].numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(40, 53, 3), (7, 9, 3), (600, 501, 3), (31, 20, 1)])
def test_ldl_is_the_published_map(shape, dtype) -> None:
    mse_sr, gan_sr = pair(1, shape, dtype)
    scores = load_detector("ldl")(mse_sr, gan_sr, None, None)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, slow_ldl(mse_sr, gan_sr), rtol=1e-5, atol=1e-9)


def test_ldl_of_equal_images_is_zero() -> None:
    image, _ = pair(2, (20, 20, 3))
    assert (load_detector("ldl")(image, image, None, None) == 0).all()


@pytest.mark.parametrize("shape", [(11, 12, 3), (700, 510, 3), (40, 30, 1)])
def test_ssim_is_that_of_the_whole_image_without_its_frame(shape) -> None:
    from skimage.metrics import structural_similarity

    mse_sr, gan_sr = pair(3, shape)
    _, whole = structural_similarity(mse_sr.astype(float), gan_sr.astype(float), channel_axis=2, gaussian_weights=True,
                                     sigma=1.5, use_sample_covariance=False, data_range=255, full=True)  # fmt: skip
    scores = load_detector("ssim")(mse_sr, gan_sr, None, None)
    np.testing.assert_allclose(scores, 1 - whole.mean(axis=2)[5:-5, 5:-5], atol=1e-6)


def test_ssim_knows_16_bits_and_gray_beside_colour() -> None:
    mse_sr, gan_sr = pair(4, (30, 30, 3))
    deep = load_detector("ssim")(mse_sr.astype(np.uint16) * 257, gan_sr.astype(np.uint16) * 257, None, None)
    np.testing.assert_array_equal(deep, load_detector("ssim")(mse_sr, gan_sr, None, None))
    gray = gan_sr[:, :, :1]
    beside = load_detector("ssim")(mse_sr, gray, None, None)
    np.testing.assert_array_equal(beside, load_detector("ssim")(mse_sr, np.repeat(gray, 3, 2), None, None))


def test_niqe_has_the_features_of_the_library() -> None:
    third_party.mend_basicsr()
    from basicsr.metrics.niqe import calculate_niqe

    _, image = pair(5, (288, 192, 3))
    statistics = np.load(Path(__import__("basicsr").__file__).parent / "metrics" / "niqe_pris_params.npz")
    features = np.array([values for _, values in block_features(image)])
    away = statistics["mu_pris_param"].ravel() - features.mean(axis=0)
    together = np.linalg.pinv((statistics["cov_pris_param"] + np.cov(features, rowvar=False)) / 2)
    expected = calculate_niqe(image[:, :, ::-1], crop_border=0)
    assert np.sqrt(away @ together @ away) == pytest.approx(expected, rel=1e-4)


def test_niqe_scores_each_block_by_its_own_distance() -> None:
    _, image = pair(6, (200, 100, 3))
    image[:110] = 77
    scores = load_detector("niqe")(image, image, None, None)
    assert (scores[:96, :96] == 0).all()
    statistics = np.load(Path(__import__("basicsr").__file__).parent / "metrics" / "niqe_pris_params.npz")
    inverse = np.linalg.pinv(statistics["cov_pris_param"])
    places = dict(block_features(image))
    assert list(places) == [(0, 0), (0, 4), (96, 0), (96, 4), (104, 0), (104, 4)]
    away = statistics["mu_pris_param"].ravel() - places[(96, 0)]
    assert (scores[96:192, :96] == np.float32(np.sqrt(away @ inverse @ away))).all()
    last = statistics["mu_pris_param"].ravel() - places[(104, 4)]
    assert (scores[192:, 96:] == np.float32(np.sqrt(last @ inverse @ last))).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.7, 0.85, 1.0]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_desra_as_a_detector_gives_the_masks_of_desra(seed: int, threshold: float, labelled: bool) -> None:
    mse_sr, gan_sr = pair(seed, (90, 80, 3))
    labels = np.random.default_rng(seed).integers(0, 150, (90, 80), np.uint8) if labelled else None
    weights = load_weights("published").values
    scores = Desra(weights)(mse_sr, gan_sr, None, labels)
    mask = score_mask(scores, (90, 80), threshold=1 - threshold, min_area=30)
    expected = artifact_mask(
        variance_similarity(mse_sr, gan_sr), threshold=threshold, min_area=30, labels=labels, weights=weights
    )
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_a_detector_that_finds_noise(method) -> None:
    detector = load_detector(method)
    assert isinstance(detector, Detector)
    mse_sr, gan_sr = pair(7, (400, 400, 3))
    mse_sr[...] = mse_sr.mean(axis=(0, 1)).astype(np.uint8)
    gan_sr[...] = mse_sr
    gan_sr[80:180, 80:180] = np.random.default_rng(0).integers(0, 256, (100, 100, 3))
    scores = detector(mse_sr, gan_sr, None, None)
    assert np.isfinite(scores).all()
    mask = score_mask(scores, (400, 400), threshold=detector.threshold, min_area=1000)
    assert mask[130, 130]
    assert not mask[350, 350]


def test_a_file_is_a_detector_and_its_content_its_key(tmp_path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    detector = load_detector(str(path))
    assert detector.threshold == 0.25
    before = detector_key(str(path))
    path.write_text(OWN.replace("0.25", "0.125"))
    assert load_detector(str(path)).threshold == 0.125
    assert detector_key(str(path)) != before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("x = 1", "holds no detector"),
        (
            "class detector:\n threshold = 1\n smallest = 1\n inputs = ()\n def __call__(self, *_): ...",
            "holds no detector",
        ),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_file_without_a_detector_is_refused_in_one_line(content, reason, tmp_path) -> None:
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=reason) as refused:
        load_detector(str(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="desra, ldl, ssim, niqe"):
        load_detector("magic")


IMAGE = Path("a.png")
PAIR = DetectorInputs(*[np.zeros((20, 30, 3), np.uint8)] * 2)


class Fixed:
    """A detector that returns fixed scores."""

    threshold, smallest, inputs = 1.0, 11, ()

    def __init__(self, scores: object) -> None:
        self.scores = scores

    def __call__(self, *_: object) -> object:
        return self.scores


@pytest.mark.parametrize(
    "scores",
    [None, "high", np.zeros((20, 31)), np.zeros((19, 29)), np.zeros((18, 30)), np.zeros((22, 32)),
     np.zeros((20, 30, 1)), np.full((20, 30), np.nan), np.full((20, 30), np.inf), np.zeros((20, 30), complex),
     np.zeros((20, 30), object)],
)  # fmt: skip
def test_results_that_are_no_scores_are_refused(scores) -> None:
    with pytest.raises(ImageError, match=r"a\.png: makes mine return .* instead of finite scores of the shape \(H"):
        score_pair(Fixed(scores), "mine", IMAGE, PAIR)


def test_scores_with_a_frame_and_small_images() -> None:
    scores = np.ones((10, 20), np.bool_)
    assert score_pair(Fixed(scores), "mine", IMAGE, PAIR) is scores
    with pytest.raises(ImageError, match="is 10x10, smaller than the 11 px that mine needs"):
        score_pair(Fixed(scores), "mine", IMAGE, DetectorInputs(*[np.zeros((10, 10, 3), np.uint8)] * 2))


class Raising(Fixed):
    """A detector that raises an error of two lines."""

    def __call__(self, *_: object) -> object:
        raise ValueError("one\ntwo")


def test_an_error_of_a_detector_becomes_one_line() -> None:
    with pytest.raises(ImageError, match=r"a\.png: makes mine fail \(ValueError: one two\); mend the method"):
        score_pair(Raising(None), "mine", IMAGE, PAIR)


@pytest.mark.parametrize("asked", [(), ("lr",), ("labels",), ("labels", "lr")])
def test_a_detector_gets_only_the_inputs_that_it_needs(asked: tuple[str, ...]) -> None:
    inputs = PAIR._replace(lr=np.zeros((10, 15, 3), np.uint8), labels=np.zeros((20, 30), np.uint8))
    given: list[object] = []

    class Asking(Fixed):
        """A detector that notes its inputs."""

        def __call__(self, *arguments: object) -> object:
            given.extend(arguments)
            return self.scores

    detector = Asking(np.zeros((20, 30)))
    detector.inputs = asked
    score_pair(detector, "mine", IMAGE, inputs)
    assert given[2] is (inputs.lr if "lr" in asked else None)
    assert given[3] is (inputs.labels if "labels" in asked else None)
    if asked:
        with pytest.raises(ImageError, match=r"a\.png: has no (LR photos|class labels), which mine needs; "):
            score_pair(detector, "mine", IMAGE, PAIR)


@pytest.mark.parametrize("shape", [(40, 53, 3), (7, 9, 3), (31, 20, 1)])
def test_colour_is_ciede2000_of_mean_colours(shape) -> None:
    from skimage.color import deltaE_ciede2000, rgb2lab

    mse_sr, gan_sr = pair(8, shape)
    labs = []
    for image in (mse_sr, gan_sr):
        lab = rgb2lab(np.broadcast_to(image / 255, (*shape[:2], 3)))
        padded = np.pad(lab, [(5, 5), (5, 5), (0, 0)], mode="reflect")
        labs.append(np.lib.stride_tricks.sliding_window_view(padded, (11, 11), (0, 1)).mean((-1, -2)))
    scores = load_detector("colour")(mse_sr, gan_sr, None, None)
    np.testing.assert_allclose(scores, deltaE_ciede2000(*labs), atol=1e-4)


def test_flip_is_the_authors_map_of_the_whole_image() -> None:
    import flip_evaluator

    mse_sr, gan_sr = pair(9, (700, 600, 3))  # two strips
    whole = [(image / 255).astype(np.float32) for image in (mse_sr, gan_sr)]
    expected, _, parameters = flip_evaluator.evaluate(*whole, "LDR", applyMagma=False)
    assert parameters["ppd"] == pytest.approx(67, abs=0.1)
    np.testing.assert_array_equal(load_detector("flip")(mse_sr, gan_sr, None, None), expected[:, :, 0])


@pytest.mark.parametrize("method", ["colour", "flip"])
def test_colour_and_flip_know_16_bits_and_gray(method) -> None:
    mse_sr, gan_sr = pair(10, (30, 40, 3))
    scores = load_detector(method)(mse_sr, gan_sr, None, None)
    deep = load_detector(method)(mse_sr.astype(np.uint16) * 257, gan_sr.astype(np.uint16) * 257, None, None)
    np.testing.assert_allclose(deep, scores, atol=1e-4)
    gray = load_detector(method)(mse_sr[:, :, :1], gan_sr, None, None)
    np.testing.assert_array_equal(gray, load_detector(method)(np.repeat(mse_sr[:, :, :1], 3, 2), gan_sr, None, None))
    assert not load_detector(method)(gan_sr, gan_sr, None, None).any()
