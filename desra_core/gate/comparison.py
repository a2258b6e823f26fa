"""A gate run: which candidates against which old model on which held-out images, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from desra_core.detection.class_weights import Weights
from desra_core.errors import UsageError
from desra_core.evaluation.perceptual import load_lpips
from desra_core.files.atomic import sweep
from desra_core.files.hashing import content_key, fingerprint
from desra_core.gate.judge import CONTROL, Candidate, JudgeSettings, read_judgement, worst_regions
from desra_core.gate.verdict import Score, Verdict, decide, score
from desra_core.networks.checkpoints import KEPT_BYTES, Precision, load_model, load_pair
from desra_core.networks.weights import read_kinds
from desra_core.planning.keys import load_settings, result_key
from desra_core.settings import CorpusSettings, Mining, detector_of
from desra_core.settings.models import Comparing
from desra_core.training.pools import Images
from desra_core.training.run_folder import RunFolder, read_json, save_torch
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Target

# Raise it when the meaning or a bit of a judgement changes.
JUDGE_VERSION = 2

# Regions shown before and after.
_PICTURES = 8


class Saved(NamedTuple):
    """A candidate and where it comes from: the saved checkpoint, and which of its two kinds of weights."""

    candidate: Candidate
    source: Path
    kind: str


@dataclass(frozen=True)
class Comparison:
    """What is to be judged; the control is the last of ``candidates``."""

    settings: Comparing
    corpus: CorpusSettings
    target: Target
    before: Path
    mse_model: Path | None
    precision: Precision
    saved: list[Saved]
    candidates: tuple[Candidate, ...]
    images: list[ImageRef]

    def missing(self) -> list[tuple[ImageRef, tuple[str, ...]]]:
        """The images that lack judgements, with the candidates concerned."""
        workspace = Workspace(self.settings.workspace)
        lacking = [
            (image, tuple(c.name for c in self.candidates if read_judgement(workspace, c, image) is None))
            for image in self.images
        ]
        return [(image, names) for image, names in lacking if names]

    def work(self) -> list[tuple[ImageRef, tuple[str, ...]]]:
        """The same, but so few candidates at a time, on all images, that a worker can keep their networks.

        Else each of them would be loaded for every image anew.
        """
        missing = self.missing()
        sizes = [entry.candidate.model.stat().st_size for entry in self.saved if entry.candidate.model]
        pair = sum(path.stat().st_size for path in (self.before, self.mse_model) if path)
        count = max(1, (KEPT_BYTES - pair) // max(sizes, default=1))
        names = [candidate.name for candidate in self.candidates]
        work = []
        for start in range(0, len(names), count):
            turn = set(names[start : start + count])
            work += [(image, tuple(filter(turn.__contains__, lacking))) for image, lacking in missing]
        return [(image, turn) for image, turn in work if turn]

    @property
    def by_people(self) -> int:
        """How many of the images have a mask by a person that counts."""
        human = read_human_masks(Workspace(self.settings.workspace), self.target.gan_sr_key)
        return sum(image.id in human for image in self.images)

    @property
    def key(self) -> str:
        """Identifies what is judged, by what."""
        return fingerprint([candidate.key for candidate in self.candidates], [image.id for image in self.images])


def plan_comparison(settings: Comparing) -> Comparison:
    """Find the models, split the checkpoints into candidates and choose held-out images. The workspace must be locked.

    Raises
    ------
    UsageError
        A model is missing, cannot be used or is of another scale; the workspace has no run in it or no LR photos.
    """
    workspace = Workspace(settings.workspace)
    corpus, target = load_settings(workspace)
    if not detector_of(corpus).weighs_classes:
        reason = f"was searched with {target.method}, but the gate judges by DeSRA"
        raise UsageError(workspace.root, reason, "use a workspace of desra mine, or of desra detect without --method")
    before = settings.before or _recorded(corpus, "gan_model", "--before")
    mse_model = None if corpus.sources.gan_sr else settings.mse_model or _recorded(corpus, "mse_model", "--mse-model")
    precision = corpus.precision if isinstance(corpus, Mining) else "float32"
    images = Images(workspace, corpus, target, settings.group_by, settings.lr)
    # The hash of the content as order: a fair sample of the held-out images, and the same one in every run.
    # What only a person has marked cannot show whether the detector finds less.
    marked = sorted((found.image for found in images.marked("held_out") if found.detected), key=lambda image: image.id)
    saved = _candidates(workspace, settings, before, mse_model, target)
    _check_scales(workspace, settings.after, saved, before, mse_model)
    if settings.lpips:
        load_lpips(settings.lpips)
    control = Candidate(CONTROL, None, _judge_key(settings, target, before, mse_model, CONTROL))
    candidates = (*(entry.candidate for entry in saved), control)
    _note(workspace, settings.after, candidates)
    return Comparison(
        settings=settings,
        corpus=corpus,
        target=target,
        before=before,
        mse_model=mse_model,
        precision=precision,
        saved=saved,
        candidates=candidates,
        images=marked[: settings.held_out] + images.clean("held_out", settings.clean),
    )


def verdict_of(comparison: Comparison) -> Verdict:
    """Hold the scores of all candidates against the gate; nothing is written.

    Images that lack the judgement of one candidate are left out for all of them.
    """
    return _verdict(comparison, _judged(comparison))


def conclude(comparison: Comparison) -> Verdict:
    """Publish the verdict on all candidates, and return it.

    The verdict's document names the models, the images and the best candidate, for the report and for whoever asks
    in a year why a model was promoted.
    """
    workspace = Workspace(comparison.settings.workspace)
    judged = _judged(comparison)
    verdict = _verdict(comparison, judged)
    best = best_of(comparison, verdict)
    run = RunFolder(comparison.settings.after)
    document = {
        "verdict": verdict.to_json(),
        "before": _told(comparison.before),
        "mse_model": _told(comparison.mse_model) if comparison.mse_model else None,
        "after": str(comparison.settings.after),
        "best": _told(best.source) | {"weights": best.kind, "file": str(best.candidate.model)} if best else None,
        "pictures": _pictures(workspace, comparison, best.candidate) if best else [],
        "finetune": read_json(run.document),
        "losses": read_json(run.losses) or [],
        "images": [image.names[0] for image in judged],
        "key": comparison.key,
        "mask_key": comparison.target.mask_key,
    }
    workspace.publish(workspace.verdict, json.dumps(document, indent=1).encode(), durable=True)
    return verdict


def _judged(comparison: Comparison) -> list[ImageRef]:
    """The images on which every candidate was judged."""
    lacking = {image.id for image, _ in comparison.missing()}
    return [image for image in comparison.images if image.id not in lacking]


def _verdict(comparison: Comparison, judged: Sequence[ImageRef]) -> Verdict:
    workspace = Workspace(comparison.settings.workspace)
    scores = [_score(workspace, candidate, judged) for candidate in comparison.candidates]
    return decide(scores[:-1], scores[-1], comparison.settings)


def best_of(comparison: Comparison, verdict: Verdict) -> Saved | None:
    """Where the best candidate comes from."""
    return next((entry for entry in comparison.saved if entry.candidate.name == verdict.best), None)


def _score(workspace: Workspace, candidate: Candidate, images: Iterable[ImageRef]) -> Score:
    judgements = (read_judgement(workspace, candidate, image) for image in images)
    return score(candidate.name, [judgement for judgement in judgements if judgement is not None])


def _recorded(corpus: CorpusSettings, role: str, flag: str) -> Path:
    """A model of the latest mining run."""
    model: Path | None = getattr(corpus, role, None)
    if model is None:
        remedy = f"give {flag}"
        raise UsageError(corpus.workspace, f"records no {role.replace('_', ' ')}: it belongs to desra detect", remedy)
    return model


def _candidates(
    workspace: Workspace, settings: Comparing, before: Path, mse_model: Path | None, target: Target
) -> list[Saved]:
    """Both kinds of weights of each checkpoint, each as a checkpoint of its own: what is judged is what is promoted."""
    files = RunFolder(settings.after).models() if settings.after.is_dir() else [settings.after]
    if not files:
        raise UsageError(settings.after, "holds no saved model", "name the folder of a finetune, or a checkpoint")
    folder = workspace.gate / "candidates"
    sweep(folder)
    found = []
    for file in files:
        stem = file.stem.replace("iteration_", "") if settings.after.is_dir() else file.stem
        content = content_key(file)
        kinds = read_kinds(file)
        for kind, weights in kinds.items():
            key = f"{content}-{kind}"
            path = folder / f"{key}.pth"
            if not path.exists():
                # Under both names: tools differ in which they look for first.
                save_torch(path, {"params": weights, "params_ema": weights})
            name = f"{stem} {kind}" if len(kinds) > 1 else stem
            candidate = Candidate(name, path, _judge_key(settings, target, before, mse_model, key))
            found.append(Saved(candidate, file, kind))
    return found


def _note(workspace: Workspace, after: Path, candidates: Sequence[Candidate]) -> None:
    """Write down what a comparison needs of the gate's folder: without that, nobody could tell whose a judgement is."""
    told = [{"name": c.name, "judgements": c.key, "file": c.model.name if c.model else None} for c in candidates]
    document = {"after": str(after), "candidates": told}
    workspace.publish(workspace.compared(after), json.dumps(document, indent=1).encode(), durable=True)


