"""The view in the morning of a run that a clock has started: a real server, a real worker, a real browser.

All pictures are kept in the folder that DESRA_PICTURES names; `run` and `worst-regions` are in docs/how-to/nightly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from deployments.commands.demo import make_photos
from tests.browser import Page, opened
from tests.conftest import MODELS
from tests.served import FINAL, Served, until

TABLES = {"worst-regions": "mean similarity", "throughput": "images/s per worker", "failures": "has a damaged header"}


@pytest.fixture
def served(serve: Callable[..., Served], tmp_path: Path) -> Served:
    """The demo's photos, a small pair, a broken file, and a clock."""
    make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    models = {f"{kind}-model": MODELS / f"{kind}.pth" for kind in ("mse", "gan")}
    return serve(**{"mine-at": "every 60 seconds", "workers": 2, **models})


@pytest.fixture
def page(served: Served, tmp_path: Path) -> Iterator[Page]:
    with opened(served.entrance, tmp_path / "browser", height=1330) as page:
        yield page


@pytest.fixture
def keep(page: Page, tmp_path: Path) -> Callable[[str], None]:
    """Keep a picture of what the browser shows."""
    folder = Path(os.environ.get("DESRA_PICTURES", tmp_path / "pictures"))
    folder.mkdir(exist_ok=True)

    def write(name: str) -> None:
        time.sleep(2)  # what moves comes to rest
        (folder / f"{name}.png").write_bytes(page.screenshot())

    return write


@pytest.mark.slow
def test_a_scheduled_run_can_be_followed_and_read(served: Served, page: Page, keep: Callable[[str], None]) -> None:
    # The clock starts it.
    run = until(lambda: served.runs(type={"any_": ["RUNNING"]}))[0]
    page.go(f"{served.ui}/runs/flow-run/{run['id']}")
    page.wait_for("Running")
    page.wait_for("mine photos 20")
    seen = follow(served, run["id"], page)
    assert len(seen) >= 4, seen
    assert median(after - before for (before, _), (after, _) in pairwise(seen)) < 5
    assert any(line.endswith(" left") for _, line in seen), seen

    # The page of the run has seen it end, without being loaded anew.
    message = served.run(run["id"])["state"]["message"]
    assert message.startswith("19 of 20 images computed: ")
    assert message.endswith(" artifact regions in all, 1 image failed")
    page.wait_for("Completed")
    page.wait_for("shard 00000: 20 images, 1 failed")

    # In the morning.
    page.go(f"{served.ui}/runs/flow-run/{run['id']}")
    page.wait_for("Finished in state Completed('19 of 20 images computed: ")
    keep("run")
    page.click("Task Runs")
    for name in ("shard-00000", "super_resolution-00000", "mask-00000", "results"):
        page.wait_for(name)
    page.click("Artifacts")
    for key in ("overview", "progress", "outcome", *TABLES):
        page.wait_for(key)
    keep("artifacts")

    found = artifacts(served, run["id"])
    for key, word in TABLES.items():
        page.go(f"{served.ui}/artifacts/artifact/{found[key]['id']}")
        page.wait_for(word)
        keep(key)
    page.go(f"{served.ui}/artifacts/artifact/{found['outcome']['id']}")
    page.wait_for(message)
    keep("outcome")

    # Links that a browser may follow from there.
    page.go(page.link("Report"))
    page.wait_for("Worst regions")
    keep("report")
    page.go(f"{served.ui}/artifacts/artifact/{found['overview']['id']}")
    page.wait_for("shards to do: 1 (00000)")
    keep("overview")
    page.go(page.link("Dask dashboard"))
    page.wait_for("Workers")

    # The next one finds nothing new, ends within seconds and says so.
    idle = until(lambda: served.ended("nothing new: "))
    assert idle["total_run_time"] < 20
    page.go(f"{served.ui}/artifacts/artifact/{artifacts(served, idle['id'])['overview']['id']}")
    page.wait_for("shards with nothing to do, which are not submitted: 1 (00000)")
    page.wait_for("since the last scan: 0 new images, 0 changed images; vanished so far: 0 images")
    page.go(f"{served.ui}/runs")
    page.wait_for(idle["name"])
    keep("runs")


def follow(served: Served, run_id: str, page: Page) -> list[tuple[float, str]]:
    """Every line of the progress artifact until the run ends, with the second at which it came; the page stays open."""
    seen: list[tuple[float, str]] = []

    def ended() -> bool:
        assert "mine photos" in page.text()
        progress = artifacts(served, run_id).get("progress")
        if progress and (not seen or progress["description"] != seen[-1][1]):
            seen.append((time.monotonic(), progress["description"]))
        return served.run(run_id)["state"]["type"] in FINAL

    until(ended)
    return seen


def artifacts(served: Served, run_id: str) -> dict[str, dict[str, Any]]:
    query = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    found = httpx.post(f"{served.url}/artifacts/filter", json=query).raise_for_status().json()
    return {artifact["key"]: artifact for artifact in found}
