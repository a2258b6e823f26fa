"""Which losses, patches and weights delete artifacts and keep detail? Tried on the training pool alone.

A quarter of its scenes are set apart to judge by; the held-out pool is never looked at. Needs a workspace that
``experiment.py`` mined. Writes ``RUNS/tuning.md``; a run that was done before is not repeated.

    python docs/delete/tuning.py WORKSPACE RUNS [VARIANT]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from desra_core.evaluation.table import as_markdown
from desra_core.files import write_json
from desra_core.gate.criteria import Score, score
from desra_core.gate.judge import detect, judge
from desra_core.images.codec import decode
from desra_core.networks import load_model, super_resolve
from desra_core.networks.checkpoints import read_kinds
from desra_core.planning.plan import load_settings
from desra_core.settings.models import Training
from desra_core.training.loop import finetune
from desra_core.training.patches import Sample, freeze, read_sample
from desra_core.training.plan import RunFolder
from desra_core.training.pools import Pools
from desra_core.workspace import Workspace
from desra_core.workspace.manifest import ImageRef

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "tests" / "models"
OWN = {"discriminator": MODELS / "discriminator.pth"}
L1 = {"gan_weight": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "L1, share 0.2": L1 | {"mask_share": 0.2, "iterations": 2000},
    "L1, share 0.2, keep 4": L1 | {"mask_share": 0.2, "keep_weight": 4, "iterations": 1500},
    "L1, share 0.2, keep 10": L1 | {"mask_share": 0.2, "keep_weight": 10, "iterations": 1000},
    "L1, share 0.2, keep 20": L1 | {"mask_share": 0.2, "keep_weight": 20, "iterations": 1000},
    "GAN 0.1, no mask in any patch": OWN | {"mask_share": 0},
    "GAN 0.1, new discriminator": {},
    "GAN 0.1": OWN,
    "GAN 0.1, at 5e-5": OWN | {"learning_rate": 5e-5},
    "GAN 0.1, keep 2": OWN | {"keep_weight": 2},
    "GAN 0.1, share 0.3, keep 1": OWN | {"mask_share": 0.3, "keep_weight": 1},
    "GAN 0.3": OWN | {"gan_weight": 0.3},
}


def main(root: Path, runs: Path, only: str | None = None) -> None:
    """Finetune every variant, or only one, and write the table."""
    workspace = Workspace(root.absolute())
    corpus, target = load_settings(workspace)
    with workspace.locked():
        images = Pools(workspace, corpus, target, "folder")
        marked, clean = images.with_artifacts("training"), images.clean("training", 1000)
    samples = [_sample(workspace, entry.image, entry.severity) for entry in marked if not _judges(entry.image)]
    judges = [image for image in (*(entry.image for entry in marked), *clean) if _judges(image)]
    rows = []
    for name, changes in VARIANTS.items() if only is None else [(only, VARIANTS[only])]:
        training = Training(**({"preset": "cpu", "iterations": 600, "checkpoint_every": 150} | changes))
        run = RunFolder(runs / name.replace(", ", "-").replace(" ", "_"))
        for saved in _finetuned(run, training, samples):
            rows += [_row(name, saved, kind, found) for kind, found in _scores(saved, judges).items()]
    text = as_markdown(rows)
    (runs / "tuning.md").write_text(f"{len(samples)} images to train on, {len(judges)} to judge by.\n\n{text}\n")


def _judges(image: ImageRef) -> bool:
    scene = image.names[0].split("/")[0]
    return hashlib.md5(scene.encode()).digest()[0] % 4 == 0  # noqa: S324


def _sample(workspace: Workspace, image: ImageRef, severity: float) -> Sample:
    lr, mask, pseudo_gt = (workspace.dataset(kind, image.names[0]) for kind in ("lr", "mask", "pseudo_gt"))
    return Sample(image.names[0], image.id, severity, lr, mask, (pseudo_gt,))


def _finetuned(run: RunFolder, training: Training, samples: list[Sample]) -> list[Path]:
    """The models of a run, which is done first unless it has been."""
    if not run.model(training.iterations).exists():
        for index, sample in enumerate(samples[: training.images]):
            freeze(run.data / f"{index:04d}", read_sample(sample, 4))
        write_json(run.document, training.model_dump(mode="json"))
        finetune(run, MODELS / "gan.pth", training, "cpu", threads=1)
    return run.models()


def _scores(saved: Path, judges: list[ImageRef]) -> dict[str, Score]:
    """Raw and EMA weights, judged once."""
    known = saved.with_suffix(".score.json")
    if known.exists():
        return {kind: Score(**document) for kind, document in json.loads(known.read_text()).items()}
    mse, old = load_model(MODELS / "mse.pth"), load_model(MODELS / "gan.pth")
    scores = {}
    for kind, weights in read_kinds(saved).items():
        path = saved.with_suffix(f".{kind}.tmp")
        torch.save({"params": weights}, path)
        new = load_model(path)
        judgements = []
        for image in judges:
            assert image.lr is not None
            lr = decode(image.lr.path.read_bytes(), image.lr.path).pixels
            mse_sr, *results = (super_resolve(model, lr).pixels for model in (mse, old, new))
            before, after = (detect(mse_sr, result) for result in results)
            judgements.append(judge(image.names[0], image.id, kind, before, after))
        path.unlink()
        scores[kind] = score(kind, judgements)
    known.write_text(json.dumps({kind: found.__dict__ for kind, found in scores.items()}))
    return scores


def _row(name: str, saved: Path, kind: str, found: Score) -> dict[str, str]:
    assert found.removal is not None
    assert found.detail_loss is not None
    assert found.psnr is not None
    return {
        "finetune": name,
        "iteration": str(int(saved.stem.rpartition("_")[2])),
        "weights": kind,
        "regions gone": f"{found.gone} of {found.regions}, {100 * found.removal:.0f} %",
        "images with added": f"{found.images_added} of {found.images}",
        "PSNR outside": f"{found.psnr:.1f} dB",
        "detail lost": f"{100 * found.detail_loss:.1f} %",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
