"""Plan a finetune: fix its parent, its settings and its images, and record them in the folder of the run.

All files of the folder are written whole or not at all.

::

    RUN/
      run.json            parents, training images and their hash, settings, versions: the identity of the run
      data/0000/          lr, pseudo_gt and mask of each training image, as arrays
      state.pth           all that a killed run needs to go on
      losses.json         means of the losses since the start
      progress.json       the iterations done, and those asked for
      models/iteration_000250.pth, .json, .discriminator.pth   `params` and `params_ema`, their origin, discriminator
      tensorboard/        losses as scalars, and at each checkpoint pictures of the same patches
"""

import contextlib
import shutil
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from desra_core import files
from desra_core.errors import ImageError, LockedError, UsageError
from desra_core.files import (
    content_key,
    digest,
    fingerprint,
    locked,
    paths_in,
    read_document,
    read_json,
    write_json,
)
from desra_core.planning.plan import load_settings, versions
from desra_core.settings.models import Finetuning, Training
from desra_core.training.patches import Sample, freeze, read_sample, seal_frozen
from desra_core.training.pools import Pools
from desra_core.workspace import DATASET, Workspace
from desra_core.workspace.products import checksums_of

_PACKAGES = ("torch", "spandrel", "basicsr", "numpy")
# Settings that do not enter the name of a run's folder: with more iterations, the same run goes on.
_OPEN_ENDED = {"preset", "iterations", "patience"}
# Settings that may change when a run goes on; the discriminator is compared by its content.
_MAY_DIFFER = _OPEN_ENDED | {"discriminator", "accumulate"}
# Give up when none of this many images can be used.
_TRIES = 20


@dataclass
class RunFolder:
    """The paths below the folder of one finetune."""

    root: Path

    def __post_init__(self) -> None:
        self.document = self.root / "run.json"
        self.data = self.root / "data"
        self.state = self.root / "state.pth"
        self.losses = self.root / "losses.json"
        self.progress = self.root / "progress.json"
        self.tensorboard = self.root / "tensorboard"

    def model(self, iteration: int) -> Path:
        """Return the file of the model after some iterations."""
        return self.root / "models" / f"iteration_{iteration:06d}.pth"

    def models(self) -> list[Path]:
        """List all saved models, the oldest first."""
        return paths_in(self.root / "models", "iteration_??????.pth")

    def lost_models(self) -> list[UsageError]:
        """List the models whose files are gone, by the documents beside them, which are written before them.

        The training of a twin that has its verdict has deleted its models.
        """
        if (self.root / "verdict.json").exists():
            return []
        remedy = f"bring it back from a copy, or delete {self.root} to train again"
        documents = paths_in(self.root / "models", "iteration_[0-9][0-9][0-9][0-9][0-9][0-9].json")
        # A training that was killed may have written the last document and not the model.
        done = read_document(self.progress).get("iteration", iteration_of(documents[-1]) - 1 if documents else 0)
        documents = [path for path in documents if iteration_of(path) <= done]
        gone = (path.with_suffix(".pth") for path in documents if not path.with_suffix(".pth").exists())
        return [UsageError(path, "is gone: the gate cannot choose it", remedy) for path in gone]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and delete the unfinished files of a killed process.

        Raises `LockedError` where another process holds the folder, `TransientError` where it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with files.storage_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                other = stack.enter_context(locked(self.root / "lock", {"machine": files.this_machine()}))
            if other is not None:
                raise LockedError(self.root, "is in use by another training", "wait until it has ended")
            for folder in (self.root, self.root / "models"):
                files.sweep(folder)
            yield

    def read_losses(self) -> list[dict[str, Any]]:
        """Read the means of the losses; none where there is no such file yet."""
        found = read_json(self.losses)
        rows: list[dict[str, Any]] = found["losses"] if isinstance(found, dict) else found  # a list in an older desra
        return rows or []

    def has_ended(self) -> bool:
        """Check whether the training has done what it was last asked to do."""
        training = read_document(self.document).get("training")
        if not isinstance(training, dict):
            return False
        asked: Any = read_document(self.progress).get("iterations", training.get("iterations", 1))
        return self.reached(asked, training.get("patience", 1))

    def reached(self, iterations: int, patience: int) -> bool:
        """Check whether the model of the last iteration is saved, or the run stopped early."""
        progress = read_document(self.progress)
        return self.model(iterations).exists() or progress.get("worse", 0) >= patience


def iteration_of(path: Path) -> int:
    """Return the iteration of a saved model by the name of its file, or of the document beside it."""
    return int(path.stem.rpartition("_")[2])


