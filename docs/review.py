"""Make the picture of how-to/review.md from pairs in ``../shared/data/pairs``, in Chromium: python -m docs.review."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from desra_core.workspace.answers import open_answers

ROOT = Path(__file__).parents[1]
PAIRS = ROOT.parents[1] / "shared" / "data" / "pairs"


def main() -> None:
    """Detect, open the page of the review, draw a stroke and take a picture of it."""
    sys.path.append(str(ROOT / "tests"))
    from browser import opened

    from deployments.serving.review import review_server
    from desra_core.annotations.review import Review
    from desra_core.workspace import Workspace

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        roles = [f"--{role.replace('_', '-')}={PAIRS / role}" for role in ("mse_sr", "gan_sr", "lr", "labels")]
        detect = [
            sys.executable,
            "-m",
            "deployments.cli",
            "detect",
            *roles,
            "--workspace",
            place / "ws",
            "--keep",
            "maps",
        ]
        subprocess.run(detect, check=True)
        workspace = Workspace(place / "ws")
        with (
            open_answers(workspace, "ann") as file,
            review_server(Review(workspace, file, "ann"), 0, None) as address,
            opened("about:blank", place / "browser") as page,
        ):
            page.visit(address, width=1280, height=800)
            page.wait_until("document.body.dataset.ready && !busy")
            page.press("b")
            page.drag((430, 250), (470, 240), (520, 260))
            page.wait_until("now.state === 1 && !stroke && !busy")
            page.evaluate("drawAll()")
            page.wait_until("!asked && [...tiles.values()].every(tile => tile.bitmap || tile.error)")
            picture = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert cv2.imwrite(str(Path(__file__).parent / "how-to" / "review.webp"), picture, [cv2.IMWRITE_WEBP_QUALITY, 85])


if __name__ == "__main__":
    main()
