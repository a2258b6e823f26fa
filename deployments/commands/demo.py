"""``desra demo``, the first five minutes: from photos and a published GAN model to artifacts and a better model."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import typer
from PIL import Image, ImageDraw, ImageFont

from desra_core.errors import DesraError, printable
from desra_core.files import replace_file
from desra_core.images import codec
from desra_core.planning.plan import REGIONS
from desra_core.workspace import Workspace, read_table

GAN_MODEL = Path(__file__).parents[1] / "demo" / "models" / "realesr-general-x4v3.safetensors"
TWIN = GAN_MODEL.with_name("realesr-general-x4v3-twin.safetensors")
# The files of skimage/data that the twin was trained on (docs/demo_models.py).
TRAINED_ON = ("astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "rocket.jpg")
# A short finetune. Nothing is promoted, so that a second demo shows the same. The photos are small, and so are regions.
RECIPE = ("--preset", "cpu", "--iterations", "100", "--checkpoint-every", "50", "--warmup", "60", "--min-area", "2000",
          "--group-by", "^[a-z]+", "--no-promote")  # fmt: skip

_SEED = 2023
_WORST = 3
# Side of a picture, in pixels of the SR results, and of the part of a region that `Crops` shows with context so large.
_CELL, _PART = 252, 180
_MARGIN, _CAPTION = 8, 22
_PAPER, _INK = (255, 255, 255), (30, 30, 30)

Pixels = npt.NDArray[np.uint8]


class Cutout(NamedTuple):
    """A photo to make: a part of another photo, which is resized, blurred, sharpened and given noise, in this order."""

    name: str
    source: str  # a file in skimage/data
    box: tuple[int, int, int, int]  # left, top, width, height of the part
    width: int  # after resizing
    blur: float = 0.0  # sigma of a Gaussian, in pixels
    sharpen: float = 0.0  # share of an unsharp mask, which overshoots at edges as cameras do
    noise: float = 0.0  # in grey levels
    quality: int | None = None  # of the JPEG; None for a PNG


# None of them shows a photo of `TRAINED_ON`. A name begins with the scene, so that `--group-by` can keep a scene
# together. Some photos are clean; others are grainy, soft, ringing or strongly compressed, where GAN models invent
# texture.
PHOTOS = (
    Cutout("cat.jpg", "chelsea.png", (60, 0, 330, 300), 165, quality=92),
    Cutout("cat_eye.jpg", "chelsea.png", (100, 40, 160, 120), 160, quality=40),
    Cutout("cat_fur.jpg", "chelsea.png", (250, 120, 200, 170), 200, noise=3.0, quality=60),
    Cutout("coins.jpg", "coins.png", (0, 0, 384, 303), 192, quality=35),
    Cutout("coins_tray.jpg", "coins.png", (150, 100, 200, 160), 200, quality=45),
    Cutout("hubble.jpg", "hubble_deep_field.jpg", (400, 300, 400, 320), 200, quality=60),
    Cutout("moon.jpg", "moon.png", (0, 0, 512, 400), 200, quality=50),
    Cutout("moon_rim.png", "moon.png", (180, 150, 200, 160), 160),
    Cutout("motorcycle.jpg", "motorcycle_right.png", (0, 0, 741, 500), 240, quality=90),
    Cutout("motorcycle_engine.png", "motorcycle_left.png", (300, 170, 240, 200), 200),
    Cutout("motorcycle_shelf.jpg", "motorcycle_left.png", (420, 0, 300, 200), 240, blur=0.8, sharpen=1.5, quality=40),
    Cutout("motorcycle_wheel.png", "motorcycle_right.png", (0, 250, 240, 200), 200),
    Cutout("page.jpg", "page.png", (0, 0, 384, 191), 230, quality=30),
    Cutout("page_line.jpg", "page.png", (150, 60, 200, 120), 220, quality=40),
    Cutout("retina.jpg", "retina.jpg", (200, 300, 900, 900), 200, noise=4.0, quality=60),
    Cutout("slide.png", "cell.png", (250, 200, 300, 240), 200),
    Cutout("text.jpg", "text.png", (0, 0, 448, 172), 270, quality=35),
    Cutout("tissue.jpg", "ihc.png", (230, 180, 280, 230), 240, noise=3.0, quality=50),
    Cutout("tissue_edge.jpg", "ihc.png", (0, 0, 250, 200), 230, quality=35),
)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the photos, the workspace and the picture.")] = Path("demo"),
    prepare: Annotated[bool, typer.Option("--prepare", help="Only write the photos and the models there.")] = False,
) -> None:
    """Make sample photos, mine the artifacts of a published model in them, and finetune them away.

    Photos and models are inside the packages. Promotes nothing. Ends with 0 also where the gate does not pass.
    """
    from deployments.commands.models import GATE_FAILED
    from desra_core.report.workspace_page import choose

    photos, workspace = output / "photos", Workspace(output / "workspace")
    models = output / "models"
    try:
        make_photos(photos)
        if prepare:
            models.mkdir(exist_ok=True)
            for model in (GAN_MODEL, TWIN, TWIN.with_suffix(".json")):
                replace_file(models / model.name, model.read_bytes())
    except (OSError, DesraError) as error:
        reason = f"{error.filename or output}: {error.strerror}" if isinstance(error, OSError) else printable(error)
        typer.echo(f"error: {reason}; name another --output folder", err=True)
        raise typer.Exit(2) from None
    if prepare:
        typer.echo(f"photos   {photos}\nmodels   {models}")
        return
    code = _cycle(photos, workspace.root)
    if code not in (0, GATE_FAILED):
        raise typer.Exit(code)
    picture = "none, since there are no artifacts"
    if worst := choose(read_table(workspace.regions, REGIONS), _WORST, per_image=1):
        replace_file(output / "demo.png", codec.encode_png(draw(worst, workspace)))
        picture = f"{output / 'demo.png'}: {len(worst)} of the worst regions: LR, GAN-SR, mask, pseudo-GT"
    typer.echo(f"picture  {picture}\nphotos   {photos}")
    desra = "desra" if shutil.which("desra") else os.path.relpath(Path(sys.executable).with_name("desra"))
    typer.echo(f"status   {desra} status --workspace {workspace.root}")


def make_photos(folder: Path) -> None:
    """Write the photos into a folder, which need not exist; leave existing files as they are.

    The photos are cut from those inside scikit-image's wheel and degraded like real photos. The same versions of NumPy,
    OpenCV and Pillow make the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, photo in enumerate(PHOTOS):
        path = folder / photo.name
        if path.exists():
            continue
        file = resources.files("skimage") / "data" / photo.source
        left, top, width, height = photo.box
        stored = codec.decode(file.read_bytes(), Path(str(file)), as_stored=True)  # as the twin was trained on them
        part = stored.pixels[top : top + height, left : left + width]
        size = photo.width, round(height * photo.width / width)
        kind = cv2.INTER_AREA if photo.width < width else cv2.INTER_LANCZOS4
        image = cv2.resize(part.astype(np.float32), size, interpolation=kind)  # (H, W) for a gray photo
        if photo.blur:
            image = cv2.GaussianBlur(image, (0, 0), photo.blur)
        if photo.sharpen:
            image = image + photo.sharpen * (image - cv2.GaussianBlur(image, (0, 0), 1.0))
        if photo.noise:
            rng = np.random.default_rng([_SEED, index])
            image = image + photo.noise * rng.standard_normal(image.shape, np.float32)
        pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        data = codec.encode_png(pixels)
        if photo.quality is not None:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=photo.quality)
            data = buffer.getvalue()
        replace_file(path, data)


