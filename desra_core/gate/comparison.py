"""Plan a gate run (the candidates, the old model, the held-out images), and publish its verdict.

Also make the settings of the three parts of a cycle: mining, finetune and gate.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from desra_core.errors import UsageError
from desra_core.files import as_json, content_key, fingerprint, read_document, read_json, sweep
from desra_core.gate.criteria import Verdict, VerdictDocument
from desra_core.gate.judge import CONTROL, Candidate, ComparedModels, read_judgement, worst_regions
from desra_core.gate.model_registry import current_model, rolled_back
from desra_core.gate.rounds import Rounds, Work
from desra_core.networks.checkpoints import (
    BICUBIC,
    KEPT_BYTES,
    Engine,
    load_model,
    load_pair,
    read_kinds,
    save_torch,
)
from desra_core.networks.perceptual import load_lpips
from desra_core.planning.plan import (
    check_kind,
    check_models,
    load_settings,
    reference_key,
    result_key,
    result_version,
    target_of,
)
from desra_core.settings import CorpusSettings, Mining, detector_of
from desra_core.settings.models import Comparing, Cycling, Finetuning
from desra_core.training.plan import RunFolder, check_networks
from desra_core.training.pools import Pools
from desra_core.training.twin import twinning_of
from desra_core.workspace import Workspace
from desra_core.workspace.human_masks import read_human_masks
from desra_core.workspace.manifest import ImageRef
from desra_core.workspace.products import Target

# Raise it when the meaning of a judgement changes, or a number of it by more than rounding.
JUDGE_VERSION = 2

# The verdict shows this many regions, each before and after finetuning.
_PICTURES = 8

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True)
class Comparison(ComparedModels):
    """A comparison of finetuned models with the old one on held-out images; the control is the last candidate."""

    settings: Comparing
    corpus: CorpusSettings
    target: Target
    marked: list[ImageRef]  # with artifacts before
    clean: list[ImageRef]

    @property
    def images(self) -> list[ImageRef]:
        """The images that judge."""
        return self.marked + self.clean

    def rounds(self) -> Rounds:
        """Begin the rounds anew; what was judged before is found in the workspace."""
        read = partial(read_judgement, Workspace(self.settings.workspace), human=self.human)
        return Rounds(read, self.candidates, self.marked, self.clean, self.settings)

    def missing(self) -> Work:
        """List the images that lack judgements in the next round, with the candidates concerned."""
        return next((each.missing for each in self.rounds()), [])

    def by_networks(self, work: Work) -> Work:
        """Arrange work by groups of candidates whose networks a worker can keep in memory together.

        With larger groups, a worker would load each network again for every image.
        """
        pair = [Path(model) for model in (self.before, self.mse_model) if model and str(model) != BICUBIC]
        files = [candidate.model for candidate in self.candidates if candidate.model]
        largest = max(file.stat().st_size for file in (*files, *pair))  # a pair in half precision takes as much memory
        count = max(1, KEPT_BYTES // largest - len(pair))
        names = [candidate.name for candidate in self.candidates]
        groups = [names[start : start + count] for start in range(0, len(names), count)]
        arranged = [(image, tuple(n for n in lacking if n in group)) for group in groups for image, lacking in work]
        return [(image, turn) for image, turn in arranged if turn]

    def best(self, verdict: Verdict) -> Candidate | None:
        """Find the best candidate of a verdict; None without candidates."""
        return next((c for c in self.candidates[:-1] if c.name == verdict.best), None)

    @property
    def human_masks(self) -> int:
        """Count the images with a human mask that counts."""
        return sum(image.id in self.human for image in self.images)

    @property
    def key(self) -> str:
        """Identify the candidates and the images."""
        return fingerprint([candidate.key for candidate in self.candidates], [image.id for image in self.images])


def plan_comparison(settings: Comparing) -> Comparison:
    """Find the models, split the checkpoints into candidates and choose held-out images. The workspace must be locked.

    The keys of the judgements and the files of the candidates are recorded, so that desra gc keeps both.

    Raises:
        UsageError: A model is missing, cannot be used or is of another scale; the workspace has no run in it or no LR
            photos.
    """
    workspace = Workspace(settings.workspace)
    corpus, target = load_settings(workspace)
    if not detector_of(corpus).weighs_classes:
        reason = f"was searched with {target.method}, but the gate judges by DeSRA"
        raise UsageError(workspace.root, reason, "use a workspace of desra mine, or of desra detect without --method")

    def recorded(role: str) -> str:
        model = getattr(corpus, role, None)
        if model is None:
            reason = f"records no {role.replace('_', ' ')}: it belongs to desra detect"
            flag = "--before" if role == "gan_model" else "--mse-model"
            raise UsageError(corpus.workspace, reason, f"give {flag}")
        return str(model)

    before = settings.before or Path(recorded("gan_model"))
    mse_model = None if corpus.sources.gan_sr else settings.mse_model or recorded("mse_model")
    pools = Pools(workspace, corpus, target, settings.group_by, settings.lr)
    networks = [before, *([Path(mse_model)] if mse_model and str(mse_model) != BICUBIC else [])]

    def judge_key(candidate: str) -> str:
        models = [reference_key(str(model)) if model else None for model in (before, mse_model, settings.lpips)]
        detection = [target.similarity_key, target.weighting_key, target.threshold, target.min_area]
        # Where results of a network have changed, judgements of the earlier ones do not count.
        versions = [result_version(model, content_key(model)) for model in networks]
        return fingerprint(
            "judge", JUDGE_VERSION, models, detection, candidate, *([versions] if max(versions) > 1 else [])
        )

    found = _split_checkpoints(workspace, settings.after, judge_key)
    noted = read_document(workspace.compared(settings.after)).get("candidates", [])
    scale = _check_scales(found, before, mse_model, loaded_before={each["judgements"] for each in noted})
    if settings.lpips:
        load_lpips(settings.lpips)
    candidates = (*found, Candidate(CONTROL, None, judge_key(CONTROL)))
    notes = [{"name": c.name, "judgements": c.key, "file": c.model.name if c.model else None} for c in candidates]
    noted_now = as_json({"after": str(settings.after), "candidates": notes})
    workspace.publish(workspace.compared(settings.after), noted_now, durable=True)
    # The order by content hash gives a fair sample of the held-out images, and the same sample in every run.
    marked, clean = pools.held_out_judges(settings.held_out), pools.clean("held_out", settings.clean)
    engine: Engine = corpus.engine if isinstance(corpus, Mining) else "float32"
    # Masks that were drawn on the results of another model than the old one are no ground truth of these. Which model
    # made results in files is not known.
    drawn_on = target.gan_sr_key
    is_old = drawn_on is None or drawn_on == result_key(before, engine)
    drawn = read_human_masks(workspace, drawn_on) if is_old else {}
    return Comparison(
        candidates=candidates,
        before=before,
        mse_model=mse_model,
        scale=scale,
        engine=engine,
        lpips=settings.lpips,
        settings=settings,
        corpus=corpus,
        target=target,
        human={image.id: drawn[image.id] for image in (*marked, *clean) if image.id in drawn},
        marked=marked,
        clean=clean,
    )


def verdict_of(comparison: Comparison) -> Verdict:
    """Decide by the judgements that are there; nothing is written.

    Images that lack a judgement which the rounds ask for count for no candidate.
    """
    return _ended(comparison.rounds()).verdict()


def decide_and_publish(comparison: Comparison) -> Verdict:
    """Decide on all candidates, publish the verdict with the models, the images and the best candidate, and clean up.

    Raises:
        UsageError: The document of the finetune cannot be used.
        TransientError: The disk is full or failed.
    """
    workspace = Workspace(comparison.settings.workspace)
    rounds = _ended(comparison.rounds())
    verdict = rounds.verdict()
    run, best = RunFolder(comparison.settings.after), comparison.best(verdict)
    models = {"before": comparison.before, "mse_model": comparison.mse_model, "best": best and best.source}
    documents = {
        role: {"path": str(path), "key": reference_key(str(path))} if path else None for role, path in models.items()
    }
    if best and documents["best"]:
        documents["best"] |= {"weights": best.weights, "file": str(best.model)}
    document = documents | {
        "verdict": verdict,
        "after": str(comparison.settings.after),
        "pictures": _pictures(workspace, comparison, best) if best else [],
        "finetune": read_json(run.document),
        "losses": run.read_losses(),
        "images": [image.names[0] for image in rounds.images],
        "key": comparison.key,
        "mask_key": comparison.target.mask_key,
    }
    try:
        content = as_json(VerdictDocument.model_validate(document).model_dump(mode="json", exclude_unset=True))
    except ValidationError:
        remedy = "name the saved checkpoint itself as --after"
        raise UsageError(run.document, "is damaged or of another version", remedy) from None
    workspace.publish(workspace.verdict, content, durable=True)
    shutil.rmtree(workspace.gate_results, ignore_errors=True)
    return verdict


def _ended(rounds: Rounds) -> Rounds:
    """Go through all rounds with the judgements that are there."""
    for _ in rounds:
        pass
    return rounds


def mining_of(cycling: Cycling) -> Mining:
    """Make the settings of mining: with the workspace's current model, or the given one where none was promoted."""
    return mining_with_current(_part(Mining, cycling))


