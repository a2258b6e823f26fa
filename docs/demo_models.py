"""Train the demo's pair of x4 models on photos inside scikit-image's wheel: no download, no GPU, ten minutes.

Both nets are Real-ESRGAN's compact one, half as wide and a quarter as deep; the GAN model starts from the MSE model.
The degradations are mild: to a harsher photo the GAN model does what its big relatives do, it invents.

The GAN model swings between hardly an artifact and grids everywhere as it trains. Of the steps 800 to 2000, 1100 was
picked for having artifacts, but not everywhere, on 9 of the demo's 12 photos and 21 of 29 real ones. Other settings,
seeds, versions of torch or kinds of CPU give other models: count before you replace ``deployments/demo/models``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import nn
from torch.nn import functional

from desra_core.images import codec
from desra_core.third_party import mend_basicsr

mend_basicsr()

from basicsr.archs.discriminator_arch import UNetDiscriminatorSN  # noqa: E402
from basicsr.archs.srvgg_arch import SRVGGNetCompact  # noqa: E402
from basicsr.losses.gan_loss import GANLoss  # noqa: E402

SCALE = 4
# Crisp and full of texture. `deployments/demo/__main__.py` shows none of them: the demo's photos are unseen, like those
# of a user.
PHOTOS = ("astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "rocket.jpg")
# A photo made smaller is crisper and shows other textures.
SIZES = (1.0, 0.7, 0.5)

PATCH = 16  # LR pixels a side
MSE_BATCH, GAN_BATCH = 32, 8
MSE_RATE, GAN_RATE, DISCRIMINATOR_RATE = 1e-3, 2e-4, 1e-3
BETAS = (0.9, 0.99)
# Real-ESRGAN's are 1, 1 (perceptual) and 0.1. There is no VGG here; the steepness of the image stands in for it.
PIXEL_WEIGHT, GRADIENT_WEIGHT, GAN_WEIGHT = 0.5, 0.5, 0.1
# Of the GAN model's targets, as in Real-ESRGAN, though stronger: a net this small has to be pushed.
SHARPENING = 1.5
# Spectral norm leaves so little of a photo's contrast that, without this, the discriminator takes long to wake up.
CONTRAST = 50.0
LOG_EVERY = 100

Floats = npt.NDArray[np.float32]
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("deployments/demo/models"),
    mse_iterations: Annotated[int, typer.Option(min=0, help="Of the MSE model; 0 keeps OUTPUT/mse.pth.")] = 5000,
    gan_iterations: Annotated[int, typer.Option(min=1, help="Of the GAN model.")] = 1100,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 2023,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; another number gives other weights.")] = 1,
) -> None:
    """Train an MSE model and, from it, a GAN model with its discriminator, and save all three."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    photos = load_photos()
    if mse_iterations:
        mse = train_mse(photos, mse_iterations, seed)
        torch.save({"params": mse.state_dict()}, output / "mse.pth")
    else:
        mse = make_model()
        mse.load_state_dict(torch.load(output / "mse.pth", weights_only=True)["params"])
    gan, discriminator = train_gan(mse, photos, gan_iterations, seed)
    torch.save({"params": gan.state_dict()}, output / "gan.pth")
    torch.save({"params": discriminator.state_dict()}, output / "discriminator.pth")


def train_mse(photos: list[Floats], iterations: int, seed: int) -> nn.Module:
    """Train a model that gives the mean of all that an LR image may have been: faithful and soft."""
    torch.manual_seed(seed)
    batches = make_batches(photos, MSE_BATCH, np.random.default_rng([seed, 0]))
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), MSE_RATE, BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    started = time.monotonic()
    for iteration in range(1, iterations + 1):
        lr, hr = next(batches)
        loss = functional.mse_loss(model(lr), hr)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if iteration % LOG_EVERY == 0 or iteration == iterations:
            psnr, seconds = -10 * loss.log10().item(), time.monotonic() - started
            typer.echo(f"mse {iteration}/{iterations}: {psnr:.2f} dB, {seconds:.0f} s")
    return model


