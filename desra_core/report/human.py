"""Regions held against human masks: precision and recall over severity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from desra_core.detection.mask import valid
from desra_core.detection.regions import Components
from desra_core.errors import ImageError
from desra_core.files.hashing import read_bytes
from desra_core.images.codec import Mask, decode
from desra_core.report.maps import MAX_PIXELS
from desra_core.report.results import WorkspaceResults, firsts
from desra_core.workspace.human_masks import HumanMask

IMAGES = 300
# The published scripts crop by it.
_FRAME = 5

Values = npt.NDArray[np.float64]


class JudgedRegions(NamedTuple):
    """Regions of one image: the severity of N detected ones, and how they match M human ones."""

    severity: Values
    right: npt.NDArray[np.bool_]  # (N,): at least half of the pixels lie in the human mask
    found: Values  # (M,): half of the pixels lie in the detected regions of at least this severity; -inf where never


class SeverityCurve(NamedTuple):
    """Precision and recall, regions sorted by severity."""

    points: list[tuple[float, float]]  # (recall, precision), the most severe regions alone first; empty if undefined
    images: int  # that the curve rests on
    looked_at: int  # images that have a human mask that counts
    detected: int  # regions
    right: int  # those of which at least half of the pixels lie in the human mask
    marked: int  # regions of the human masks
    found: int  # those of which at least half of the pixels are detected


def severity_curve(results: WorkspaceResults) -> SeverityCurve | None:
    """Hold the masks of a workspace against its human masks; None where there are none.

    At most 300 images are read, whatever the number of human masks; which ones depends on their content only.
    """
    masks = results.human_masks()
    images = results.images
    done = images.filter(pc.and_(images["mask_key"].is_valid(), images["failed_stage"].is_null()))
    rows = firsts(done.filter(pc.is_in(done["id"], pa.array(list(masks), pa.string()))))
    if rows.num_rows == 0:
        return None
    chosen = rows.take(pc.select_k_unstable(rows, min(IMAGES, rows.num_rows), [("id", "ascending")]))
    return curve_of(list(_judged(results, chosen, masks)), looked_at=rows.num_rows)


def curve_of(judged: list[JudgedRegions], *, looked_at: int) -> SeverityCurve:
    """Compute the curve of some images taken together."""
    empty = JudgedRegions(np.zeros(0), np.zeros(0, np.bool_), np.zeros(0))
    severity, right, found = (np.concatenate(parts) for parts in zip(empty, *judged, strict=True))
    levels = np.unique(severity)[::-1]
    ascending, descending = np.sort(found), np.argsort(-severity, kind="stable")
    detected = np.searchsorted(-severity[descending], -levels, side="right")
    hits = np.concatenate([[0], np.cumsum(right[descending])])[detected]
    recalled = found.size - np.searchsorted(ascending, levels, side="left")
    points = list(zip((recalled / found.size).tolist(), (hits / detected).tolist(), strict=True)) if found.size else []
    return SeverityCurve(points, len(judged), looked_at, severity.size, int(right.sum()), found.size,
                         int(np.isfinite(found).sum()))  # fmt: skip


def judge(mask: Mask, human: Mask, regions: list[dict[str, Any]]) -> JudgedRegions:
    """Hold one mask against a human mask.

    Args:
        mask, human: ``(H, W)`` bool. As in the published scripts the outer 5 px do not count.
        regions: Box (x, y, width, height) and severity of each component of the mask.

    Raises:
        ImageError: The mask has a component that is none of the regions.
    """
    whole = Components(mask)
    by_box = {tuple(region[key] for key in ("x", "y", "width", "height")): region["severity"] for region in regions}
    boxes = [tuple(box) for box in whole.boxes.tolist()]
    if not by_box.keys() >= set(boxes):
        raise ImageError("mask", "is not the one of the regions", "run again")
    of_component = np.array([0.0, *(by_box[box] for box in boxes)])
    mask, human, numbers = valid(mask, _FRAME), valid(human, _FRAME), valid(whole.numbers, _FRAME)
    # A component that the crop has cut in two counts twice, as in the published scripts.
    parts = Components(mask)
    severity = np.zeros(len(parts) + 1)
    severity[parts.numbers[mask]] = of_component[numbers[mask]]
    return JudgedRegions(severity[1:], parts.covered(human), _found(parts.numbers, severity, human))


def _found(parts: npt.NDArray[Any], severity: Values, human: Mask) -> Values:
    """For each human region the severity at which half of it is covered, taking the most severe parts first."""
    marked = Components(human)
    area = [0, *marked.areas.tolist()]
    count, both = len(area), human & (parts > 0)
    pairs, pixels = np.unique(parts[both].astype(np.int64) * count + marked.numbers[both], return_counts=True)
    order = np.argsort(-severity[pairs // count], kind="stable")
    covered_so_far = np.zeros(count, np.int64)
    found = np.full(count, -np.inf)
    for pair, size in zip(pairs[order].tolist(), pixels[order].tolist(), strict=True):
        part, region = divmod(pair, count)
        covered_so_far[region] += size
        if np.isinf(found[region]) and 2 * covered_so_far[region] >= area[region]:
            found[region] = severity[part]
    return found[1:]


def _judged(results: WorkspaceResults, rows: pa.Table, masks: dict[str, HumanMask]) -> Iterator[JudgedRegions]:
    """Judge the regions of some images; those that cannot be read are passed over."""
    regions = results.regions.filter(pc.is_in(results.regions["image"], rows["name"].combine_chunks())).to_pylist()
    by_name: dict[str, list[dict[str, Any]]] = {}
    for region in regions:
        by_name.setdefault(region["image"], []).append(region)
    for row in rows.to_pylist():
        try:
            path = results.workspace.mask(row["name"])
            mask = decode(read_bytes(path), path, max_pixels=MAX_PIXELS).pixels[:, :, 0] > 0
            human = masks[row["id"]].read()
            if not mask.shape == human.shape == (row["height"], row["width"]):
                continue
            yield judge(mask, human, by_name.get(row["name"], []))
        except (ImageError, MemoryError):
            continue