def mining_with_current(mining: Mining) -> Mining:
    """Replace the GAN model by the workspace's current model, where one was promoted."""
    current = current_model(Workspace(mining.workspace))
    return mining.model_copy(update={"gan_model": current}) if current else mining


def finetuning_of(cycling: Cycling, mining: Mining) -> Finetuning:
    """Make the settings to finetune the model that mined, with its discriminator, in a folder named by the inputs."""
    discriminator = _discriminator_of(mining.gan_model, cycling)
    return _part(Finetuning, cycling, gan_model=mining.gan_model, discriminator=discriminator)


def finetuning_with_current(finetuning: Finetuning) -> Finetuning:
    """Replace the GAN model by the workspace's current model and its discriminator, where a model was promoted.

    Raises `UsageError` where the workspace holds the artifacts of another model.
    """
    workspace = Workspace(finetuning.workspace)
    current = current_model(workspace)
    if current is None:
        return finetuning
    mined: Path | None = getattr(load_settings(workspace)[0], "gan_model", None)
    if mined and content_key(mined) != content_key(current):
        reason = f"holds the artifacts of {mined}, which is not the current model"
        raise UsageError(workspace.root, reason, "mine with the current one first")
    own = {"gan_model": current, "discriminator": _discriminator_of(current, finetuning)}
    return finetuning.model_copy(update=own)


