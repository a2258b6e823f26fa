"""Say in words and tables how masks agree with their ground truth: for a terminal, and for a page."""

from desra_core.errors import printable
from desra_core.evaluation.evaluation import Evaluation, Row, class_rows, image_rows, rated_regions
from desra_core.evaluation.metrics import AS_PUBLISHED, MaskScores, Overlap
from desra_core.evaluation.table import Section, counted, fixed

CLASSES = "Classes"  # the heading of the scores by class

_IMAGES, _LISTED = 200, 200
_TERMS = (
    "valid region: all is counted without the outermost 5 px of an image, in which nothing is detected",
    "region: an 8-connected component of a mask",
    "IoU: pixels in both masks over pixels in either, the mean over images; undefined where both are empty",
    "precision: of all detected regions, those of which at least half of the pixels lie in the ground truth",
    "recall: of all ground-truth regions, those of which at least half of the pixels lie in the mask",
    "F1: the harmonic mean of precision and recall",
    "pixel F1: the harmonic mean of the precision and recall of pixels (Dice), of all pixels together, and as the mean "
    "over images; undefined where both masks are empty",
    "flagged: the share of all pixels of the valid regions that the masks mark",
    "95 % interval: the range of results of other sets of as many such images (bootstrap over images); in a chart, of "
    "each bar alone",
)


def notes(evaluation: Evaluation) -> list[str]:
    """List what a reader needs to know to judge the numbers."""
    pairing, sizes, said = evaluation.pairing, evaluation.sizes, []
    if evaluation.scores.images == 1:
        said.append("one image was judged: these numbers may not hold for other images")
    if pairing.not_looked_at:
        said.append(f"{counted(pairing.not_looked_at, 'image')} without a human mask: not judged")
    if pairing.outdated:
        drawn = "drawn on another photo or on another model's result"
        said.append(f"{counted(pairing.outdated, 'human mask')} left out: {drawn}")
    if evaluation.lossy:
        lossy = counted(len(evaluation.lossy), "mask is", "masks are")
        said.append(f"{lossy} JPEG or lossy WebP, thresholded at half: save masks as PNG")
    if sizes is not None:
        taken = {"image": "the image's, so 5 px a side are cropped", "valid": "that of the image without 5 px a side"}
        said.append(f"masks and ground truth have one size, which is taken for {taken[sizes]} (--size)")
    if evaluation.classes is not None and evaluation.unlabelled:
        lacking = counted(evaluation.unlabelled, "image without class labels is", "images without class labels are")
        said.append(f"{lacking} left out by class")
    return said


def without_twin(evaluation: Evaluation) -> list[str]:
    """List the masks that have no ground truth, and the ground truths that have no mask."""
    pairing = evaluation.pairing
    lines = [f"{path}: has no ground truth" for path in pairing.without_ground_truth.values()]
    return lines + [f"{path}: has no mask" for path in pairing.without_mask.values()]


def score_sections(evaluation: Evaluation, classes: int) -> list[Section]:
    """Describe the scores: of all regions, of the prominent ones, and of the ``classes`` classes with most regions."""
    failed = f", {len(evaluation.failures)} failed" if evaluation.failures else ""
    note = f"{counted(evaluation.scores.images, 'image')} judged{failed}"
    sections = [Section(note=note, table=_scores(evaluation.scores, evaluation.overlap))]
    if evaluation.prominent and evaluation.severity:
        note = (
            f"Of {counted(rated_regions(evaluation), 'rated region')}, those that at least "
            f"{100 * evaluation.severity.least_noticed:g} % of the viewers noticed. The others do not count, nor "
            "detected regions that are right only by them."
        )
        sections.append(
            Section("Prominent regions", note=note, table=_scores(evaluation.prominent, evaluation.overlap))
        )
    if evaluation.classes:
        rows = sorted(class_rows(evaluation), key=lambda row: (-row["detected"] - row["marked"], row["class"]))
        note = "Pixels by their own ADE20K class, regions by the class that most of their pixels have."
        if len(rows) > classes:
            note += f" The {classes} of {len(rows)} classes with most regions."
        table = [
            {"class": row["name"]}
            | _measures(row)
            | {"pixel precision": fixed(row["pixel_precision"]), "pixel recall": fixed(row["pixel_recall"])}
            for row in rows[:classes]
        ]
        sections.append(Section(CLASSES, note=note, table=table))
    return sections


def detail_sections(evaluation: Evaluation) -> list[Section]:
    """List the images with the lowest IoU, the meaning of the measures, and what was not judged."""
    rows = sorted(image_rows(evaluation), key=lambda row: (row["iou"] is None, row["iou"]))
    some = f"The {_IMAGES} of {len(rows):,} with the lowest IoU; images.csv has them all."
    left = [printable(error) for error in evaluation.failures] + without_twin(evaluation)
    if evaluation.pairing.not_looked_at:
        left.append(f"{counted(evaluation.pairing.not_looked_at, 'image')} without a human mask")
    lines = left[:_LISTED] or ["nothing: every mask has a ground truth, and every ground truth a mask"]
    if len(left) > _LISTED:
        lines.append(f"and {len(left) - _LISTED:,} more: evaluation.json has them all")
    table = [{"image": row["image"]} | _measures(row) | {"F1": fixed(row["f1"])} for row in rows[:_IMAGES]]
    return [
        Section("All images", note=some if len(rows) > _IMAGES else "The lowest IoU first.", table=table),
        Section("Meaning of the numbers", _TERMS),
        Section("Not judged", lines),
    ]


def _scores(scores: MaskScores, overlap: Overlap) -> list[dict[str, str]]:
    total, rows = scores.total, []
    over_images = f"mean over {counted(scores.images - scores.empty_pairs, 'image')}"
    meanings = {
        "iou": ("IoU", over_images),
        "precision": ("precision", f"{total.right:,} of {counted(total.detected, 'detected region')} right"),
        "recall": ("recall", f"{total.found:,} of {counted(total.marked, 'ground-truth region')} found"),
        "f1": ("F1", "of precision and recall"),
        "pixel_f1": ("pixel F1", "of all pixels"),
        "pixel_f1_mean": ("pixel F1", over_images),
        "flagged_share": ("flagged", "share of all pixels"),
    }
    if overlap != AS_PUBLISHED:  # by default, recall says it
        found = f"{total.found_at_kappa:,} of {counted(total.marked, 'ground-truth region')}"
        meanings["recall_at_kappa"] = "found", f"{found} ({overlap_told(overlap)})"
    if scores.empty_pairs:
        meanings["iou_with_empty"] = "IoU", f"with {counted(scores.empty_pairs, 'pair')} of empty masks, as agreement"
    for measure, (name, meaning) in meanings.items():
        interval, why = scores.intervals[measure], scores.undefined.get(measure)
        rows.append({
            "measure": f"{name}: undefined, {why}" if why else f"{name}: {meaning}",
            "value": fixed(scores.values[measure], 4),
            "95 % interval": f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "–",
        })  # fmt: skip
    return rows


def overlap_told(overlap: Overlap) -> str:
    """Say when a region counts as found."""
    widened = f", widened by {overlap.dilate} px" if overlap.dilate else ""
    return f"at least {100 * overlap.kappa:g} % in the mask{widened}"


def _measures(row: Row) -> dict[str, str]:
    precision, recall = _share(row["right"], row["detected"]), _share(row["found"], row["marked"])
    return {"IoU": fixed(row["iou"]), "precision": precision, "recall": recall}


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f} ({part:,} of {whole:,})" if whole else "–"