class FinetunePlan(NamedTuple):
    """A finetune that may begin or go on.

    ``samples`` are the most severe images of the training pool, and spare ones. They are empty where ``begun`` is set:
    the run's images are frozen already. ``ended`` says that nothing is left to do. ``warning`` says which held-out
    images the gate will lack to judge a run that is to begin.
    """

    run: RunFolder
    gan_model: Path
    training: Training
    made_under: str
    samples: list[Sample]
    begun: bool
    ended: bool
    warning: str | None

    @property
    def empty(self) -> bool:
        """Check whether there is no artifact to train on."""
        return not self.begun and not self.samples


def plan_finetune(settings: Finetuning) -> FinetunePlan:
    """Find the parent, the run and the images. The workspace must be locked; only the pools are written.

    Without an ``output``, the run's folder is named after its models, its settings and its images as of now.

    Raises:
        UsageError: No model is known, a network cannot be used, or the run's folder holds another finetune.
    """
    workspace = Workspace(settings.workspace)
    corpus, target = load_settings(workspace)
    gan_model: Path | None = settings.gan_model or getattr(corpus, "gan_model", None)
    if gan_model is None:
        raise UsageError(workspace.root, "records no GAN model: it belongs to desra detect", "give --gan-model")
    training = Training(**{name: getattr(settings, name) for name in Training.model_fields})

    def find_samples() -> tuple[Pools, list[Sample]]:
        """Find the images to train on, and their files: in the dataset of a mined corpus, else among the sources."""
        pools = Pools(workspace, corpus, target, settings.group_by, settings.lr)
        samples = []
        chosen = list(islice(pools.with_artifacts("training"), most_samples(training)))
        known = checksums_of(workspace, (image.id for image, _, _ in chosen))
        for image, severity, human in chosen:
            name, written = image.names[0], known.get(image.id, {})
            checksums = {workspace.mask(name): written.get("masks")}
            if corpus.verb == "mine":
                lr, mask, *results = (workspace.dataset(kind, name) for kind in ("lr", "mask", "pseudo_gt"))
                checksums = {workspace.dataset(kind, name): written.get(f"dataset/{kind}") for kind in DATASET}
            else:
                assert image.lr is not None
                assert image.mse_sr is not None
                assert image.gan_sr is not None
                lr, mask = image.lr.path, workspace.mask(name) if human is None else human.path
                results = [image.mse_sr.path, image.gan_sr.path]
            human_key = None if human is None else digest(human.content())
            samples.append(Sample(name, image.id, severity, lr, mask, tuple(results), human_key, checksums))
        return pools, samples

    found, output = None, settings.output
    if output is None:
        found = find_samples()
        models = [content_key(path) if path else None for path in (gan_model, training.discriminator)]
        same = training.model_dump(mode="json", exclude=_OPEN_ENDED | {"discriminator"})
        key = fingerprint(models, same, _data_key(target.mask_key, found[1][: training.images]))
        output = workspace.finetune(key)
    run = RunFolder(output)
    identity = _identity(gan_model, training)
    document = read_document(run.document) or None
    if document is not None:
        check_same(run, document, identity)
    elif run.document.exists():
        raise UsageError(run.document, "is damaged", f"bring it back from a copy, or delete {run.root} to start anew")
    elif run.root.exists():
        # A run that was killed while it began leaves only data, lock and unfinished files.
        names = [path.name for path in run.root.iterdir()]
        if run.state.name in names or run.models():
            remedy = f"bring it back from a copy, or delete {run.root} to start anew"
            raise UsageError(run.document, "is gone", remedy)
        if any(name not in ("data", "lock") and not name.startswith(".") for name in names):
            raise UsageError(run.root, "is a folder with other things in it", "name a new folder as --output")
    ended = document is not None and run.reached(training.iterations, training.patience)
    # desra gc deletes the images of older runs: a run that goes on without its images freezes them again.
    begun = ended or (document is not None and run.data.is_dir())
    if begun:
        return FinetunePlan(run, gan_model, training, target.mask_key, [], begun, ended, None)
    pools, samples = found or find_samples()
    warning = pools.lacking() if samples else None
    return FinetunePlan(run, gan_model, training, target.mask_key, samples, begun, ended, warning)


def most_samples(training: Training) -> int:
    """Return how many images are looked at: more than are asked for, because some may turn out to be unusable."""
    return 2 * training.images + _TRIES


