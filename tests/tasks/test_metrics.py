"""The metrics that runs write: counters that go on, and runs that nothing of this disturbs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from desra_core.planning.plan import target_of
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from tasks import metrics
from tasks.metrics import RunMetrics, read_samples, render, update


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "ws")
    workspace.create()
    return workspace


def run_of(workspace: Workspace, *, done: int = 0, failed: int = 0, pending: int = 0) -> RunMetrics:
    target, _ = target_of(Detection(mse_sr=Path("/mse_sr"), gan_sr=Path("/gan_sr"), workspace=workspace.root))
    plan = SimpleNamespace(target=target, done=done, failed=failed, pending=pending)
    return RunMetrics(workspace, plan)  # type: ignore[arg-type]


def test_counters_go_on_and_gauges_are_those_of_the_latest_run(workspace: Workspace) -> None:
    for done in (0, 2):
        run = run_of(workspace, done=done, failed=1, pending=4)
        assert read_samples(workspace.metrics)["desra_corpus_images", ("todo",)] == 4
        run.count("similarity", 0.25, names=2, failed=False, last=False)
        run.count("similarity", 0, names=1, failed=True, last=False)
        run.count("mask", 0.5, names=2, failed=False, last=True)
        run.write()
    found = read_samples(workspace.metrics)
    assert found == {
        ("desra_images_total", ("similarity", "done")): 2,
        ("desra_images_total", ("similarity", "failed")): 2,
        ("desra_images_total", ("mask", "done")): 2,
        ("desra_images_total", ("mask", "failed")): 0,
        ("desra_stage_seconds_total", ("similarity",)): 0.5,
        ("desra_stage_seconds_total", ("mask",)): 1,
        ("desra_corpus_images", ("done",)): 4,
        ("desra_corpus_images", ("failed",)): 2,
        ("desra_corpus_images", ("todo",)): 1,
    }


def test_counts_are_written_while_the_run_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a killed run loses seconds of them."""
    run = run_of(workspace, pending=9)
    run.count("mask", 1, names=1, failed=False, last=True)
    assert read_samples(workspace.metrics)["desra_images_total", ("mask", "done")] == 0
    monkeypatch.setattr(metrics, "_WRITE_SECONDS", 0)
    run.count("mask", 1, names=1, failed=False, last=True)
    assert read_samples(workspace.metrics)["desra_images_total", ("mask", "done")] == 2


def test_a_file_that_cannot_be_written_disturbs_no_run_and_loses_no_count(workspace: Workspace) -> None:
    run = run_of(workspace, pending=1)
    workspace.metrics.unlink()
    (workspace.metrics / "in the way").mkdir(parents=True)
    run.count("mask", 1, names=1, failed=False, last=True)
    run.write()
    (workspace.metrics / "in the way").rmdir()
    workspace.metrics.rmdir()
    run.write()
    assert read_samples(workspace.metrics)["desra_images_total", ("mask", "done")] == 1


def test_a_vanished_workspace_stays_away(tmp_path: Path) -> None:
    assert not update(Workspace(tmp_path / "ws"), {("desra_artifact_images", ()): 1})
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"desra_images_total 1\n", b"desra_other 1\n", b"{}}\n"])
def test_a_damaged_file_counts_as_none(content: bytes, workspace: Workspace) -> None:
    workspace.metrics.write_bytes(content)
    assert read_samples(workspace.metrics) == {}
    assert update(workspace, {("desra_artifact_images", ()): 1})
    assert read_samples(workspace.metrics) == {("desra_artifact_images", ()): 1}


def test_the_text_names_the_workspace_and_only_what_is_known() -> None:
    workspace = Workspace(Path('/data/a "b"\udcff'))
    text = render({("desra_images_total", ("mask", "done")): 3}, workspace).decode()
    [family] = text_string_to_metric_families(text)
    assert (family.name, family.type) == ("desra_images", "counter")
    [sample] = family.samples
    assert sample.name == "desra_images_total"
    assert sample.labels == {"workspace": '/data/a "b"\\udcff', "stage": "mask", "state": "done"}
