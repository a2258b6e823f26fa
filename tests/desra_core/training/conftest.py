"""Small photos with artifacts, and finetunes of a small model that take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from desra_core.settings.models import Training
from desra_core.third_party import mend_torchvision
from desra_core.training.patches import freeze
from desra_core.training.plan import RunFolder
from tests.conftest import MODELS


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Use one thread, because the patches are small, and restore the number that a finetune has changed."""


@pytest.fixture(scope="session")
def gan_model() -> Path:
    """The small GAN model: SRVGGNetCompact, x4."""
    return MODELS / "gan.pth"


@pytest.fixture(scope="session")
def demo_discriminator() -> Path:
    return MODELS / "discriminator.pth"


@pytest.fixture(scope="session")
def prepared() -> Callable[[Path], RunFolder]:
    """Make the folder of a run with two frozen images."""

    def make(folder: Path) -> RunFolder:
        run = RunFolder(folder)
        for index in range(2):
            rng = np.random.default_rng(index)
            noise = rng.integers(0, 256, (160, 128, 3)).astype(np.float32)
            pseudo_gt = np.clip(128 + 5 * (cv2.GaussianBlur(noise, (0, 0), 4) - 128), 0, 255).astype(np.uint8)
            mask = np.zeros((160, 128), bool)
            mask[20:60, 30 + 20 * index : 90] = True
            lr = cv2.resize(pseudo_gt, (32, 40), interpolation=cv2.INTER_AREA)
            freeze(run.data / f"{index:04d}", (lr, pseudo_gt, mask))
        return run

    return make


@pytest.fixture(scope="session")
def training() -> Callable[..., Training]:
    """Settings of a finetune that takes a second."""

    def make(**changes: Any) -> Training:
        quick = {"patch": 32, "batch": 2, "iterations": 6, "checkpoint_every": 3, "perceptual": "off",
                 "discriminator_features": 4, "warmup": 3, "gan_weight": 0.1, "seed": 1}  # fmt: skip
        return Training(**(quick | changes))

    return make


@pytest.fixture(scope="session")
def vgg19() -> dict[str, torch.Tensor]:
    """Weights of VGG19 without its classifier: random, with biases, so that many features are negative."""
    mend_torchvision()
    import torchvision

    with torch.device("meta"):
        shapes = torchvision.models.vgg19(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, like in shapes.items():
        values = torch.empty(like.shape).normal_(generator=generator)
        weights[f"features.{name}"] = values * (0.1 if like.ndim == 1 else (2 / like[0].numel()) ** 0.5)
    return weights


@pytest.fixture(scope="session")
def vgg19_file(vgg19: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19-dcbb9e9d.pth"
    torch.save(vgg19, path)
    return path
