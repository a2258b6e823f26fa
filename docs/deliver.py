"""Make the picture of how-to/deliver.md from one of the pairs in ``../shared/data/pairs``: python -m docs.deliver."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"
NAME, TOP, LEFT, SIDE = "frog.png", 20, 20, 240


def main() -> None:
    """Detect and deliver, and put the same part of GAN result, picture and trust map side by side."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        given = [f"--{role.replace('_', '-')}={PAIRS / role / NAME}" for role in ("mse_sr", "gan_sr")]
        desra = [sys.executable, "-m", "deployments.cli"]
        detect = [*desra, "detect", *given, "--labels", PAIRS / "labels", "--workspace", place / "ws"]
        deliver = [*desra, "deliver", "--workspace", place / "ws", "--output", place / "out", "--trust-map"]
        for command in (detect, deliver):
            subprocess.run(command, check=True)
        parts = []
        for path in (PAIRS / "gan_sr" / NAME, place / "out" / NAME, place / "out/trust_maps" / NAME):
            picture = cv2.imread(str(path))
            assert picture is not None
            parts.append(picture[TOP : TOP + SIDE, LEFT : LEFT + SIDE])
        target = Path(__file__).parent / "how-to" / "deliver.webp"
        assert cv2.imwrite(str(target), np.hstack(parts), [cv2.IMWRITE_WEBP_QUALITY, 90])


if __name__ == "__main__":
    main()
