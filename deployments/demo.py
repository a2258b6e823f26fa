"""The first five minutes, ``make demo``: sample pairs in, artifact masks out, one picture of the worst."""

from __future__ import annotations

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

from deployments.demo_pairs import SCALE, make_pairs
from desra_core import imageio
from desra_core.tables import worst_regions
from desra_core.workspace import Workspace

# Of one crop in the picture, in pixels of the SR results; multiples of SCALE, so that the LR crop fits it.
CELL_WIDTH, CELL_HEIGHT = 320, 256

_WORST = 3
_MARGIN, _CAPTION = 10, 22
_GREEN = np.array((0, 255, 128))
_PAPER, _INK = (255, 255, 255), (30, 30, 30)

Pixels = npt.NDArray[np.uint8]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pairs, the workspace and the picture.")] = Path("demo"),
) -> None:
    """Make sample pairs from bundled photos, detect their artifacts and draw the worst of them."""
    pairs, workspace = output / "pairs", Workspace(output / "workspace")
    try:
        make_pairs(pairs)
    except OSError as error:
        typer.echo(f"error: {error.filename or output}: {error.strerror}; name another --output folder", err=True)
        raise typer.Exit(2) from None
    code = _detect(pairs, workspace.root)
    if code != 0:
        raise typer.Exit(code)
    worst = worst_regions(workspace, _WORST).to_pylist()
    if worst:
        partial = output / "demo.partial"
        partial.write_bytes(imageio.encode_png(draw(worst, pairs, workspace.masks)))
        partial.replace(output / "demo.png")
    typer.echo(_where_to_look(output, worst))


def draw(regions: Sequence[dict[str, Any]], pairs: Path, masks: Path) -> Pixels:
    """Draw one row per region: LR, GAN result and the mask over it, one crop at one scale.

    Parameters
    ----------
    regions
        Rows of the region table.
    pairs, masks
        The folders of the images and of their masks.

    Returns
    -------
    ndarray
        ``(H, W, 3)`` uint8 RGB.
    """
    row_height = _CAPTION + CELL_HEIGHT + _MARGIN
    size = (3 * CELL_WIDTH + 4 * _MARGIN, len(regions) * row_height + _MARGIN)
    picture = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for row, region in enumerate(regions):
        captions = (f"{region['image']}: LR, x{SCALE}", "GAN result", f"mask: {region['area']:,} px in this region")
        for column, (caption, cell) in enumerate(zip(captions, _cells(region, pairs, masks), strict=True)):
            corner = (_MARGIN + column * (CELL_WIDTH + _MARGIN), _MARGIN // 2 + row * row_height)
            pen.text(corner, caption, fill=_INK, font=font)
            picture.paste(Image.fromarray(cell), (corner[0], corner[1] + _CAPTION))
    return np.asarray(picture)


def _cells(region: dict[str, Any], pairs: Path, masks: Path) -> tuple[Pixels, Pixels, Pixels]:
    """Cut out the three crops of one row, each ``(CELL_HEIGHT, CELL_WIDTH, 3)``."""
    file = f"{region['image']}.png"
    gan_sr, mask = _read(pairs / "gan_sr" / file), _read(masks / file)[:, :, 0] > 0
    lr = _read(pairs / "lr" / file).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    height, width = mask.shape
    left = _start(region["x"] + region["width"] // 2, CELL_WIDTH, width)
    top = _start(region["y"] + region["height"] // 2, CELL_HEIGHT, height)
    crop = (slice(top, top + CELL_HEIGHT), slice(left, left + CELL_WIDTH))
    return lr[crop], gan_sr[crop], _overlay(gan_sr, mask)[crop]


def _start(centre: int, extent: int, available: int) -> int:
    """Where a crop of ``extent`` about ``centre`` begins: inside the image and on an LR pixel."""
    return max(0, min(centre - extent // 2, available - extent)) // SCALE * SCALE


def _overlay(image: Pixels, mask: imageio.Mask) -> Pixels:
    """Tint and outline the masked pixels of an image ``(H, W, 3)``."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    tint = np.where(inner, 0.25, 1.0)[..., None] * mask[..., None]
    return np.asarray(np.rint(image * (1 - tint) + _GREEN * tint), np.uint8)


def _read(path: Path) -> Pixels:
    pixels = imageio.decode(path.read_bytes(), path).pixels
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)


def _detect(pairs: Path, workspace: Path) -> int:
    """Run ``desra detect`` as a user would and return its exit code."""
    command = [sys.executable, "-m", "deployments.cli", "detect"]
    for kind in ("mse_sr", "gan_sr", "lr"):
        command += [f"--{kind.replace('_', '-')}", str(pairs / kind)]
    with subprocess.Popen([*command, "--workspace", str(workspace)]) as detection:
        while True:
            try:
                return detection.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reached the detection too, which ends on its own and says how it went


def _where_to_look(output: Path, worst: Sequence[dict[str, Any]]) -> str:
    """Write the last lines of the demo, for a reader who has never seen the project."""
    desra = os.path.relpath(Path(sys.executable).with_name("desra"))
    picture = "none, since there are no artifacts"
    if worst:
        picture = f"{output / 'demo.png'}, the worst {len(worst)} regions: LR, GAN result, mask"
    return "\n".join(
        (
            f"picture  {picture}",
            f"pairs    {output / 'pairs'}",
            f"status   {desra} status --workspace {output / 'workspace'}",
        )
    )


if __name__ == "__main__":
    typer.run(main)
