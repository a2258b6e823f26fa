"""Read heat maps that other programs wrote: arrays of NumPy, as they are or packed by gzip."""

import gzip
import io
import math
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from desra_core.errors import ImageError

_LONGEST_HEADER = 10_000
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_REMEDY = "save it with numpy.save, as a map of one number per pixel"


def read_heat_map(data: bytes, path: Path, shape: tuple[int, int]) -> npt.NDArray[np.floating[Any]]:
    """Read the heat map of an image of ``shape`` ``(H, W)``: ``(H - 2 f, W - 2 f)`` finite floats, larger is worse.

    No more is unpacked than a map of this size takes.

    Args:
        data: The whole content of the file.
        path: The file to name in errors.
        shape: That of the image.

    Raises:
        ImageError: The file is no such map, or is damaged.
    """
    try:
        packed = data[:2] == b"\x1f\x8b"
        with closing(gzip.GzipFile(fileobj=io.BytesIO(data)) if packed else io.BytesIO(data)) as content:
            size, by_columns, dtype = _HEADERS[npy.read_magic(content)](content, max_header_size=_LONGEST_HEADER)
            size = tuple(side for side in size if side != 1)
            lost = shape[0] - size[0] if len(size) == 2 else -1
            if dtype.kind not in "fiub" or lost < 0 or lost % 2 or size[1] != shape[1] - lost:
                reason = f"holds {dtype} of the shape {size}, but its image is {shape[1]}x{shape[0]}"
                raise ImageError(path, reason, _REMEDY)
            values = np.frombuffer(content.read(math.prod(size) * dtype.itemsize), dtype)
            scores = values.reshape(size, order="F" if by_columns else "C").astype(np.result_type(dtype, np.float32))
            more = content.read(1)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, SyntaxError, MemoryError):
        raise ImageError(path, "is no array of NumPy, or is damaged", _REMEDY) from None
    if more or not np.isfinite(scores).all():
        raise ImageError(path, "goes on after its array" if more else "holds values that are not finite", _REMEDY)
    return np.ascontiguousarray(scores)
