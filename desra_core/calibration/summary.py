"""Say in words and tables which class weights a calibration found: for a terminal, the Prefect UI and a page."""

import math
from collections.abc import Sequence

from desra_core.calibration.weights import CalibratedWeights, ClassWeight, largest_differences
from desra_core.detection.mask import THRESHOLD
from desra_core.evaluation.table import Section, counted

COMPARISON = "Comparison with the published table"  # the heading of the weights of all classes that were seen

_NAMED, _DIFFERENCES = 8, 5


def thin_classes(calibrated: CalibratedWeights) -> str:
    """Name the classes with too few pixels or images; empty where there is none."""
    thin = sorted(_in_state(calibrated, "thin"), key=lambda row: -row.pixels)
    named = ", ".join(f"{row.name} ({row.pixels:,} px in {row.images})" for row in thin[:_NAMED])
    asked = f"{calibrated.origin['min_pixels']:,} pixels or {calibrated.origin['min_images']} images"
    return f"classes with fewer than {asked}: {named}{', …' if len(thin) > _NAMED else ''}" if thin else ""


def weight_sections(calibrated: CalibratedWeights) -> list[Section]:
    """Describe what was counted and the threshold, then the weights of all classes."""
    histogram, suggested = calibrated.histogram, calibrated.suggested
    excluded = f", {counted(histogram.excluded, 'pixel')} excluded" if histogram.excluded else ""
    states = (f"{len(_in_state(calibrated, state))} {state}" for state in ("calibrated", "thin", "unseen"))
    ours, published = (f"{100 * share:.3g} %" for share in calibrated.below)
    bullets = [
        f"{counted(int(histogram.pixels.sum()), 'pixel')} of {counted(histogram.seen, 'image')} counted{excluded}",
        f"classes: {', '.join(states)}; thin and unseen ones get the fallback, {calibrated.origin['fallback']}",
        f"at threshold {THRESHOLD}, {ours} of the counted pixels are below ({published} with the published weights), "
        "before morphology",
    ]
    if suggested.threshold is not None:
        other = suggested.published_threshold
        also = f"; with the published weights {other:.4g}" if other is not None else ""
        share = f"{100 * suggested.rate:.12g} % of the counted, artifact-free pixels"
        bullets.append(f"--threshold {suggested.threshold:.4g} puts at most {share} below, before morphology{also}")
    bullets += [
        f"{row.name}: weight {row.weight:.3f}, published {row.published_weight:.3f}"
        for row in largest_differences(calibrated.rows, _DIFFERENCES)
    ]
    seen = weight_rows([row for row in calibrated.rows if row.pixels])
    unseen = ", ".join(row.name for row in _in_state(calibrated, "unseen"))
    larger = "A weight above the published one forgives more."
    return [
        Section(bullets=bullets),
        Section(COMPARISON, note=larger, table=seen),
        *([Section("Unseen classes, with the weights of the fallback", note=f"{unseen}.")] if unseen else []),
    ]


def weight_rows(rows: Sequence[ClassWeight]) -> list[dict[str, str]]:
    """Write classes as rows of a table, the classes with most pixels first."""
    cells = []
    for row in by_pixels(rows):
        ratio = row.weight / row.published_weight
        note = "as published" if math.isclose(ratio, 1, rel_tol=5e-4) else f"{ratio:.2f} x published"
        cells.append({
            "class": f"{row.class_index} {row.name}",
            "pixels": f"{row.pixels:,}",
            "images": f"{row.images:,}",
            "interval": "–" if row.interval is None else str(row.interval),
            "published interval": str(row.published_interval),
            "weight": f"{row.weight:.3f}",
            "published weight": f"{row.published_weight:.3f}",
            "note": note if row.state == "calibrated" else f"{row.state}: fallback",
        })  # fmt: skip
    return cells


def by_pixels(rows: Sequence[ClassWeight]) -> list[ClassWeight]:
    """Sort classes, those with most pixels first."""
    return sorted(rows, key=lambda row: (-row.pixels, row.class_index))


def _in_state(calibrated: CalibratedWeights, state: str) -> list[ClassWeight]:
    return [row for row in calibrated.rows if row.state == state]
