"""Make the models of the demo: a published GAN model in half precision, and its twin, trained by ``desra twin``.

The twin is trained on photos inside scikit-image's wheel, in a minute on two cores. Another kind of CPU gives other
weights: count what the demo marks before you commit the models, since this script writes over them.

    python docs/demo_models.py realesr-general-x4v3.pth FOLDER
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

from safetensors.torch import save_file

from deployments.commands.demo import GAN_MODEL, TRAINED_ON, TWIN
from desra_core.files import write_json
from desra_core.networks.checkpoints import read_weights


def main(published: Path, folder: Path) -> None:
    """Write both models and the JSON file of the twin over those of the demo."""
    sharp, trained = folder / "sharp", folder / "twin.pth"
    sharp.mkdir(parents=True, exist_ok=True)
    for name in TRAINED_ON:
        shutil.copyfile(str(resources.files("skimage") / "data" / name), sharp / name)
    _save_halved(published, GAN_MODEL)
    command = ["twin", str(sharp), "--gan-model", str(GAN_MODEL), "--output", str(trained), "--preset", "cpu"]
    subprocess.run([sys.executable, "-m", "deployments.cli", *command], check=True)
    _save_halved(trained, TWIN)
    document = json.loads(trained.with_suffix(".json").read_bytes())
    for photo in document["photos"]:
        photo["path"] = Path(photo["path"]).name
    document["training"]["photos"], document["parent"]["path"] = "skimage/data", GAN_MODEL.name
    write_json(TWIN.with_suffix(".json"), document)


def _save_halved(checkpoint: Path, target: Path) -> None:
    """Save the weights of a checkpoint in half precision."""
    save_file({name: weights.half().contiguous() for name, weights in read_weights(checkpoint).items()}, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
