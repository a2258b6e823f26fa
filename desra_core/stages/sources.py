"""Inputs of the stages: files, which must not have changed since the scan, and stored arrays."""

from desra_core.errors import ImageError, TransientError
from desra_core.files.hashing import digest, read_bytes
from desra_core.images.codec import Labels, Photo, Pixels, decode, decode_labels
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import read_array
from desra_core.workspace.manifest import CHANGED, File, ImageRef
from desra_core.workspace.records import Record


def read_content(file: File) -> bytes:
    """Read a file, and check that its bytes are those that were scanned (raises `TransientError`)."""
    data = read_bytes(file.path)
    if digest(data) != file.hash:
        raise TransientError(file.path, CHANGED, "run again")
    return data


def read_photo(file: File, max_pixels: int) -> Photo:
    """Decode an image file (raises `desra_core.errors.ImageError`)."""
    return decode(read_content(file), file.path, max_pixels=max_pixels)


def read_gan_sr(image: ImageRef, workspace: Workspace, key: str | None, max_pixels: int) -> Pixels:
    """Read the GAN result: a file, or the array inferred under the key (raises `desra_core.errors.ImageError`)."""
    if image.gan_sr is not None:
        return read_photo(image.gan_sr, max_pixels).pixels
    stored: Pixels = read_array(workspace, image.id, "gan_sr", key=key)
    return stored


def read_labels(
    image: ImageRef, record: Record, workspace: Workspace, segmentation_key: str | None, max_pixels: int
) -> Labels | None:
    """Read labels of the image's size with values below 150; None where the run has no labels or needs none.

    Raises:
        ImageError: A label file has another size or other classes, or cannot be read.
        TransientError: The stored labels are gone.
    """
    if segmentation_key != "labels" or image.labels is None:
        if record.labels_kept and record.segmentation_key == segmentation_key:
            stored: Labels = read_array(workspace, image.id, "labels", key=record.segmentation_key)
            return stored
        return None
    return read_label_file(image.labels, record.shape, max_pixels)


def read_label_file(file: File, shape: tuple[int, ...], max_pixels: int) -> Labels:
    """Read a label file of ``(H, W)`` with values below 150.

    Raises:
        ImageError: The file has another size or other classes, or cannot be read.
    """
    labels = decode_labels(read_content(file), file.path, max_pixels=max_pixels)
    if labels.shape != shape:
        reason = f"is {labels.shape[1]}x{labels.shape[0]} but its image is {shape[1]}x{shape[0]}"
        raise ImageError(file.path, reason, "labels must have the size of the GAN result")
    return labels