def comparing_of(cycling: Cycling, mining: Mining, after: Path) -> Comparing:
    """Make the settings of the gate, which judges all saved models. The cycle, not the gate, promotes the best one."""
    models = {"before": mining.gan_model, "mse_model": mining.mse_model}
    return _part(Comparing, cycling, **models, after=after, promote=False)


def check_mining(cycling: Cycling) -> None:
    """Check, before hours of work, that settings, models and class weights of the mining can be used.

    A twin that is to be trained first is not there yet: bicubic enlargement stands for it.

    Raises:
        UsageError: Something cannot be used, or there is no MSE model, nor photos to train one on.
    """
    workspace, mining = Workspace(cycling.workspace), mining_of(cycling)
    if twinning_of(cycling):
        mining = mining.model_copy(update={"mse_model": BICUBIC})
    check_kind(workspace, mining)
    target, _ = target_of(mining)
    check_models(workspace, mining, target)


def check_training(cycling: Cycling, mining: Mining) -> None:
    """Check, before hours of mining, that all networks can be used (raises `UsageError`)."""
    check_networks(mining.gan_model, finetuning_of(cycling, mining))
    if cycling.lpips:
        load_lpips(cycling.lpips)


def is_to_promote(cycling: Cycling, comparison: Comparison, verdict: Verdict) -> bool:
    """Decide whether the best candidate becomes current: it passes, and it was not current before."""
    best = comparison.best(verdict) if cycling.promote and verdict.passed else None
    return best is not None and best.model is not None and not rolled_back(Workspace(cycling.workspace), best.model)


