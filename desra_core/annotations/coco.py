"""Write COCO files of artifact regions: one category, compressed run-length encodings, severities as scores.

Fields that COCO does not have are in ``attributes``, which FiftyOne and CVAT show: the ADE20K class, severity and mean
similarity, and whether a person or the detector drew the mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from desra_core.annotations.selection import Annotated, Annotation
from desra_core.evaluation.coco_masks import CATEGORY


def coco_annotations(image: Annotated) -> list[dict[str, Any]]:
    """Describe the regions of an image as COCO annotations, without ids (raises `desra_core.errors.ImageError`)."""
    return [_annotation(annotation, image.shape) for annotation in image.annotations()]


def coco_document(images: Iterable[tuple[str, tuple[int, int], list[dict[str, Any]]]]) -> bytes:
    """Write a COCO file.

    Args:
        images: File name, ``(H, W)`` and annotations of each.
    """
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file_name, (height, width), found in images:
        rows.append({"id": len(rows) + 1, "file_name": file_name, "width": width, "height": height})
        for annotation in found:
            ids = {"id": len(annotations) + 1, "image_id": len(rows), "category_id": 1}
            annotations.append(ids | annotation)
    document = {
        "info": {"description": "Artifacts of a GAN super-resolution model, found by desra"},
        "licenses": [],
        "categories": [{"id": 1, "name": CATEGORY, "supercategory": ""}],
        "images": rows,
        "annotations": annotations,
    }
    return json.dumps(document, indent=1).encode()


def _annotation(annotation: Annotation, shape: tuple[int, int]) -> dict[str, Any]:
    from pycocotools import mask as coco

    part, region = annotation
    encoded = coco.encode(part.on(shape).astype(np.uint8, order="F"))
    attributes: dict[str, Any] = {"mask_by": "detector" if region else "person"}
    if annotation.class_name is not None:
        attributes["class"] = annotation.class_name
    score = {}
    if region:
        attributes |= {"mean_similarity": region["mean_similarity"], "severity": region["severity"]}
        score = {"score": region["severity"]}
    return {
        "segmentation": {"size": list(shape), "counts": encoded["counts"].decode()},
        "bbox": [part.x, part.y, *part.crop.shape[::-1]],
        "area": part.area,
        # Not a crowd: crowds are left out where results are judged.
        "iscrowd": 0,
        **score,
        "attributes": attributes,
    }
