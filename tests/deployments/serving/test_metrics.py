"""What Prometheus gets from `desra serve`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.serving.guarded import report_server
from deployments.serving.metrics import gpu_memory
from desra_core.workspace import Workspace
from tasks.metrics import update
from tests.conftest import held
from tests.served import Served, until

Samples = dict[tuple[str, ...], float]


def scraped(address: str, secret: str) -> Samples:
    """The samples as Prometheus reads them, by name and labels but for the workspace."""
    answer = httpx.get(address, headers={"Authorization": f"Bearer {secret}"}, timeout=10).raise_for_status()
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert Path(labels.pop("workspace")).name == "ws"
            found[sample.name, *labels.values()] = sample.value
    return found


@pytest.fixture
def served_metrics(workspace: Workspace) -> Iterator[tuple[str, str]]:
    """Address and secret of the metrics of a workspace."""
    queue = {"running": 1, "waiting": 2}
    with report_server(workspace, 0, lambda: queue) as report:
        base, secret, _ = report.rsplit("/", 2)
        yield f"{base}/metrics", secret


def test_the_file_of_the_runs_with_queue_and_lock(workspace: Workspace, served_metrics: tuple[str, str]) -> None:
    served = {("desra_workspace_in_use",): 0, ("desra_runs", "running"): 1, ("desra_runs", "waiting"): 2}
    assert scraped(*served_metrics) == served
    update(workspace, {("desra_artifact_images", ()): 4})
    with held(workspace):
        assert scraped(*served_metrics) == served | {("desra_workspace_in_use",): 1, ("desra_artifact_images",): 4}
    shutil.rmtree(workspace.root)
    assert scraped(*served_metrics) == served
    assert not workspace.root.exists()


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer of another", "Basic SECRET", "Bearer größer"])
def test_only_the_owner_may_scrape(given: str, served_metrics: tuple[str, str]) -> None:
    address, secret = served_metrics
    headers = {"Authorization": given.replace("SECRET", secret).encode()} if given else {}
    answer = httpx.get(address, headers=headers)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "desra_" not in answer.text


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo '0, 512, 81920'; echo '1, [N/A], [N/A]'; echo nonsense", {"used": 512 * 2**20, "size": 81920 * 2**20}),
        ("echo broken; exit 9", {}),
    ],
)
def test_the_memory_of_gpus(script: str, found: dict[str, int], tmp_path: Path, monkeypatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_memory() == {(f"desra_gpu_memory_{what}_bytes", ("0",)): size for what, size in found.items()}


@pytest.mark.slow
def test_a_run_is_watched_killed_and_gone_on_with(serve, make_photos, tmp_path) -> None:
    make_photos(tmp_path / "photos", 200)
    served: Served = serve()
    address = served.said().partition("metrics are at ")[2].split()[0]
    secret = (served.workspace.prefect_home / "report").read_text()
    seen: list[Samples] = []

    def scrape() -> Samples:
        seen.append(scraped(address, secret))
        return seen[-1]

    done = ("desra_images_total", "mask", "done")
    until(lambda: scrape().get(("desra_runs", "running")) == 0)
    served.start("mine")
    until(lambda: scrape().get(("desra_runs", "running")) == 1)
    until(lambda: scrape()["desra_workspace_in_use",] and any(served.workspace.journal.glob("*/*.json")))
    run = next(each for each in served.processes() if "PREFECT__FLOW_RUN_ID" in _environment(each))
    run.send_signal(signal.SIGKILL)
    until(lambda: scrape()["desra_workspace_in_use",] == 0)
    until(lambda: ("desra_last_run_end_timestamp_seconds", "mine", "crashed") in scrape())
    assert seen[-1]["desra_corpus_images", "todo"] > 0
    served.start("mine")
    until(lambda: ("desra_last_run_end_timestamp_seconds", "mine", "completed") in scrape())
    last = seen[-1]
    assert last["desra_corpus_images", "done"] == 200
    assert last["desra_corpus_images", "todo"] == last["desra_corpus_images", "failed"] == 0
    assert last["desra_artifact_images",] <= last["desra_artifact_regions",]
    assert last["desra_stage_seconds_total", "super_resolution"] > 0
    counts = [each[done] for each in seen if done in each]
    assert counts == sorted(counts)
    assert counts[-1] > 0
    served.workspace.root.rename(tmp_path / "elsewhere")
    assert scrape()["desra_workspace_in_use",] == 0
    (tmp_path / "elsewhere").rename(served.workspace.root)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
