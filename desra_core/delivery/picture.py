"""Write the picture of an image, its artifacts repaired, and the map of where to trust it.

Workers call `deliver_clean` while a photo is mined and its result is in memory, and `deliver_image` for other images.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from desra_core.delivery.plan import Order, delivery_key, map_path, mask_of, output_key, picture_path, pictures_folder
from desra_core.detection.detectors import DetectorInputs
from desra_core.detection.mask import suspects
from desra_core.detection.repair import Share, repair
from desra_core.errors import ArgumentError, ImageError
from desra_core.files import as_json, checksum, read_checked, storage_errors, write_output
from desra_core.images.codec import Mask, Photo, Pixels, check_size, decode, decode_mask, encode_png
from desra_core.images.encoding import encode_picture, read_origin
from desra_core.networks.super_resolution import resize_alpha
from desra_core.settings.models import Delivering
from desra_core.stages import StageJob, infer, read_content, read_labels, read_photo, read_result
from desra_core.workspace import Workspace
from desra_core.workspace.arrays import find_array
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Record


def deliver_clean(
    image: ImageRef, photo: Photo, gan_sr: Pixels, workspace: Workspace, job: StageJob, delivering: Delivering
) -> None:
    """Deliver a photo without artifacts from its result in memory, unless something is in the way.

    What goes wrong here is left to `deliver_image`, because the photo can be mined nevertheless.
    """
    assert image.lr is not None
    key = delivery_key(delivering, job.target, image.id, Record(image.id), None)
    with contextlib.suppress(Exception):
        files = _files(image, read_content(image.lr), photo.alpha, gan_sr, None, delivering)
        if not _in_the_way(files, pictures_folder(delivering), {}):
            _write(
                image, files, Order(Record(image.id), None, key, {}), "inferred", gan_sr.shape, workspace, delivering
            )


def deliver_image(image: ImageRef, order: Order, workspace: Workspace, job: StageJob, delivering: Delivering) -> None:
    """Deliver an image at all its names: write its pictures, and before them an entry in the journal.

    Raises:
        ImageError: A file cannot be read or written, has changed, or is in the way.
        TransientError: Storage failed, or a file changed since the scan.
    """
    file = image.gan_sr or image.lr
    assert file is not None
    data = read_content(file)
    photo = decode(data, file.path, max_pixels=job.max_pixels)
    alpha = photo.alpha
    mask = _mask(image, order, workspace) if mask_of(order.record, order.human) else None
    repaired = mask is not None and delivering.repair != "off"
    if mask is not None:
        check_size(mask, image.path, "run desra mine or detect again", order.record.shape)
    pair, origin = _results(image, order, photo, workspace, job, pair=repaired or delivering.trust_map)
    doubt = None
    if delivering.trust_map:
        doubt = _suspects(image, order, pair, photo, workspace, job)
        if mask is not None:
            doubt &= ~mask
    del photo
    pixels, share = pair.pop("gan_sr"), None
    if repaired:
        assert mask is not None
        pixels, share = repair(pair["mse_sr"], pixels, mask, feather=delivering.feather, strength=delivering.strength)
    pair.clear()  # encoding needs memory
    trust_map = _trust_map(pixels.shape[:2], share, doubt) if delivering.trust_map else None
    count = 0 if share is None else int(np.count_nonzero(share))
    doubtful = None if doubt is None else int(doubt.sum())
    del share, doubt, mask
    files = _files(image, data, alpha, pixels, trust_map, delivering)
    if path := _in_the_way(files, pictures_folder(delivering), order.ours):
        reason = "is in the way: it is not as desra deliver has written it, if it did"
        raise ImageError(path, reason, "move it, or name another --output")
    _write(image, files, order, origin, pixels.shape, workspace, delivering, count, doubtful)


def _results(
    image: ImageRef, order: Order, photo: Photo, workspace: Workspace, job: StageJob, *, pair: bool
) -> tuple[dict[str, Pixels], str]:
    """Get the GAN result of an image, or both results, and where they came from, as in `desra_core.delivery.plan`.

    ``photo`` is the GAN result where results are files.
    """
    roles = ("mse_sr", "gan_sr") if pair else ("gan_sr",)
    if image.mse_sr is not None:
        results = {"gan_sr": photo.pixels}
        if pair:
            data = read_content(image.mse_sr)
            results["mse_sr"] = decode(data, image.mse_sr.path, max_pixels=job.max_pixels).pixels
        return results, "files"
    keys = {"mse_sr": job.target.mse_sr_key, "gan_sr": job.target.gan_sr_key}
    found = {role: find_array(workspace, image.id, role, key=keys[role]) for role in roles}
    stored: dict[str, Pixels] = {role: array for role, array in found.items() if array is not None}
    inferred, _, _ = infer(image, order.record, job, {role: keys[role] for role in roles if role not in stored})
    return stored | inferred, "inferred" if inferred else "stored"


def _mask(image: ImageRef, order: Order, workspace: Workspace) -> Mask:
    """Read the mask that counts, that of a person before that of the detector."""
    if order.human is not None:
        return order.human.read()
    path = workspace.mask(image.names[0])
    return decode_mask(read_checked(path, order.record.checksums.get("masks")), path)


def _suspects(
    image: ImageRef, order: Order, pair: dict[str, Pixels], photo: Photo, workspace: Workspace, job: StageJob
) -> Mask:
    """Mark the pixels whose score is above the threshold, ``(H, W)`` bool; without labels every class weighs 1."""
    shape = pair["gan_sr"].shape[:2]
    labels = read_labels(image, order.record, workspace, job.target.segmentation_key, job.max_pixels)
    similarity = find_array(workspace, image.id, "similarity", key=job.target.similarity_key)
    if similarity is not None:
        scores = np.negative(similarity, out=similarity)
    else:
        lr = photo.pixels if image.gan_sr is None else image.lr and read_photo(image.lr, job.max_pixels).pixels
        if image.mse_sr and image.gan_sr:  # which were compared as they are stored
            pair = {"mse_sr": read_result(image.mse_sr, job.max_pixels).pixels,
                    "gan_sr": read_result(image.gan_sr, job.max_pixels).pixels}  # fmt: skip
        inputs = DetectorInputs(pair["mse_sr"], pair["gan_sr"], lr, labels)
        scores = job.detector.score(image.path, inputs, job.settings.window, job.tile, job.threads)
    frame = (shape[0] - scores.shape[0]) // 2
    limit = -np.float64(job.target.threshold)
    suspect = suspects(scores, frame, threshold=limit, labels=labels, weights=job.class_weights)
    return np.pad(suspect.view(np.bool_), frame)


def _trust_map(shape: tuple[int, ...], share: Share | None, doubt: Mask | None) -> bytes:
    """Encode the map of an image of ``(H, W)``: red by the share of the MSE result, green where it is doubtful."""
    trust = np.zeros((*shape, 3), np.uint8)
    if share is not None:
        trust[:, :, 0] = np.rint(share * 255)
    if doubt is not None:
        trust[:, :, 1] = doubt * np.uint8(255)
    return encode_png(trust)


def _files(
    image: ImageRef, data: bytes, alpha: Pixels | None, pixels: Pixels, trust_map: bytes | None, delivering: Delivering
) -> dict[str, bytes]:
    """Encode the picture of an image; return its files by path in the output folder, the picture before the map.

    Args:
        image: The image.
        data, alpha: Its file, whose profile and metadata the picture takes over, and the alpha in it.
        pixels: ``(H, W, C)`` of the picture.
        trust_map: The encoded map, where one is wanted.
        delivering: Where and how to write.
    """
    height, width = pixels.shape[:2]
    if alpha is not None and alpha.shape != (height, width):
        alpha = resize_alpha(alpha, height // alpha.shape[0])
    origin, colour = read_origin(data, image.path), delivering.colour
    try:
        encoded = encode_picture(
            pixels, alpha, delivering.format, quality=delivering.quality, origin=origin, colour=colour
        )
    except ArgumentError as error:
        raise ImageError(image.path, f"cannot be delivered: {error.subject} {error.reason}", error.remedy) from None
    files = {picture_path(delivering, name): encoded for name in image.names}
    if trust_map is not None:
        files |= dict.fromkeys(map(map_path, image.names), trust_map)
    return files


def _in_the_way(files: Mapping[str, bytes], output: Path, ours: Mapping[str, tuple[str, ...]]) -> Path | None:
    """Find a file in the output folder that is neither as it is to be, nor as desra deliver has written it."""
    for relative, content in files.items():
        path = output / relative
        with storage_errors(path):
            there = path.read_bytes() if path.exists() else content
        if there != content and checksum(there) not in ours.get(relative, ()):
            return path
    return None


def _write(
    image: ImageRef,
    files: Mapping[str, bytes],
    order: Order,
    results: str,
    shape: tuple[int, ...],
    workspace: Workspace,
    delivering: Delivering,
    repaired: int = 0,
    doubtful: int | None = None,
) -> None:
    """Write the files of an image; before them an entry that they are begun, by which they are known to be ours.

    A worker whose run has ended fails at that entry. Afterwards, the entry gets the key.
    """
    rows = []
    for name in image.names:
        for path in (picture_path(delivering, name), map_path(name)):
            if path in files:
                row: dict[str, Any] = {
                    "image": name,
                    "id": image.id,
                    "path": path,
                    "key": order.key,
                    "results": results,
                }
                row |= {"height": shape[0], "width": shape[1], "repaired": repaired, "doubtful": doubtful}
                row |= {"bytes": len(files[path]), "checksum": checksum(files[path]), "begun": None}
                rows.append(row)
    before = {path: known[-1] for path, known in order.ours.items() if known}
    begun = [row | {"key": None, "checksum": before.get(row["path"]), "begun": row["checksum"]} for row in rows]
    journal = workspace.delivery_journal(output_key(delivering), image.shard) / f"{image.id}.json"
    workspace.publish(journal, as_json({"files": begun}))
    for path, content in files.items():
        write_output(pictures_folder(delivering), path, content)
    workspace.publish(journal, as_json({"files": rows}))
