"""Where the stages take their images from: files that must not have changed since the scan, and stored arrays."""

from __future__ import annotations

from desra_core.arrays import read_array
from desra_core.corpus import File, ImageRef
from desra_core.errors import TransientError
from desra_core.imageio import Photo, Pixels, decode, digest, read_bytes
from desra_core.workspace import Workspace


def read_content(file: File) -> bytes:
    """The bytes of a file that still are what was scanned (raises `TransientError`)."""
    data = read_bytes(file.path)
    if digest(data) != file.hash:
        raise TransientError(file.path, "changed after the run had started", "run again")
    return data


def read_photo(file: File, max_pixels: int) -> Photo:
    """Decode an image file (raises `desra_core.errors.ImageError`)."""
    return decode(read_content(file), file.path, max_pixels=max_pixels)


def read_gan_sr(image: ImageRef, workspace: Workspace, key: str | None, max_pixels: int) -> Pixels:
    """The GAN result: a file, or what was inferred under the key (raises `desra_core.errors.ImageError`)."""
    if image.gan_sr is not None:
        return read_photo(image.gan_sr, max_pixels).pixels
    stored: Pixels = read_array(workspace, image.id, "gan_sr", key=key)
    return stored
