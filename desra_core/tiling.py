"""Tile grids and halos: geometry only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    y: int
    x: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rows and columns, to index an array with."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)

    def source(self, halo: int) -> Tile:
        """Return what a filter that keeps the valid region only reads of its input to fill this tile."""
        return Tile(self.y, self.x, self.height + 2 * halo, self.width + 2 * halo)


def row_strips(shape: tuple[int, ...], pixels: int = 2**20) -> Iterator[slice]:
    """Row ranges of about so many pixels, from top to bottom: wide copies of them stay small for any image size."""
    step = max(1, pixels // shape[1])
    return (slice(row, row + step) for row in range(0, shape[0], step))


def grid(height: int, width: int, size: int) -> Iterator[Tile]:
    """Yield tiles of ``size`` x ``size`` that cover an image exactly once, row by row; smaller at its end.

    >>> [tile.x for tile in grid(2, 5, 2)], [tile.width for tile in grid(2, 5, 2)]
    ([0, 2, 4], [2, 2, 1])
    """
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield Tile(y, x, min(size, height - y), min(size, width - x))