def _split_checkpoints(workspace: Workspace, after: Path, judge_key: Callable[[str], str]) -> list[Candidate]:
    """Save each kind of weights of each checkpoint to a file of its own, which is judged and promoted as it is."""
    files = RunFolder(after).models() if after.is_dir() else [after]
    if not files:
        raise UsageError(after, "holds no saved model", "name the folder of a finetune, or a checkpoint")
    folder = workspace.gate / "candidates"
    sweep(folder)
    found = []
    for file in files:
        stem = file.stem.replace("iteration_", "") if after.is_dir() else file.stem
        content = content_key(file)
        kinds = read_kinds(file)
        for kind, weights in kinds.items():
            path = folder / f"{content}-{kind}.pth"
            if not path.exists():
                # The weights get both names, because tools differ in the name that they read.
                save_torch(path, {"params": weights, "params_ema": weights})
            name = f"{stem} {kind}" if len(kinds) > 1 else stem
            found.append(Candidate(name, path, judge_key(path.stem), file, kind))
    return found


def _check_scales(
    candidates: Sequence[Candidate], before: Path, mse_model: str | None, *, loaded_before: set[str]
) -> int:
    """Check that all models can be used and have one scale, which is returned; skip candidates of earlier plans."""
    old = load_model(before)
    if mse_model:
        load_pair(mse_model, before)
    for candidate in candidates:
        if candidate.key in loaded_before:
            continue
        assert candidate.model is not None
        assert candidate.source is not None
        try:
            scale = load_model(candidate.model).scale
        except UsageError as error:
            raise UsageError(candidate.source, error.reason, error.remedy) from None
        if scale != old.scale:
            reason = f"enlarges by {scale}, but {before} by {old.scale}"
            raise UsageError(candidate.source, reason, "compare models of one scale")
    return old.scale


def _pictures(workspace: Workspace, comparison: Comparison, best: Candidate) -> list[dict[str, Any]]:
    """List the worst regions before finetuning, each with the paths of its crops below the gate's folder."""
    control = comparison.candidates[-1]
    keys = {"lr": control.key, "mse_sr": control.key, "before": control.key, "after": best.key}
    found: list[dict[str, Any]] = []
    for image in comparison.images:
        judgement = read_judgement(workspace, best, image, comparison.human)
        for rank, region in enumerate(worst_regions(judgement) if judgement else ()):
            crops = {kind: workspace.judged_crop(key, image.id, kind, rank) for kind, key in keys.items()}
            paths = {kind: str(path.relative_to(workspace.gate)) for kind, path in crops.items()}
            found.append({"image": image.names[0], "region": region, "crops": paths})
    return sorted(found, key=lambda picture: -picture["region"].severity)[:_PICTURES]


def _discriminator_of(model: Path, given: Cycling | Finetuning) -> Path | None:
    """Find the discriminator of a model: the given one for the given model, else the one saved beside the model."""
    if given.gan_model and content_key(model) == content_key(given.gan_model):
        return given.discriminator
    source = read_document(model.with_name("model.json")).get("source", "")
    path = Path(source).with_suffix(".discriminator.pth") if source else None
    return path if path and path.exists() else None


def _part(kind: type[Settings], cycling: Cycling, **other: object) -> Settings:
    """Make the settings of a part of the cycle from the cycle's settings of the same names, and ``other``."""
    shared = {name: getattr(cycling, name) for name in kind.model_fields if hasattr(cycling, name)}
    return kind(**(shared | other))
