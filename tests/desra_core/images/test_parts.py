import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from desra_core.images.parts import Rectangle, grid, windows

SIDES = st.integers(1, 40)


@given(SIDES, SIDES, st.integers(1, 50))
def test_a_grid_covers_every_pixel_once_with_tiles_that_fit(height: int, width: int, size: int) -> None:
    hits = np.zeros((height, width), int)
    for tile in grid(height, width, size):
        assert 0 < tile.height <= size
        assert 0 < tile.width <= size
        assert hits[tile.slices].shape == (tile.height, tile.width)
        hits[tile.slices] += 1
    assert (hits == 1).all()


@given(SIDES, SIDES, st.integers(1, 50), st.integers(0, 5))
def test_the_source_of_a_tile_yields_the_tile_when_its_halo_is_cut_off(
    height: int, width: int, size: int, halo: int
) -> None:
    image = np.arange((height + 2 * halo) * (width + 2 * halo)).reshape(height + 2 * halo, width + 2 * halo)
    valid = image[halo : halo + height, halo : halo + width]
    for tile in grid(height, width, size):
        source = image[tile.source(halo).slices]
        assert source.shape == (tile.height + 2 * halo, tile.width + 2 * halo)
        inner = source[halo : halo + tile.height, halo : halo + tile.width]
        np.testing.assert_array_equal(inner, valid[tile.slices])


def test_tiles_come_row_by_row() -> None:
    assert list(grid(3, 5, 3)) == [Rectangle(0, 0, 3, 3), Rectangle(0, 3, 3, 2)]
    assert list(grid(3, 2, 2)) == [Rectangle(0, 0, 2, 2), Rectangle(2, 0, 1, 2)]


def test_an_empty_image_has_no_tiles() -> None:
    assert list(grid(0, 5, 3)) == []


@st.composite
def window_requests(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    multiple = draw(st.sampled_from([1, 1, 2, 3, 8]))
    halo = multiple * draw(st.integers(0, 5))
    side = 2 * halo + multiple * draw(st.integers(1, 8))
    height, width = (multiple * draw(st.integers(1, 40)) for _ in range(2))
    return height, width, side, halo, multiple


@given(window_requests())
def test_windows_keep_every_pixel_once_away_from_their_borders(request: tuple[int, int, int, int, int]) -> None:
    height, width, side, halo, multiple = request
    hits = np.zeros((height, width), int)
    found = windows(height, width, side=side, halo=halo, multiple=multiple)
    for source, kept in found:
        hits[kept.slices] += 1
        assert hits[source.slices].shape == (source.height, source.width)
        assert hits[kept.slices].size == kept.height * kept.width > 0
        for first, last, window_first, window_last, length in (
            (kept.y, kept.y + kept.height, source.y, source.y + source.height, height),
            (kept.x, kept.x + kept.width, source.x, source.x + source.width, width),
        ):
            assert first >= window_first + halo or first == window_first == 0
            assert last <= window_last - halo or last == window_last == length
    assert (hits == 1).all()
    assert {source.y % multiple for source, _ in found} == {0}
    assert {source.x % multiple for source, _ in found} == {0}


@given(window_requests())
def test_windows_have_one_size_and_are_few_and_small(request: tuple[int, int, int, int, int]) -> None:
    height, width, side, halo, multiple = request
    found = windows(height, width, side=side, halo=halo, multiple=multiple)
    assert len({(source.height, source.width) for source, _ in found}) == 1
    for length, sizes, starts in (
        (height, {source.height for source, _ in found}, {source.y for source, _ in found}),
        (width, {source.width for source, _ in found}, {source.x for source, _ in found}),
    ):
        (size,) = sizes
        assert size <= side
        assert size % multiple == 0
        if length > side:
            # The fewest of the largest size that can cover the image, and none of the next smaller size can.
            reach = (len(starts) - 1) * (side - 2 * halo)
            assert reach < length - 2 * halo <= reach + side - 2 * halo
            assert len(starts) * (size - multiple) - (len(starts) - 1) * 2 * halo < length
        else:
            assert starts == {0}
            assert size == length


def test_windows_come_row_by_row() -> None:
    found = windows(10, 20, side=10, halo=1)
    assert [kept for _, kept in found] == [Rectangle(0, 0, 10, 7), Rectangle(0, 7, 10, 6), Rectangle(0, 13, 10, 7)]
    assert [source for source, _ in found] == [Rectangle(0, 0, 10, 8), Rectangle(0, 6, 10, 8), Rectangle(0, 12, 10, 8)]
