"""Scores as rows that a person reads: on the command line, in the Prefect UI and in the report."""

from __future__ import annotations

from desra_core.evaluation.table import in_percent
from desra_core.gate.verdict import Score, Verdict

COLUMNS = ("candidate", "regions gone", "removal", "images with added", "artifact area", "PSNR", "SSIM", "GMS", "LPIPS",
           "detail lost")  # fmt: skip


def score_rows(verdict: Verdict) -> list[dict[str, str]]:
    """The scores of all candidates and of the control, by `COLUMNS`; LPIPS only where it was measured."""
    rows = [_row(score) for score in (*verdict.scores, verdict.control)]
    if all(row["LPIPS"] == "" for row in rows):
        for row in rows:
            del row["LPIPS"]
    return rows


def _row(score: Score) -> dict[str, str]:
    after = score.area_after / score.area_before if score.area_before else None
    return dict(
        zip(
            COLUMNS,
            (
                score.candidate,
                f"{score.gone} of {score.regions}",
                in_percent(score.removal, score.removal_interval),
                f"{score.images_added} of {score.images}, {in_percent(score.addition, score.addition_interval)}",
                in_percent(after),
                "same" if score.psnr is None else f"{score.psnr:.1f} dB",
                _number(score.ssim),
                _number(score.gradient_similarity),
                _number(score.lpips),
                in_percent(score.detail_loss),
            ),
            strict=True,
        )
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
