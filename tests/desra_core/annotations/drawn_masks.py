"""Small masks, drawn as pictures of characters."""

from __future__ import annotations

import numpy as np


def drawing(*rows: str) -> np.ndarray:
    """Make a mask from a picture of characters: # is marked."""
    return np.array([[character == "#" for character in row] for row in rows])


MASKS = {
    "nothing": drawing("....", "...."),
    "a pixel and a line": drawing("#....", "..###", "....."),
    "diagonal neighbours": drawing("#....", ".#...", "..##.", "..##."),
    "concave": drawing("#####", "#....", "#.###", "#...#", "#####"),
    "a hole": drawing("#####", "#...#", "#...#", "#####"),
    "a region in a hole": drawing("#######", "#.....#", "#..##.#", "#.....#", "#######"),
    "a hole that touches the outside": drawing("####.", "#..#.", "#...#", "#####"),
    "two": drawing("##...##", "##...##", "##...##"),
    "all": drawing("####", "####", "####"),
}