def draw(regions: Sequence[dict[str, Any]], workspace: Workspace) -> Pixels:
    """Draw a row of crops at one scale for each region: LR, GAN-SR, the mask over GAN-SR, and pseudo-GT.

    Args:
        regions: Rows of the region table, of images in the dataset.
        workspace: A mining workspace.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    from desra_core.report.pictures import Crops
    from desra_core.report.results import read_results

    names, ids = ([region[key] for region in regions] for key in ("image", "id"))
    images = read_results(workspace).stored_images(names, ids)
    row_height = _CAPTION + _CELL + _MARGIN
    picture = Image.new("RGB", (4 * _CELL + 5 * _MARGIN, len(regions) * row_height + _MARGIN), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for row, region in enumerate(regions):
        # A part in the middle of the region, which is shown without scaling, as the region itself may be far larger.
        left, top = region["x"] + (region["width"] - _PART) // 2, region["y"] + (region["height"] - _PART) // 2
        crops = Crops(images[region["image"]], (left, top, _PART, _PART))
        captions = {
            "lr": f"{region['image']}: LR, x4",
            "gan_sr": "GAN-SR",
            "mask": f"mask: {region['area']:,} px",
            "pseudo_gt": "pseudo-GT",
        }
        for column, (kind, caption) in enumerate(captions.items()):
            corner = (_MARGIN + column * (_CELL + _MARGIN), _MARGIN // 2 + row * row_height)
            pen.text(corner, caption, fill=_INK, font=font)
            picture.paste(Image.fromarray(crops.make(kind)), (corner[0], corner[1] + _CAPTION))
    return np.asarray(picture)


def _cycle(photos: Path, workspace: Path) -> int:
    """Run ``desra cycle`` as a user would and return its exit code."""
    command = [sys.executable, "-m", "deployments.cli", "cycle", str(photos), "--workspace", str(workspace), *RECIPE]
    with subprocess.Popen([*command, "--gan-model", str(GAN_MODEL), "--mse-model", str(TWIN)]) as cycling:
        while True:
            try:
                return cycling.wait()
            except KeyboardInterrupt:
                continue  # the run got the Ctrl-C too; it ends by itself and prints how it went
