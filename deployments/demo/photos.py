"""Low-resolution photos for the demo: cut from the photos inside scikit-image's wheel and degraded like real photos.

None of them shows a training photo of the demo's models (``PHOTOS`` of docs/demo_models.py). A name begins with the
scene, so that ``--group-by`` can keep a scene together. Some photos are as clean as the training photos; others are
grainy, soft, ringing or strongly compressed, where GAN models invent texture. Nothing is downloaded.
"""

import io
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from desra_core.files import replace_file
from desra_core.images import codec

MODELS = Path(__file__).parent / "models"

_SEED = 2023


class Cutout(NamedTuple):
    """A photo to make: ``box`` (left, top, width, height) of the file ``source`` in ``skimage/data``.

    It is resized to ``width``, blurred (sigma of a Gaussian, in pixels), sharpened (share of an unsharp mask, which
    overshoots at edges as cameras do), grained (noise in grey levels), and saved as a JPEG of ``quality`` or as a PNG.
    """

    name: str
    source: str
    box: tuple[int, int, int, int]
    width: int
    blur: float = 0.0
    sharpen: float = 0.0
    noise: float = 0.0
    quality: int | None = None


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


def make_photos(folder: Path) -> None:
    """Write the photos into a folder, which is made if need be; leave files that exist as they are.

    The same versions of NumPy, OpenCV and Pillow make the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, photo in enumerate(PHOTOS):
        path = folder / photo.name
        if path.exists():
            continue
        file = resources.files("skimage") / "data" / photo.source
        left, top, width, height = photo.box
        part = codec.decode(file.read_bytes(), Path(str(file))).pixels[top : top + height, left : left + width]
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
