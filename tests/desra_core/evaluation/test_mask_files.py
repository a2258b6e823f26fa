"""Masks from every kind of file, with and without the frame; files that are no mask are refused in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from desra_core.errors import ImageError, TransientError
from desra_core.evaluation.mask_files import MaskPair, decode_any_mask, is_lossy, on_valid_region, read_mask
from desra_core.evaluation.metrics import compare_pair
from desra_core.images.codec import encode_mask

PATH = Path("folder/mask.png")


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    rng = np.random.default_rng(3)
    marked = cv2.GaussianBlur(rng.random((70, 90)).astype(np.float32), (0, 0), 5) > 0.5
    marked[:5] = False
    assert 0.2 < marked.mean() < 0.8
    return marked


def saved(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(sink, kind, **options)
    return sink.getvalue()


def palette(mask: np.ndarray, *colours: tuple[int, int, int]) -> bytes:
    image = Image.fromarray(mask.astype(np.uint8))
    image = image.copy()
    image.putpalette([value for colour in colours for value in colour])
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def painted(mask: np.ndarray, *colour: int, ground: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.where(mask[..., np.newaxis], np.array(colour, dtype), np.array(ground, dtype)).astype(dtype)


def test_lossless_files(mask: np.ndarray) -> None:
    gray = mask.astype(np.uint8)
    alpha = np.dstack([painted(mask, 255, 255, 255), np.full(mask.shape, 255, np.uint8)])
    on_glass = np.dstack([np.full((*mask.shape, 3), 255, np.uint8), gray * 255])
    red_on_glass = np.dstack([painted(mask, 200, 0, 0), gray * 255])
    files = {
        "1-bit": encode_mask(mask),
        "gray 255": saved(gray * 255),
        "gray 1": saved(gray),
        "gray 17": saved(gray * 17),
        "16 bits": cv2.imencode(".png", mask.astype(np.uint16) * 65535)[1].tobytes(),
        "16 bits, 255": cv2.imencode(".png", mask.astype(np.uint16) * 255)[1].tobytes(),
        "16-bit RGB": cv2.imencode(".png", painted(mask, 65535, 65535, 65535, dtype=np.uint16))[1].tobytes(),
        "RGB": saved(painted(mask, 255, 255, 255)),
        "one colour": saved(painted(mask, 128, 0, 64)),
        "opaque RGBA": saved(alpha),
        "on glass": saved(on_glass),
        "red on glass": saved(red_on_glass),
        "gray and alpha": saved(gray * 255, mode="LA"),
        "palette": palette(mask, (0, 0, 0), (128, 0, 0)),
        "palette, turned around": palette(~mask, (255, 255, 255), (0, 0, 0)),
        "TIFF": saved(gray * 255, "TIFF"),
        "BMP": saved(gray * 255, "BMP"),
        "WebP": saved(gray * 255, "WEBP", mode="RGB", lossless=True),
    }
    for kind, data in files.items():
        decoded = decode_any_mask(data, PATH)
        assert decoded.dtype == np.bool_, kind
        assert np.array_equal(decoded, mask), kind
        assert not is_lossy(data), kind


def test_nothing_and_everything() -> None:
    for value, marked in ((0, False), (255, True), (1, True)):
        decoded = decode_any_mask(saved(np.full((9, 8), value, np.uint8)), PATH)
        assert (decoded == marked).all()


@pytest.mark.parametrize("quality", [20, 50, 75, 95])
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_lossy_files_are_thresholded(mask: np.ndarray, kind: str, mode: str, quality: int) -> None:
    smooth = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
    data = saved(smooth * np.uint8(255), kind, mode=mode, quality=quality)
    assert is_lossy(data)
    decoded = decode_any_mask(data, PATH)
    assert np.count_nonzero(decoded != smooth) < 0.01 * mask.size
    assert not decode_any_mask(saved(0 * smooth, kind, mode=mode, quality=quality), PATH).any()


def test_lossy_files_with_transparency_or_metadata(mask: np.ndarray) -> None:
    """The pixels of these files come after other chunks."""
    white, gray = np.full((*mask.shape, 3), 255, np.uint8), mask.astype(np.uint8) * np.uint8(255)
    for pixels, options in ((np.dstack([white, gray]), {}), (painted(mask, 255, 255, 255), {"exif": b"Exif\0\0odd"})):
        data = saved(pixels, "WEBP", quality=90, **options)
        assert is_lossy(data)
        assert np.count_nonzero(decode_any_mask(data, PATH) != mask) < 0.03 * mask.size
        assert not is_lossy(saved(pixels, "WEBP", lossless=True, **options))


def test_lossy_files_are_known_by_their_content() -> None:
    for data in (b"", b"RIFF", b"RIFF\x00\x00\x00\x00WEBP", b"RIFF\x00\x00\x00\x00WEBPICCP\xff\xff\xff\xff"):
        assert not is_lossy(data)


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as error:
        decode_any_mask(data, PATH)
    assert error.value.subject == str(PATH)
    return error.value.reason


def test_masks_that_are_not_binary_are_refused(mask: np.ndarray) -> None:
    gray = mask.astype(np.uint8)
    soft = cv2.GaussianBlur(gray * np.uint8(255), (0, 0), 8)
    half = np.dstack([gray * 255] * 3 + [gray * 100 + 100])
    torn = np.dstack([gray * 255] * 3 + [np.where(np.arange(90) < 45, 255, 0).astype(np.uint8) * np.ones_like(gray)])
    two_colours = painted(mask, 255, 0, 0)
    two_colours[~mask] = (0, 0, 255)
    assert refused(saved(gray + gray[::-1])) == "is not binary: it has the values 0, 1, 2"
    assert refused(saved(soft)) == "is not binary: it has the values 7, 8, 9, 10 and more"
    several = "is not binary: it has several colours beside black"
    assert refused(saved(painted(mask, 255, 255, 255, ground=100))) == several
    assert refused(saved(two_colours)) == several
    assert refused(saved(half)).startswith("is not binary: it has the values 100, 200")
    assert "by its transparency" in refused(saved(torn))
    assert refused(saved(soft, "JPEG")).endswith("of its pixels are gray")
    assert refused(saved(gray * 60, "JPEG")).startswith("is not binary: its largest value is ")
    assert refused(saved(two_colours, "JPEG", subsampling=0)) == "is not binary: it is coloured"
    assert refused(b"\xff\xd8\xff").startswith("is a JPEG file that cannot be read (")
    assert refused(encode_mask(mask)[:-30]).startswith("is truncated")


def test_reading(tmp_path: Path, mask: np.ndarray) -> None:
    (tmp_path / "mask.png").write_bytes(encode_mask(mask))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    with pytest.raises(TransientError, match="no such file"):
        read_mask(tmp_path / "other.png")


def pair_of(tmp_path: Path, mask: np.ndarray, truth: np.ndarray) -> MaskPair:
    for name, part in (("mask", mask), ("truth", truth)):
        (tmp_path / f"{name}.png").write_bytes(encode_mask(part))
    return MaskPair("a", tmp_path / "mask.png", tmp_path / "truth.png")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(11, 40), st.integers(11, 40), st.booleans(), st.booleans())
def test_the_valid_region_of_any_two_masks(
    tmp_path: Path, height: int, width: int, framed: bool, truth_framed: bool
) -> None:
    """Whichever of the two masks lacks its frame, the same pixels are compared."""
    whole = np.random.default_rng(height * width).random((height, width)) < 0.5
    mask, truth = (whole if flag else whole[5:-5, 5:-5] for flag in (framed, truth_framed))
    image = compare_pair(pair_of(tmp_path, mask, truth), sizes="image" if framed else "valid")
    assert image.shape == (height, width)
    assert image.size_assumed == (framed == truth_framed)
    assert image.agreement.mask_pixels == image.agreement.intersection == whole[5:-5, 5:-5].sum()
    for part in (mask, truth):
        assert np.array_equal(on_valid_region(part, (height, width), PATH), whole[5:-5, 5:-5])


@pytest.mark.parametrize("other", [(50, 60), (40, 61), (41, 50), (50, 50), (39, 51), (60, 60), (31, 41)])
def test_sizes_that_do_not_belong_together(other: tuple[int, int], tmp_path: Path) -> None:
    mask, truth = np.zeros((41, 51), bool), np.zeros(other, bool)
    for one, two in ((mask, truth), (truth, mask)):
        pair = pair_of(tmp_path, one, two)
        if other == (31, 41):
            assert compare_pair(pair).shape == (41, 51)
            continue
        with pytest.raises(ImageError, match=rf"is {one.shape[1]}x{one.shape[0]} but .* is {two.shape[1]}x"):
            compare_pair(pair)


def test_a_mask_of_another_image() -> None:
    with pytest.raises(ImageError, match="is 51x41 but its image is 41x51; masks have the size of their image, or"):
        on_valid_region(np.zeros((41, 51), bool), (51, 41), PATH)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (4, 4)])
def test_an_image_that_is_all_frame(shape: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="which is all frame"):
        on_valid_region(np.zeros(shape, bool), shape, PATH)