def _judge_key(settings: Comparing, target: Target, before: Path, mse_model: Path | None, candidate: str) -> str:
    models = [content_key(model) if model else None for model in (before, mse_model, settings.lpips)]
    detection = [target.similarity_key, target.weighting_key, target.threshold, target.min_area]
    return fingerprint("judge", JUDGE_VERSION, models, detection, candidate)


def _check_scales(
    workspace: Workspace, after: Path, saved: Sequence[Saved], before: Path, mse_model: Path | None
) -> None:
    """See that all models can be used and enlarge by the same factor, but for those that an earlier plan has noted."""
    old = load_model(before)
    if mse_model:
        load_pair(mse_model, before)
    noted = {told["judgements"] for told in (read_json(workspace.compared(after)) or {}).get("candidates", [])}
    for entry in saved:
        if entry.candidate.key in noted:
            continue
        assert entry.candidate.model is not None
        scale = load_model(entry.candidate.model).scale
        if scale != old.scale:
            raise UsageError(entry.source, f"enlarges by {scale}, but {before} by {old.scale}",
                             "compare models of one scale")  # fmt: skip


def judge_settings(
    comparison: Comparison, weights: Weights, *, device: str, tile: int, threads: int, max_pixels: int
) -> JudgeSettings:
    """What the judge stage needs of a comparison, on some machine."""
    mse_sr_key, before_key = _result_keys(comparison)
    corpus = comparison.corpus
    return JudgeSettings(
        candidates=comparison.candidates,
        mse_model=comparison.mse_model,
        before=comparison.before,
        mse_sr_key=mse_sr_key,
        before_key=before_key,
        precision=comparison.precision,
        device=device,
        segmenter=corpus.segmenter,
        weights=None if corpus.segmenter == "none" else weights.values,
        threshold=corpus.threshold,
        min_area=corpus.min_area,
        window=corpus.window,
        lpips=comparison.settings.lpips,
        tile=tile,
        threads=threads,
        max_pixels=max_pixels,
    )