def train_gan(mse: nn.Module, photos: list[Floats], iterations: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """Train a copy of the MSE model until its results look like photos to a discriminator; returns both."""
    torch.manual_seed(seed)
    batches = make_batches(photos, GAN_BATCH, np.random.default_rng([seed, 1]), sharpening=SHARPENING)
    model = make_model()
    model.load_state_dict(mse.state_dict())
    discriminator = UNetDiscriminatorSN(3, num_feat=12)
    discriminator.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    adversarial = GANLoss("vanilla")
    optimizer = torch.optim.Adam(model.parameters(), GAN_RATE, BETAS)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), DISCRIMINATOR_RATE, BETAS)

    def judged(image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = discriminator(CONTRAST * (image - 0.5))
        return logits

    started = time.monotonic()
    for iteration in range(1, iterations + 1):
        lr, hr = next(batches)

        sr = model(lr)
        discriminator.requires_grad_(False)
        pixel = functional.l1_loss(sr, hr)
        gradient = functional.l1_loss(steepness(sr), steepness(hr))
        fooled = adversarial(judged(sr), True)
        loss = PIXEL_WEIGHT * pixel + GRADIENT_WEIGHT * gradient + GAN_WEIGHT * fooled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        discriminator.requires_grad_(True)
        loss_d = adversarial(judged(hr), True, is_disc=True) + adversarial(judged(sr.detach()), False, is_disc=True)
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        if iteration % LOG_EVERY == 0 or iteration == iterations:
            losses = f"pixel {pixel.item():.3f}, gradient {gradient.item():.3f}, gan {fooled.item():.3f}"
            seconds = time.monotonic() - started
            typer.echo(f"gan {iteration}/{iterations}: {losses}, discriminator {loss_d.item():.3f}, {seconds:.0f} s")
    return model, with_contrast(discriminator)


def with_contrast(discriminator: nn.Module) -> nn.Module:
    """Let the first convolution do what `CONTRAST` did, so that the discriminator takes images as they are.

    The same but for a border of one pixel: there, padding is black, not gray.
    """
    first = discriminator.conv0
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    with torch.no_grad():
        first.weight.mul_(CONTRAST)
        first.bias.sub_(0.5 * first.weight.sum(dim=(1, 2, 3)))
    return discriminator


def make_model() -> nn.Module:
    """Build the net of both models, with 89,000 weights."""
    model: nn.Module = SRVGGNetCompact(num_feat=32, num_conv=8, upscale=SCALE, act_type="prelu")
    return model


def steepness(image: torch.Tensor) -> torch.Tensor:
    """Length of the gradient of an image ``(N, C, H, W)``: how much texture there is, not where exactly."""
    across = image[..., 1:, 1:] - image[..., 1:, :-1]
    down = image[..., 1:, 1:] - image[..., :-1, 1:]
    return (across * across + down * down + 1e-6).sqrt()  # the root of 0 has no derivative


def load_photos() -> list[Floats]:
    """Read the photos in all sizes, each ``(H, W, 3)``, 0..1."""
    photos: list[Floats] = []
    for name in PHOTOS:
        file = resources.files("skimage") / "data" / name
        pixels = codec.decode(file.read_bytes(), Path(name)).pixels.astype(np.float32) / 255
        colours = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        shrunk = (cv2.resize(colours, None, fx=size, fy=size, interpolation=cv2.INTER_AREA) for size in SIZES)
        photos.extend(np.asarray(photo, np.float32) for photo in shrunk)
    return photos


def make_batches(photos: list[Floats], size: int, rng: np.random.Generator, *, sharpening: float = 0.0) -> Batches:
    """Draw patches for ever: LR ``(N, 3, PATCH, PATCH)`` and HR of SCALE times the side, 0..1."""
    areas = np.array([photo.shape[0] * photo.shape[1] for photo in photos])
    while True:
        hr = [patch(photos[index], rng) for index in rng.choice(len(photos), size, p=areas / areas.sum())]
        lr = [degraded(image, rng) for image in hr]
        yield tensor(lr), tensor([sharpened(image, sharpening) for image in hr])


def patch(photo: Floats, rng: np.random.Generator) -> Floats:
    """Cut out a square, turned, mirrored and with its channels exchanged at random."""
    side = PATCH * SCALE
    top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
    hr = np.rot90(photo[top : top + side, left : left + side], int(rng.integers(4)))
    hr = hr[:, ::-1] if rng.random() < 0.5 else hr
    return np.ascontiguousarray(hr[:, :, rng.permutation(3)])


def degraded(hr: Floats, rng: np.random.Generator) -> Floats:
    """Shrink a patch as a decent camera would: slight blur, bicubic, some grain, often a JPEG of fair quality."""
    blurred = np.asarray(cv2.GaussianBlur(hr, (0, 0), rng.uniform(0.2, 3.0)), np.float32)
    small = functional.interpolate(tensor([blurred]), scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    lr = small[0].numpy().transpose(1, 2, 0)
    lr = lr + rng.normal(0, rng.uniform(0, 8) / 255, lr.shape)
    lr8 = np.clip(np.rint(lr * 255), 0, 255).astype(np.uint8)
    if rng.random() < 0.6:
        _, data = cv2.imencode(".jpg", lr8, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 96))])
        lr8 = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    return np.asarray(lr8 / 255, np.float32)


def sharpened(hr: Floats, amount: float) -> Floats:
    """Apply an unsharp mask."""
    return np.asarray(np.clip(hr + amount * (hr - cv2.GaussianBlur(hr, (0, 0), 1.5)), 0, 1), np.float32)


def tensor(images: list[Floats]) -> torch.Tensor:
    """Stack images ``(H, W, C)`` to ``(N, C, H, W)``."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


if __name__ == "__main__":
    typer.run(main)