def check_networks(gan_model: Path, training: Training) -> int:
    """Load the networks of a finetune and return the parent's scale (raises `UsageError`, before anything starts)."""
    from desra_core.networks.checkpoints import load_model
    from desra_core.training.networks import PerceptualLoss, load_discriminator, load_generator

    if training.gan_weight:
        load_discriminator(training.discriminator, training.discriminator_features)
    if training.perceptual != "off":
        PerceptualLoss(training.perceptual)
    scale = load_generator(gan_model).scale
    load_model(gan_model)  # tries it out
    return scale


def begin(plan: FinetunePlan, scale: int) -> tuple[int, list[ImageError]]:
    """Freeze the images of a run and write its document.

    Images that cannot be used are left out, and the next ones are taken in their place.

    Returns:
        The number of images, and why others were left out.

    Raises:
        UsageError: None of the first 20 images can be used, as with a model of another scale (with the reason of the
            first image); or the run was begun on other images.
        TransientError: The disk is full or failed.
    """
    shutil.rmtree(plan.run.data, ignore_errors=True)
    used: list[Sample] = []
    errors: list[ImageError] = []
    for sample in plan.samples:
        if len(used) == plan.training.images or (not used and len(errors) == _TRIES):
            break
        try:
            arrays = read_sample(sample, scale)
        except ImageError as error:
            errors.append(error)
            continue
        freeze(plan.run.data / f"{len(used):04d}", arrays)
        used.append(sample)
    if not used:
        raise UsageError(*errors[0].failure)
    seal_frozen(plan.run.data)
    before, data = read_json(plan.run.document), _data_key(plan.made_under, used)
    if before is not None and before.get("data") != data:
        shutil.rmtree(plan.run.data, ignore_errors=True)
        reason = "has lost its training images, and the workspace has others by now"
        raise UsageError(plan.run.root, reason, "name another --output")
    document = _identity(plan.gan_model, plan.training) | {
        "made_under": plan.made_under,
        "images": [
            {"name": sample.name, "id": sample.id, "severity": sample.severity,
             "mask_by": "person" if sample.human else "detector"}
            for sample in used
        ],
        "data": data,
        "versions": versions(_PACKAGES),
    }  # fmt: skip
    if before and "precision" in before:
        document["precision"] = before["precision"]
    write_json(plan.run.document, document, durable=True)
    return len(used), errors


def usual_precision(device: str) -> str:
    """Choose the number format of a finetune for ``--amp auto``."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def settle_precision(run: RunFolder, training: Training, device: str) -> str:
    """Look up the number format of a run, or record it when the run begins: it stays the same on every machine.

    Returns ``float32``, ``bfloat16`` or ``float16``. Raises `TransientError`.
    """
    document = read_json(run.document)
    if document and "precision" in document:
        return str(document["precision"])
    precision = usual_precision(device) if training.amp == "auto" else training.amp
    if document is not None:
        write_json(run.document, document | {"precision": precision}, durable=True)
    return precision


def _identity(gan_model: Path, training: Training) -> dict[str, Any]:
    """Describe the models and settings that a run may not change, for its document."""
    vgg19 = None if training.perceptual in ("vgg19", "off") else Path(training.perceptual)
    models = {"parent": gan_model, "discriminator": training.discriminator, "perceptual": vgg19}
    found = {role: {"path": str(path), "key": content_key(path)} if path else None for role, path in models.items()}
    return found | {"training": training.model_dump(mode="json"), "seed": training.seed}


def check_same(
    run: RunFolder, document: dict[str, Any], identity: dict[str, Any], may_differ: Container[str] = _MAY_DIFFER
) -> None:
    """Check that a folder holds the training that is asked for.

    Args:
        run: The folder.
        document: What its ``run.json`` says.
        identity: What is asked for: checkpoints by role, and settings as ``training``.
        may_differ: Settings that may change when a run goes on.

    Raises:
        UsageError: A checkpoint or another setting differs.
    """
    remedy = f"give the same again, name another --output, or delete {run.root}"
    for role in ("parent", "discriminator", "perceptual"):
        before, now = document.get(role) or {}, identity.get(role) or {}
        if before.get("key") != now.get("key"):
            raise UsageError(run.root, f"holds a training with another {role}, {before.get('path', 'none')}", remedy)
    recorded = document.get("training", {})
    if "precision" in document:  # with --amp auto, a run goes on in any format that is recorded
        recorded = recorded | {"amp": "auto" if identity["training"]["amp"] == "auto" else document["precision"]}
    for name, value in identity["training"].items():
        before = recorded.get(name)
        if name not in may_differ and value is not None and before != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(run.root, f"holds a training with {flag} {before}, not {value}", remedy)


def _data_key(made_under: str, samples: Iterable[Sample]) -> str:
    return fingerprint(made_under, [[sample.id, sample.human] if sample.human else sample.id for sample in samples])
