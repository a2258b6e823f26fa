"""Mining that sets a finetune going: with a real `desra serve`, to the end of both."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.served import FINAL, Served, until

TINY = {"preset": "cpu", "iterations": 2, "checkpoint-every": 1, "patch": 64, "batch": 2, "discriminator-features": 4,
        "warmup": 1, "images": 1, "group-by": "folder", "finetune-after": 2}  # fmt: skip


def finetunes(served: Served) -> list[dict[str, Any]]:
    query = {"flows": {"name": {"any_": ["finetune"]}}}
    return httpx.post(f"{served.url}/flow_runs/filter", json=query, timeout=30).json()


def mine(served: Served) -> dict[str, Any]:
    run_id = served.start("mine")
    return until(lambda: (run := served.run(run_id))["state"]["type"] in FINAL and run)


@pytest.mark.slow
def test_gathered_images_start_one_finetune(serve, make_photos, tmp_path) -> None:
    make_photos(tmp_path / "photos", 6)
    served = serve(**TINY)
    assert mine(served)["state"]["type"] == "COMPLETED"
    [finetune] = finetunes(served)
    done = until(lambda: (run := served.run(finetune["id"]))["state"]["type"] in FINAL and run)
    assert (done["state"]["type"], done["state"]["message"]) == ("COMPLETED", "2 iterations on 1 image")
    assert done["parameters"]["current_model"]
    assert len(list(served.workspace.root.glob("finetunes/*/models"))) == 1
    assert mine(served)["state"]["message"].startswith("nothing new: ")
    assert len(finetunes(served)) == 1
    served.stop()
