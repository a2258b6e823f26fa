"""Artifacts have the named kind, strength and size, at places fixed by name and seed; no other pixel changes."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from desra_core.benchmarking import injection
from desra_core.benchmarking.injection import FULL_CONTRAST, KINDS, Case, blob, cases, contrast, inject, texture

LUMINANCE = np.array([0.299, 0.587, 0.114])
STRENGTHS = (0.25, 0.5, 1.0)


def photo(shape: tuple[int, int, int] = (160, 176, 3), dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    """Make a mid-grey image with soft colours, some edges and fine texture: no injection is clipped."""
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), 12).reshape(shape)
    levels = 128 + 8 * smooth / smooth.std() + 4 * rng.standard_normal((*shape[:2], 1))
    levels[:, shape[1] // 3 : shape[1] // 2] += 25
    white = np.iinfo(dtype).max
    return np.clip(np.rint(levels * (white / 255)), 0, white).astype(dtype)


def disc(shape: tuple[int, ...], radius: float = 50, centre: tuple[float, float] | None = None) -> np.ndarray:
    y, x = np.ogrid[: shape[0], : shape[1]]
    row, column = centre or (shape[0] / 2, shape[1] / 2)
    return np.hypot(y - row, x - column) < radius


def levels(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float64) / (257 if pixels.dtype == np.uint16 else 1)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def change(kind: str, strength: float, pixels: np.ndarray, place: np.ndarray) -> np.ndarray:
    return levels(inject(pixels, kind, place, strength=strength, rng=rng())) - levels(pixels)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([1, 3]),
    st.floats(0.05, 1),
    st.integers(0, 2**32 - 1),
)
def test_only_the_place_changes(kind: str, dtype: type, channels: int, strength: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3 if kind == "colour_shift" else channels)
    pixels = draw.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    # Also at the border, and in several pieces.
    place = disc(shape, float(draw.uniform(4, 40)), tuple(draw.uniform(0, 1, 2) * shape[:2])) & (draw.random() < 0.99)
    place |= draw.random(shape[:2]) < 0.01
    place[0, 0] = True
    before = pixels.copy()
    injected = inject(pixels, kind, place, strength=strength, rng=np.random.default_rng(seed))
    assert (pixels == before).all()
    assert injected.dtype == pixels.dtype
    assert injected.shape == pixels.shape
    assert (injected[~place] == pixels[~place]).all()
    again = inject(pixels, kind, place, strength=strength, rng=np.random.default_rng(seed))
    assert (injected == again).all()


def test_nothing_depends_on_where_arrays_lie() -> None:
    """The last bit of OpenCV's distances does; with this noise that bit once changed a pixel."""
    draw = np.random.default_rng(118)
    shape = (int(draw.integers(20, 90)), int(draw.integers(20, 90)), 3)
    pixels = draw.integers(0, 65535, shape, np.uint16, endpoint=True)
    place = disc(shape, float(draw.uniform(4, 40)), tuple(draw.uniform(0, 1, 2) * shape[:2])) & (draw.random() < 0.99)
    place |= draw.random(shape[:2]) < 0.01
    place[0, 0] = True
    kept, made = [], set()
    for repeat in range(40):
        kept.append(np.zeros(3 * repeat + 1))
        shifted = inject(pixels.copy(), "colour_shift", place.copy(), strength=0.336, rng=np.random.default_rng(118))
        made.add(shifted.tobytes())
    assert len(made) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_another_state_gives_another_artifact(kind: str) -> None:
    pixels = photo()
    place = disc(pixels.shape)
    one, other = (inject(pixels, kind, place, strength=1, rng=np.random.default_rng(seed)) for seed in (1, 2))
    assert (one == other).all() == (kind == "flattening")


