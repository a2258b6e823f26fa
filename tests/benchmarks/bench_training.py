"""How many steps a finetune makes in a second, against the plain loop of the usual training tools, and its loader.

The plain loop is BasicSR's for ESRGAN: tensors in NCHW, one loss read after the other, a loop over the parameters for
the average. Both draw the same patches and make the same steps: L1 and GAN loss, no perceptual loss.
Run it with ``python tests/benchmarks/run.py training``.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from bench_inference import models
from markdown import print_table
from pairs import photo_files

from desra_core.settings.models import Training
from desra_core.training import networks
from desra_core.training.loop import BETAS, Trainer, batches
from desra_core.training.patches import Batch, draw_batch, freeze, open_frozen
from desra_core.training.plan import RunFolder

IMAGES = 8
SIDE = 640  # of the pseudo-GT, px
STEPS = 4
ROUNDS = 3
Step = Callable[[list[torch.Tensor]], object]


def run() -> None:
    gan_model, threads = models()[1], torch.get_num_threads()
    training = Training(**Training.cpu_preset | {"iterations": 1000, "seed": 0})
    seconds = measured(gan_model, training, "cpu")
    print(f"{gan_model.name}, {training.batch} patches of {training.patch} px, {threads} threads; best of {ROUNDS}.\n")
    plain = seconds["plain loop"]
    rows = [[what, 1 / each, plain / each, seconds["desra"] / each] for what, each in seconds.items()]
    print_table(["", "per second", "x plain loop", "x desra's steps"], rows)


def measured(gan_model: Path, training: Training, device: str) -> dict[str, float]:
    """Seconds of a step of the plain loop, of one of desra, and of drawing a batch (``loader``): the best of some."""
    with tempfile.TemporaryDirectory(prefix="desra-bench-") as name:
        folder = RunFolder(Path(name))
        _freeze_photos(folder.data)
        trainer = Trainer(folder, gan_model, training, device, torch.get_num_threads())
        pairs, scale = open_frozen(folder.data), trainer.generator.scale
        plain = plain_loop(gan_model, training, device)
        seconds = dict.fromkeys(["loader", "plain loop", "desra"], float("inf"))

        def draw(purpose: int, step: int) -> Batch:
            return draw_batch(pairs, training, scale, (0, purpose, step))

        def of_desra() -> None:
            for step in range(STEPS):
                trainer.step(batch(0, step))

        def of_plain_loop() -> None:
            for step in range(STEPS):
                plain([torch.from_numpy(array).to(device) for array in draw(0, step)])

        def of_loader() -> None:
            for step in range(STEPS):
                draw(0, step)

        with batches(draw, device, ahead=device != "cpu") as batch:
            for number in range(ROUNDS + 1):  # the first one warms up
                for what, go in zip(seconds, (of_loader, of_plain_loop, of_desra), strict=True):
                    started = time.perf_counter()
                    go()
                    if number:
                        seconds[what] = min(seconds[what], (time.perf_counter() - started) / STEPS)
    return seconds


def _freeze_photos(folder: Path) -> None:
    """Photos as pseudo-GT, a quarter of each masked."""
    files = photo_files()
    for index in range(IMAGES):
        pseudo_gt = cv2.resize(cv2.imread(str(files[index % len(files)])), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[: SIDE // 2, : SIDE // 2] = True
        lr = cv2.resize(pseudo_gt, (SIDE // 4, SIDE // 4), interpolation=cv2.INTER_AREA)
        freeze(folder / f"{index:04d}", (lr, pseudo_gt, mask))


def plain_loop(gan_model: Path, training: Training, device: str) -> Step:
    """The step of BasicSR's ``ESRGANModel``, by its own order of things, with this project's losses."""
    network = networks.load_generator(gan_model).network.to(device)
    average = copy.deepcopy(network)
    discriminator = networks.load_discriminator(None, training.discriminator_features).train().to(device)
    generator_moves, discriminator_moves = (
        torch.optim.Adam(part.parameters(), training.learning_rate, BETAS) for part in (network, discriminator)
    )

    def step(batch: list[torch.Tensor]) -> dict[str, float]:
        lr, pseudo_gt, mask = batch
        for parameter in discriminator.parameters():
            parameter.requires_grad = False
        generator_moves.zero_grad()
        sr = network(lr)
        pixel = networks.pixel_loss(sr, pseudo_gt, mask, training)
        gan = training.gan_weight * networks.gan_loss(discriminator(sr), real=True)
        (training.pixel_weight * pixel + gan).backward()
        generator_moves.step()
        for parameter in discriminator.parameters():
            parameter.requires_grad = True
        discriminator_moves.zero_grad()
        logits = discriminator(pseudo_gt)
        real = networks.gan_loss(logits, real=True)
        real.backward()
        logits_of_fake = discriminator(sr.detach())
        fake = networks.gan_loss(logits_of_fake, real=False)
        fake.backward()
        discriminator_moves.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.mul_(training.ema).add_(parameter, alpha=1 - training.ema)
        return {name: loss.item() for name, loss in (("pixel", pixel), ("gan", gan), ("real", real), ("fake", fake))}

    return step
