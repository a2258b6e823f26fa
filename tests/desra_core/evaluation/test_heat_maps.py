"""Heat maps of other programs: every usual array, and files that are none."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from desra_core.errors import ImageError
from desra_core.evaluation.heat_maps import read_heat_map

PATH = Path("a@SR@.npy.gz")


def saved(array: np.ndarray, *, packed: bool = True) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return gzip.compress(content.getvalue()) if packed else content.getvalue()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2", "u1", "i2", "?"])
def test_arrays(dtype: str, *, packed: bool) -> None:
    """In rows and in columns, with axes of one, and without a frame of the image."""
    array = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(dtype)
    expected = array.astype(float)
    for given in (array, np.asfortranarray(array), array[np.newaxis], array[:, :, np.newaxis]):
        found = read_heat_map(saved(given, packed=packed), PATH, (20, 30))
        assert found.dtype.kind == "f"
        assert np.array_equal(found, expected)
    assert read_heat_map(saved(array[3:-3, 3:-3], packed=packed), PATH, (20, 30)).shape == (14, 24)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (saved(np.zeros((21, 30))), r"holds float64 of the shape \(21, 30\), but its image is 30x20"),
        (saved(np.zeros((18, 30))), "of the shape"),
        (saved(np.zeros((20, 30, 3))), "of the shape"),
        (saved(np.zeros((20, 30), complex)), "holds complex128"),
        (saved(np.full((20, 30), np.nan)), "not finite"),
        (saved(np.zeros((20, 30))) + b"x", "is no array of NumPy, or is damaged"),
        (saved(np.zeros((20, 30)), packed=False) + b"x", "goes on after its array"),
        (saved(np.zeros((20, 30)), packed=False)[:-1], "is damaged"),
        (saved(np.zeros((20, 30)))[:40], "is damaged"),
        (saved(np.array([{"a": 1}], object)), "holds object"),
        (b"", "is damaged"),
        (b"\x1f\x8b", "is damaged"),
        (b"no array", "is damaged"),
    ],
)
def test_files_that_are_no_heat_map(data: bytes, told: str) -> None:
    with pytest.raises(ImageError, match=told):
        read_heat_map(data, PATH, (20, 30))
