"""The first five minutes, ``make demo``: photos and two small models in, artifacts, pictures and a better model out."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import typer
from PIL import Image, ImageDraw, ImageFont

from deployments.commands.flags import paths_at_home
from deployments.commands.models import GATE_FAILED
from deployments.demo.photos import MODELS, make_photos
from desra_core.errors import DesraError, printable
from desra_core.files import replace_file
from desra_core.images import codec
from desra_core.images.parts import rgb8
from desra_core.planning.plan import REGIONS
from desra_core.report.workspace_page import choose
from desra_core.workspace import Workspace, read_table

# A short form of the finetune of docs/delete, which takes 600 iterations. Nothing is promoted, so that the demo shows
# the same when it runs again.
RECIPE = ("--preset", "cpu", "--iterations", "150", "--checkpoint-every", "50", "--ema", "0.98", "--mask-share", "0.3",
          "--keep-weight", "1", "--group-by", "^[a-z]+", "--no-promote")  # fmt: skip
# The size of a crop in the picture, in pixels of the SR results; multiples of SCALE, so that the LR crop fits it.
CELL_WIDTH, CELL_HEIGHT = 272, 224
SCALE = 4

_WORST = 3
_MARGIN, _CAPTION = 8, 22
_GREEN = np.array((0, 255, 128))
_PAPER, _INK = (255, 255, 255), (30, 30, 30)

Pixels = npt.NDArray[np.uint8]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the photos, the workspace and the picture.")] = Path("demo"),
) -> None:
    """Make sample photos from bundled ones, mine artifacts with the demo's model pair, and finetune them away."""
    photos, workspace = output / "photos", Workspace(output / "workspace")
    try:
        make_photos(photos)
    except (OSError, DesraError) as error:
        reason = f"{error.filename or output}: {error.strerror}" if isinstance(error, OSError) else printable(error)
        typer.echo(f"error: {reason}; name another --output folder", err=True)
        raise typer.Exit(2) from None
    code = _cycle(photos, workspace.root)
    if code not in (0, GATE_FAILED):
        raise typer.Exit(code)
    picture = "none, since there are no artifacts"
    if worst := choose(read_table(workspace.regions, REGIONS), _WORST, per_image=1):
        replace_file(output / "demo.png", codec.encode_png(draw(worst, workspace)))
        picture = f"{output / 'demo.png'}: {len(worst)} of the worst regions: LR, GAN-SR, mask, pseudo-GT"
    typer.echo(f"picture  {picture}\nphotos   {photos}")
    desra = os.path.relpath(Path(sys.executable).with_name("desra"))
    typer.echo(f"status   {desra} status --workspace {workspace.root}")


def draw(regions: Sequence[dict[str, Any]], workspace: Workspace) -> Pixels:
    """Draw a row of crops at one scale for each region: LR, GAN-SR, the mask over GAN-SR, and pseudo-GT.

    Args:
        regions: Rows of the region table, of images in the dataset.
        workspace: A mining workspace.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    row_height = _CAPTION + CELL_HEIGHT + _MARGIN
    size = (4 * CELL_WIDTH + 5 * _MARGIN, len(regions) * row_height + _MARGIN)
    picture = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for row, region in enumerate(regions):
        captions = (f"{region['image']}: LR, x{SCALE}", "GAN-SR", f"mask: {region['area']:,} px", "pseudo-GT")
        for column, (caption, cell) in enumerate(zip(captions, _cells(region, workspace), strict=True)):
            corner = (_MARGIN + column * (CELL_WIDTH + _MARGIN), _MARGIN // 2 + row * row_height)
            pen.text(corner, caption, fill=_INK, font=font)
            picture.paste(Image.fromarray(cell), (corner[0], corner[1] + _CAPTION))
    return np.asarray(picture)


def _cells(region: dict[str, Any], workspace: Workspace) -> tuple[Pixels, Pixels, Pixels, Pixels]:
    """Cut out the four crops of a row, each ``(CELL_HEIGHT, CELL_WIDTH, 3)``."""
    lr, gan_sr, mask, pseudo_gt = (
        rgb8(codec.decode((path := workspace.dataset(kind, region["image"])).read_bytes(), path).pixels)
        for kind in ("lr", "gan_sr", "mask", "pseudo_gt")
    )
    marked = mask[:, :, 0] > 0
    inner = cv2.erode(marked.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    tint = np.where(inner, 0.25, 1.0)[..., None] * marked[..., None]  # full at the rim, faint inside
    overlay = np.asarray(np.rint(gan_sr * (1 - tint) + _GREEN * tint), np.uint8)
    lr = lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    left = _start(region["x"] + region["width"] // 2, CELL_WIDTH, marked.shape[1])
    top = _start(region["y"] + region["height"] // 2, CELL_HEIGHT, marked.shape[0])
    crop = (slice(top, top + CELL_HEIGHT), slice(left, left + CELL_WIDTH))
    return lr[crop], gan_sr[crop], overlay[crop], pseudo_gt[crop]


def _start(centre: int, extent: int, available: int) -> int:
    """Return where a crop of ``extent`` about ``centre`` begins: inside the image and on an LR pixel."""
    return max(0, min(centre - extent // 2, available - extent)) // SCALE * SCALE


def _cycle(photos: Path, workspace: Path) -> int:
    """Run ``desra cycle`` as a user would and return its exit code."""
    command = [sys.executable, "-m", "deployments.cli", "cycle", str(photos), "--workspace", str(workspace), *RECIPE]
    for kind in ("mse", "gan"):
        command += [f"--{kind}-model", str(MODELS / f"{kind}.pth")]
    with subprocess.Popen([*command, "--discriminator", str(MODELS / "discriminator.pth")]) as cycling:
        while True:
            try:
                return cycling.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reached the run too, which ends by itself and prints how it went


if __name__ == "__main__":
    typer.run(paths_at_home(main))