@pytest.mark.parametrize("kind", ["blotches", "checkerboard", "worms", "colour_shift", "ringing"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_strength_is_the_rms_contrast(kind: str, dtype: type) -> None:
    pixels = photo(dtype=dtype)
    place = disc(pixels.shape)
    for strength in STRENGTHS[:2]:
        added = change(kind, strength, pixels, place)[place]
        assert np.sqrt(np.mean(added**2)) == pytest.approx(FULL_CONTRAST * strength, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_grows_with_strength(kind: str) -> None:
    pixels = photo()
    place = disc(pixels.shape)
    told = [contrast(pixels, inject(pixels, kind, place, strength=s, rng=rng()), place) for s in (0.1, *STRENGTHS)]
    assert told == sorted(told)
    assert told[-1] > 1.8 * told[1]


def test_both_depths_show_the_same() -> None:
    deep = photo(dtype=np.uint16)
    shallow = (deep // 257).astype(np.uint8)
    place = disc(deep.shape)
    for kind in ("blotches", "checkerboard", "worms"):
        one, other = (change(kind, 0.5, pixels, place) for pixels in (deep, shallow))
        assert np.abs(one - other).max() <= 0.51


def test_blotches_are_plateaus_with_sharp_borders() -> None:
    pixels = photo((300, 300, 3), np.uint16)
    added = change("blotches", 0.5, pixels, disc(pixels.shape, 130))[disc(pixels.shape, 110)]
    for channel in added.T:
        height = np.abs(channel) / np.quantile(np.abs(channel), 0.95)
        assert ((height < 0.1) | (height > 0.9)).mean() > 0.6  # of smooth noise, a quarter is
    # Colours of their own.
    assert np.abs(np.corrcoef(added.T)[0, 1]) < 0.95


@pytest.mark.parametrize("seed", range(6))
def test_checkerboard_has_the_period_of_a_transposed_convolution(seed: int) -> None:
    pixels = np.full((256, 256, 1), 128, np.uint16) * np.uint16(257)
    place = disc(pixels.shape, 110)
    after = inject(pixels, "checkerboard", place, strength=0.5, rng=np.random.default_rng(seed))
    field = (levels(after) - levels(pixels))[64:192, 64:192, 0]
    power = np.abs(np.fft.fft2(field * np.outer(np.hanning(128), np.hanning(128)))) ** 2
    power[0, 0] = 0
    near = np.zeros(power.shape, bool)
    lines = np.arange(0, 128, 16)  # the harmonics of 8 px, among them those of 4 px
    for offset in range(-4, 5):
        for other in range(-4, 5):
            near[np.ix_((lines + offset) % 128, (lines + other) % 128)] = True
    assert power[near].sum() > 0.9 * power.sum()
    row, column = np.unravel_index(power.argmax(), power.shape)
    peak = max(min(row, 128 - row), min(column, 128 - column))
    assert min(abs(peak - 16), abs(peak - 32)) <= 2  # 128 / 8 and 128 / 4


@pytest.mark.parametrize("seed", range(4))
def test_worms_are_stripes_of_7_to_12_px_in_a_direction(seed: int) -> None:
    pixels = np.full((256, 256, 1), 128 * 257, np.uint16)
    after = inject(pixels, "worms", disc(pixels.shape, 120), strength=0.5, rng=np.random.default_rng(seed))
    field = (levels(after) - levels(pixels))[64:192, 64:192, 0]
    power = np.abs(np.fft.fft2((field - field.mean()) * np.outer(np.hanning(128), np.hanning(128)))) ** 2
    fy, fx = np.fft.fftfreq(128)[:, np.newaxis], np.fft.fftfreq(128)
    radius = np.hypot(fy, fx)
    band = (radius > 1 / 18) & (radius < 1 / 5)
    assert power[band].sum() > 0.8 * power.sum()
    # Of a field without direction this would be near 0.
    turned = (power * np.exp(2j * np.arctan2(fy, fx))).sum() / power.sum()
    assert np.abs(turned) > 0.2


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint16]), st.floats(0.1, 1))
def test_a_colour_shift_keeps_luminance(seed: int, dtype: type, strength: float) -> None:
    """This also holds for colours at the end of the range."""
    draw = np.random.default_rng(seed)
    extreme = np.clip(draw.normal(128, draw.uniform(5, 120), (90, 90, 3)), 0, 255) * (np.iinfo(dtype).max / 255)
    pixels = np.rint(extreme).astype(dtype)
    place = disc(pixels.shape, 40)
    after = inject(pixels, "colour_shift", place, strength=strength, rng=draw)
    rounding = 0.5 / (257 if dtype == np.uint16 else 1)
    assert np.abs((levels(after) - levels(pixels)) @ LUMINANCE).max() <= rounding + 1e-9


def test_a_colour_shift_adds_no_texture() -> None:
    pixels = photo(dtype=np.uint16)
    place = disc(pixels.shape)
    after = inject(pixels, "colour_shift", place, strength=0.5, rng=rng())
    assert np.abs(levels(after) - levels(pixels))[75:85, 80:90].mean() > 10
    assert texture(after, place) == pytest.approx(texture(pixels, place), rel=0.15)


def test_ringing_swings_beside_edges_only() -> None:
    pixels = np.full((160, 160, 1), 100, np.uint8)
    pixels[:, 80:] = 140
    added = change("ringing", 0.5, pixels, disc(pixels.shape, 75))[80, :, 0]
    assert np.abs(added[:40]).max() < 1  # 40 px away from the edge
    beside = added[60:100]
    turns = np.flatnonzero(np.diff(np.sign(beside[np.abs(beside) > 1])))
    assert len(turns) >= 4
    assert np.abs(beside).max() > 10


def test_ringing_of_a_flat_area_is_not_forced() -> None:
    pixels = np.full((100, 100, 1), 100, np.uint8)
    pixels[:, ::6] = 101
    assert 0 < np.abs(change("ringing", 1, pixels, disc(pixels.shape, 40))).max() <= 12


def test_flattening_takes_texture_and_keeps_edges() -> None:
    pixels = photo(dtype=np.uint16)
    place = disc(pixels.shape)
    flat = [inject(pixels, "flattening", place, strength=s, rng=rng()) for s in STRENGTHS]
    inner = disc(pixels.shape, 40)
    left = [texture(after, inner & ~edges(pixels)) / texture(pixels, inner & ~edges(pixels)) for after in flat]
    # Of white noise the filter, a mean over 6x6 px, leaves some third.
    assert left[0] < 0.85
    assert left[1] < 0.65
    assert left[2] < 0.45
    whole = levels(flat[-1]) - levels(pixels)
    for strength, after in zip(STRENGTHS, flat, strict=True):
        assert np.abs(levels(after) - levels(pixels) - strength * whole).max() < 0.01
    step = levels(flat[-1])[60:100, 64:80].mean() - levels(flat[-1])[60:100, 44:55].mean()
    before = levels(pixels)[60:100, 64:80].mean() - levels(pixels)[60:100, 44:55].mean()
    assert step == pytest.approx(before, abs=2)


def edges(pixels: np.ndarray) -> np.ndarray:
    near = np.zeros(pixels.shape[:2], bool)
    for column in (pixels.shape[1] // 3, pixels.shape[1] // 2):
        near[:, column - 10 : column + 10] = True
    return near


def test_texture_is_the_deviation_in_a_gaussian_window() -> None:
    pixels = photo((40, 40, 3))
    place = np.zeros((40, 40), bool)
    place[18, 20] = place[25, 12] = True
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, np.newaxis] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    variances = []
    for row, column in np.argwhere(place):
        around = pixels[row - 5 : row + 6, column - 5 : column + 6].astype(float)
        for channel in range(3):
            mean = (window * around[:, :, channel]).sum()
            variances.append((window * (around[:, :, channel] - mean) ** 2).sum())
    assert texture(pixels, place) == pytest.approx(np.sqrt(np.mean(variances)), rel=1e-6)
    assert texture(pixels * np.uint16(257), place) == pytest.approx(texture(pixels, place), rel=1e-6)


@pytest.fixture(scope="module", autouse=True)
def small_artifacts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(injection, "STRENGTHS", (0.5, 1.0))
        patch.setattr(injection, "SIZES", (16**2, 40**2))
        yield


def scene(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(90, 160, shape).astype(np.uint8)


@settings(deadline=None, max_examples=25)
@given(st.integers(10, 90), st.integers(0, 2**63))
def test_blobs(side: int, seed: int) -> None:
    shaped = blob(side**2, seed)
    assert (shaped == blob(side**2, seed)).all()
    assert 0.6 * side**2 < shaped.sum() < 1.4 * side**2
    assert ndimage.label(shaped)[1] == 1
    assert (ndimage.binary_fill_holes(shaped) == shaped).all()
    assert all(line.any() for line in (shaped[0], shaped[-1], shaped[:, 0], shaped[:, -1]))


def test_blobs_are_irregular() -> None:
    """No shape is a disc, and no two are alike."""
    shapes = [blob(64**2, seed) for seed in range(8)]
    for shaped in shapes:
        contours, _ = cv2.findContours(shaped.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        assert shaped.sum() / cv2.contourArea(cv2.convexHull(contours[0])) < 0.97
    assert len({shaped.tobytes() for shaped in shapes}) == 8


@settings(deadline=None, max_examples=8)
@given(st.integers(60, 260), st.integers(60, 260), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_cases_keep_their_distance(height: int, width: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = scene((height, width, channels), seed)
    exclude = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 12) > 0.06
    drawn = cases("a", pixels, seed=seed, exclude=exclude)
    far = ndimage.distance_transform_cdt(np.pad(~exclude, 1, constant_values=True), "chessboard")[1:-1, 1:-1]
    for case in drawn:
        place = case.place(pixels.shape)
        assert place.shape == (height, width)
        assert place.sum() == blob(case.size, case.seed).sum()
        assert not place[:8].any()
        assert not place[-8:].any()
        assert not place[:, :8].any()
        assert not place[:, -8:].any()
        assert not exclude.any() or far[place].min() > 20
    for one, other in itertools.combinations(drawn, 2):
        if one.sheet == other.sheet:
            gap = ndimage.distance_transform_edt(~one.place(pixels.shape))[other.place(pixels.shape)].min()
            assert gap > 40


def test_each_kind_strength_and_size_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = scene((700, 800, 3))
    monkeypatch.setattr(injection, "SIZES", (16**2, 96**2))
    drawn = cases("a", pixels)
    wanted = set(itertools.product(KINDS, (0.5, 1.0), (16**2, 96**2)))
    assert {case[:3] for case in drawn} == wanted
    assert len(drawn) == len(wanted)
    used = [0] * (1 + max(case.sheet for case in drawn))
    for case in drawn:
        used[case.sheet] += case.size
    assert np.mean(used) < 0.2 * 700 * 800
    assert max(used) - min(used) <= 96**2
    gray = cases("a", pixels[:, :, :1])
    assert {case[:3] for case in gray} == {one for one in wanted if one[0] != "colour_shift"}


def test_cases_depend_on_name_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = scene((300, 300, 3))
    drawn = cases("a", pixels, seed=3)
    assert cases("a", pixels, seed=3) == drawn
    assert cases("b", pixels, seed=3) != drawn
    assert cases("a", pixels, seed=4) != drawn
    # A case keeps its pattern whatever else is injected.
    monkeypatch.setattr(injection, "STRENGTHS", (1.0,))
    monkeypatch.setattr(injection, "SIZES", (16**2,))
    fewer = cases("a", pixels, seed=3)
    seeds = {case[:3]: case.seed for case in drawn}
    assert fewer
    assert all(case.seed == seeds[case[:3]] for case in fewer if case[:3] in seeds)
    assert pickle.loads(pickle.dumps(drawn)) == drawn
    assert len(pickle.dumps(drawn[0])) < 300


def test_cases_and_shapes_stay_as_published() -> None:
    """If a number here changes, all published tables are of other artifacts."""
    first = min(cases("a", scene((300, 300, 3))), key=lambda case: case[:3])
    assert first == Case("blotches", 0.5, 256, *first[3:6], 5739803970879232626)
    assert int(blob(256, first.seed).sum()) == 250


def test_kinds_go_where_they_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "STRENGTHS", STRENGTHS)
    monkeypatch.setattr(injection, "SIZES", (24**2,))
    pixels = np.full((400, 500, 3), 128, np.uint8)
    pixels[:, :250] = np.random.default_rng(0).integers(0, 256, (400, 250, 3))
    kinds = set()
    for case in cases("a", pixels):
        textured = case.place(pixels.shape)[:, :250].mean() / case.place(pixels.shape).mean() / 2
        if case.kind in ("ringing", "flattening", "colour_shift"):
            kinds.add(case.kind)
            assert textured < 0.01 if case.kind == "colour_shift" else textured > 0.99
    assert len(kinds) == 3


@pytest.mark.parametrize("shape", [(11, 11, 3), (16, 400, 1), (17, 17, 3), (64, 30, 3)])
def test_no_room(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "SIZES", (64**2,))
    assert cases("a", scene(shape)) == []


def test_all_excluded() -> None:
    pixels = scene((200, 200, 3))
    assert cases("a", pixels, exclude=np.ones((200, 200), bool)) == []
