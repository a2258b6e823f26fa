import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from desra_core.tiling import Tile, grid

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
    assert list(grid(3, 5, 3)) == [Tile(0, 0, 3, 3), Tile(0, 3, 3, 2)]
    assert list(grid(3, 2, 2)) == [Tile(0, 0, 2, 2), Tile(2, 0, 1, 2)]


def test_an_empty_image_has_no_tiles() -> None:
    assert list(grid(0, 5, 3)) == []