def _pictures(workspace: Workspace, comparison: Comparison, best: Candidate) -> list[dict[str, Any]]:
    """The worst regions before, each with the paths of its crops below the gate's folder."""
    control = comparison.candidates[-1]
    found: list[dict[str, Any]] = []
    for image in comparison.images:
        judgement = read_judgement(workspace, best, image)
        for rank, region in enumerate(worst_regions(judgement) if judgement else ()):
            keys = {"lr": control.key, "mse_sr": control.key, "before": control.key, "after": best.key}
            crops = {kind: workspace.judged_crop(key, image.id, kind, rank) for kind, key in keys.items()}
            paths = {kind: str(path.relative_to(workspace.gate)) for kind, path in crops.items()}
            found.append({"image": image.names[0], "region": region._asdict(), "crops": paths})
    return sorted(found, key=lambda picture: -picture["region"]["severity"])[:_PICTURES]


def _result_keys(comparison: Comparison) -> tuple[str | None, str | None]:
    """The keys under which MSE and old results in the workspace serve again; None where they are of other models."""

    def if_of(model: Path | None, known: str | None) -> str | None:
        return known if model and result_key(model, comparison.precision) == known else None

    target = comparison.target
    return if_of(comparison.mse_model, target.mse_sr_key), if_of(comparison.before, target.gan_sr_key)


def _told(path: Path) -> dict[str, str]:
    return {"path": str(path), "key": content_key(path)}
