"""Runs of detect and mine on the Prefect server."""

from __future__ import annotations

import json
import re
import shutil

import httpx
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from desra_core.workspace import Workspace
from tests.conftest import keyed


@pytest.mark.parametrize(
    ("verb", "first"),
    [("detect", "similarity"), pytest.param("mine", "super_resolution", marks=pytest.mark.slow)],
)
def test_the_server_shows_a_run(
    verb, first, make_pairs, make_photos, make_models, desra, prefect_environment, tmp_path
) -> None:
    if verb == "detect":
        make_pairs(tmp_path, 7)
        inputs = ("--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr")
    else:
        make_photos(tmp_path / "photos", 7)
        mse, gan = make_models(tmp_path)
        inputs = (tmp_path / "photos", "--mse-model", mse, "--gan-model", gan)
    url = keyed(prefect_environment)
    known = {run["id"] for run in httpx.post(f"{url}/flow_runs/filter", json={}).json()}
    command = (verb, *inputs, "--workspace", tmp_path / "ws", "--shard-size", "4")

    def latest_run() -> tuple[dict, dict[str, str], dict[str, dict]]:
        [flow_run] = [run for run in httpx.post(f"{url}/flow_runs/filter", json={}).json() if run["id"] not in known]
        known.add(flow_run["id"])
        query = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
        task_runs = httpx.post(f"{url}/task_runs/filter", json=query).json()
        artifacts = httpx.post(f"{url}/artifacts/filter", json=query).json()
        return (
            flow_run,
            {run["name"]: run["state"]["name"] for run in task_runs},
            {artifact["key"]: artifact for artifact in artifacts},
        )  # fmt: skip

    assert desra(*command).returncode == 0
    flow_run, task_runs, artifacts = latest_run()
    assert flow_run["state"]["name"] == "Completed"
    stages = [f"{stage}-{shard:05d}" for stage in ("shard", first, "mask") for shard in (0, 1)]
    assert task_runs == dict.fromkeys([*stages, "results"], "Completed")
    assert artifacts["progress"]["data"] == 100
    assert "7 of 7 images, 0 failed" in artifacts["progress"]["description"]
    assert '"image"' in artifacts["worst-regions"]["data"]
    assert next(row["stage"] for row in json.loads(artifacts["throughput"]["data"])).startswith(
        {"detect": "similarity", "mine": "super-resolution"}[verb]
    )
    assert json.loads(artifacts["failures"]["data"]) == []
    outcome = artifacts["outcome"]["data"]
    assert outcome.startswith(f"**{flow_run['state']['message']}**")
    assert "0 images" not in outcome.partition("Report")[0].partition("\n")[2]
    assert f"[Report]({(tmp_path / 'ws/report.html').as_uri()})" in outcome
    overview = artifacts["overview"]["data"]
    assert "7 images: 0 done before, 0 failed for good, 7 to do" in overview
    assert "- shards to do: 2 (00000–00001)\n- shards with nothing to do, which are not submitted: none\n" in overview
    assert "[Dask dashboard](http://" in overview
    assert ("- masks rest on mse.pth, a network that desra did not train" in overview) == (verb == "mine")
    corpus = {"detect": "gan_sr", "mine": "photos"}[verb]
    assert re.fullmatch(rf"{verb} {corpus} \d{{4}}-\d\d-\d\d \d\d:\d\d", flow_run["name"])
    assert set(flow_run["tags"]) == {verb, corpus, "ws"}

    # Only the masks depend on the threshold, and the workspace says so to the cache; a cached state whose outputs are
    # gone does not count.
    workspace = Workspace(tmp_path / "ws")
    for row in pq.read_table(workspace.manifest).filter(pc.field("shard") == 1).to_pylist():
        shutil.rmtree(workspace.group(row["id"]), ignore_errors=True)
    assert 0 < len(list(workspace.maps.glob("*/*.zarr"))) < 4
    assert desra(*command, "--threshold", "0.69").returncode == 0
    _, task_runs, _ = latest_run()
    assert (task_runs[f"{first}-00000"], task_runs[f"{first}-00001"]) == ("Cached", "Completed")
    assert task_runs["mask-00000"] == task_runs["mask-00001"] == "Completed"
    assert len(list(workspace.maps.glob("*/*.zarr"))) == 4


@pytest.mark.slow
def test_a_run_plans_once(make_pairs, desra_alone, tmp_path) -> None:
    """The driver lists each folder once, from the command to the last line."""
    make_pairs(tmp_path, 7)
    places = {name: tmp_path / name for name in ("mse_sr", "gan_sr", "ws/masks", "ws/maps")}
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'deployments.cli']:\n"
        f"    watched = {[str(place) for place in places.values()]}\n"
        f"    looks = os.open({str(tmp_path / 'looks')!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        "    def note(event, arguments):\n"
        "        if event == 'os.scandir' and str(arguments[0]) in watched:\n"
        "            os.write(looks, f'{arguments[0]}\\n'.encode())\n"
        "    sys.addaudithook(note)\n"
    )
    command = ("detect", "--mse-sr", places["mse_sr"], "--gan-sr", places["gan_sr"], "--workspace", tmp_path / "ws")
    assert desra_alone(*command, "--limit", 3, PYTHONPATH=str(tmp_path / "site")).returncode == 0
    (tmp_path / "looks").unlink()
    run = desra_alone(*command, PYTHONPATH=str(tmp_path / "site"))
    assert "7 of 7 images done, 0 failed" in run.stdout, run.stderr
    looks = (tmp_path / "looks").read_text().splitlines()
    assert sorted(looks) == sorted(map(str, places.values()))
