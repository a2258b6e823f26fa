"""Workspaces that an older desra has made go on working.

``old_workspace.tar.gz`` holds some, as commit b56595c made them by its command line; see ``make_old_workspace.py``.
They lie elsewhere now, as copies do, so the commands name photos and models anew. What fails here would have people
compute their corpora again, or worse.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import pytest

from desra_core.settings import Detection, Mining
from tests.conftest import MODELS, Desra
from tests.in_process import process
from tests.make_old_workspace import ARCHIVE, CALIBRATE, CYCLED, DETECT, FINETUNE, GATE, MINE

# What names places and times, and is written anew where these are others.
OF_PLACES = ("settings.json", "manifest.parquet", "report.html", "lock")
NAMES = {"detected": 3, "killed": 3, "mined": 3, "cycled": 7}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of all that is stored."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def results(workspace: Path) -> dict[str, bytes]:
    """All files but those that tell of places and of the layout, without the checksums, which an older desra lacked."""
    paths = (path for path in workspace.rglob("*") if path.is_file() and not path.is_symlink())
    files = {str(path.relative_to(workspace)): unsealed(path) for path in paths}
    return {path: content for path, content in files.items() if path not in (*OF_PLACES, "format")}


def unsealed(path: Path) -> bytes:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return f"{table.schema.to_string()} {table.schema.metadata} {table.to_pylist()}".encode()
    data = path.read_bytes()
    if path.name == "zarr.json":
        return re.sub(rb',\s*"checksum": "[0-9a-f]{16}"', b"", data)
    return data


def touched(folder: Path) -> dict[str, tuple[int, int]]:
    """Of all files, what changes when one is written, with the same bytes too."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}


def rounded(document: Any) -> Any:
    """A JSON document whose numbers have twelve digits."""
    if isinstance(document, dict):
        return {name: rounded(value) for name, value in document.items()}
    if isinstance(document, list):
        return [rounded(value) for value in document]
    return float(f"{document:.12g}") if isinstance(document, float) else document


def images(workspace: Path) -> list[dict[str, object]]:
    """What the manifest says of the images; times do not survive every copy, and old manifests lack offsets."""
    table = pq.read_table(workspace / "manifest.parquet")
    rows = table.drop_columns([name for name in table.column_names if name.endswith(("_mtime", "_offset"))]).to_pylist()
    assert all(table[name].null_count == len(table) for name in table.column_names if name.endswith("_offset"))
    return rows


def seconds(workspace: Path) -> dict[str, dict[str, float]]:
    """How long each stage of each image took: no two times are alike."""
    rows = [row for path in sorted((workspace / "outcomes").glob("*")) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: dict(row["seconds"]) for row in rows}


def commands(old: Path) -> dict[str, list[object]]:
    """The commands that made the workspaces."""
    pairs = [f"--{role.replace('_', '-')}={old / 'pairs' / role}" for role in ("mse_sr", "gan_sr", "labels")]
    models = {name: ["--mse-model", folder / "mse.pth", "--gan-model", folder / "gan.pth"]
              for name, folder in (("mined", MODELS), ("cycled", old / "models"))}  # fmt: skip
    return {
        "detected": ["detect", *pairs, *DETECT, "--workspace", old / "detected"],
        "killed": ["detect", *pairs, *DETECT, "--workspace", old / "killed"],
        "mined": ["mine", old / "photos", *models["mined"], *MINE, "--workspace", old / "mined"],
        "cycled": ["mine", old / "scenes", *models["cycled"], *CYCLED, "--keep-mse", "--workspace", old / "cycled"],
    }


def detection(old: Path, workspace: Path, **changes: object) -> Detection:
    """The settings of the two runs of pairs."""
    pairs = {
        "mse_sr": old / "pairs/mse_sr",
        "gan_sr": old / "pairs/gan_sr",
        "segmenter": f"labels:{old / 'pairs/labels'}",
    }
    given = {"workspace": workspace, **pairs, "min_area": DETECT[1], "keep": DETECT[3]}
    return Detection(**(given | changes))


OLD = pytest.mark.parametrize("name", ["detected", pytest.param("mined", marks=pytest.mark.slow), "cycled"])


@OLD
def test_all_is_done_and_stays_as_it_is(old: Path, desra_here: Desra, name: str) -> None:
    ws, count = old / name, NAMES[name]
    before, rows = results(ws), images(ws)
    status = desra_here("status", "--workspace", ws)
    assert status.returncode == 0, status.stderr
    assert f"images     {count}\ndone       {count}\npending    0\nfailed     0\n" in status.stdout
    assert " unknown " not in status.stdout
    for _ in range(2):
        run = desra_here(*commands(old)[name])
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"nothing to do: {count} of {count} images done, 0 failed before"), run.stdout
        assert "new images" not in run.stderr
        assert "computed again" not in run.stderr
        assert results(ws) == before
        assert images(ws) == rows


@OLD
def test_report_and_gc(old: Path, desra_here: Desra, name: str) -> None:
    ws = old / name
    assert desra_here(*commands(old)[name]).returncode == 0
    report = desra_here("report", "--workspace", ws, "--output", old / "report.html", "--pages", 1)
    assert (report.returncode, report.stderr) == (0, "")
    assert ("<strong>Passed.</strong>" in (old / "report.html").read_text()) == (name == "cycled")
    before = touched(ws)
    gc = desra_here("gc", "--workspace", ws, "--list")
    assert gc.returncode == 0, gc.stderr
    assert gc.stdout == "nothing to drop\n"
    assert touched(ws) == before


def test_what_a_killed_run_has_left_is_done(old: Path, desra_here: Desra) -> None:
    """Its records are in the journal. The other run of the same pairs tells how all masks are to be."""
    ws = old / "killed"
    assert list((ws / "journal").glob("*/*.json"))
    status = desra_here("status", "--workspace", ws).stdout
    [done] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("done ")]
    assert 0 < done < NAMES["killed"]
    before = touched(ws / "masks") | touched(ws / "maps")
    process(detection(old, ws))
    after = touched(ws / "masks") | touched(ws / "maps")
    assert before.items() <= after.items()
    masks = results(old / "detected/masks")
    assert len(masks) == NAMES["killed"]
    assert results(ws / "masks") == masks
    assert desra_here(*commands(old)["killed"]).stdout.startswith("nothing to do: 3 of 3 images done")


def test_the_same_pairs_give_the_same_bytes_today(old: Path) -> None:
    process(detection(old, old / "fresh"))
    for kind in ("masks", "maps"):
        assert results(old / "fresh" / kind) == results(old / "detected" / kind)
    tables = [pq.read_table(old / name / "regions.parquet") for name in ("fresh", "detected")]
    assert tables[0].num_rows == 2
    assert tables[0].equals(tables[1])


def test_another_threshold_makes_masks_alone(old: Path) -> None:
    ws = old / "detected"
    maps, masks, took = touched(ws / "maps"), results(ws / "masks"), seconds(ws)
    process(detection(old, ws, threshold=0.5))
    assert touched(ws / "maps") == maps
    assert results(ws / "masks") != masks
    process(detection(old, old / "fresh", threshold=0.5))
    assert results(ws / "masks") == results(old / "fresh/masks")
    now = seconds(ws)
    assert {key: times["similarity"] for key, times in now.items()} == {
        key: times["similarity"] for key, times in took.items()
    }
    assert any(now[key]["mask"] != took[key]["mask"] for key in now)


def test_another_gan_model_leaves_the_mse_results(old: Path) -> None:
    """They were kept, of all photos. The other model is the one that was promoted."""
    ws = old / "cycled"
    models = {"mse_model": old / "models/mse.pth", "gan_model": ws / "models/current/model.pth"}
    kept = {path: found for path, found in touched(ws / "maps").items() if "/mse_sr/" in path}
    assert kept
    before = seconds(ws)
    process(Mining(photos=old / "scenes", workspace=ws, **models, min_area=CYCLED[1], keep_mse=True))
    assert kept.items() <= touched(ws / "maps").items()
    assert all(times != before[key] for key, times in seconds(ws).items())


def test_the_verdict_is_read_and_nothing_judged_anew(old: Path, desra_here: Desra) -> None:
    ws = old / "cycled"
    [run] = (ws / "finetunes").iterdir()
    before, verdict = touched(ws / "gate/judgements"), json.loads((ws / "gate/verdict.json").read_bytes())
    assert before
    models = ("--before", old / "models/gan.pth", "--mse-model", old / "models/mse.pth", "--group-by", FINETUNE[-1])
    compared = desra_here("compare", "--workspace", ws, "--after", run, *models, *GATE)
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.startswith(
        "nothing to do: all was judged before\njudged by 4 held-out images, 2 of them clean"
    )
    assert f"passed   {verdict['verdict']['best']}\n" in compared.stdout
    assert touched(ws / "gate/judgements") == before
    again = json.loads((ws / "gate/verdict.json").read_bytes())
    for same in ("images", "finetune", "losses", "key", "mask_key"):
        assert again[same] == verdict[same]
    # The sum of floats has other last bits from Python 3.12 on.
    unmasked = {"human_images": 0, "iou_before": None, "iou_after": None, "delta_iou": None}  # scores had none of these
    told = verdict["verdict"] | {"dropped": [], "control": verdict["verdict"]["control"] | unmasked}
    told["scores"] = [score | unmasked for score in told["scores"]]
    assert rounded(again["verdict"]) == rounded(told)
    assert again["best"]["key"] == verdict["best"]["key"]


def test_the_finetune_has_ended(old: Path, desra_here: Desra) -> None:
    ws = old / "cycled"
    [run] = (ws / "finetunes").iterdir()
    before = touched(run)
    again = desra_here("finetune", "--workspace", ws, "--gan-model", old / "models/gan.pth", *FINETUNE)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("nothing to do: this finetune has ended before\n4 iterations on 3 images\n")
    assert f"models   {run / 'models'}" in again.stdout
    assert {path: found for path, found in touched(run).items() if path != "lock"}.items() <= before.items()


def test_the_promoted_model_and_back(old: Path, desra_here: Desra) -> None:
    ws = old / "cycled"
    current = ws / "models/0001/model.pth"
    assert f"model      {current}, current by promotion " in desra_here("status", "--workspace", ws).stdout
    back = desra_here("rollback", "--workspace", ws)
    assert back.returncode == 0, back.stderr
    assert back.stdout == f"current  {ws / 'models/0002/model.pth'}\n"
    assert (ws / "models/current/model.pth").read_bytes() == (old / "models/gan.pth").read_bytes()
    events = json.loads((ws / "models/current/history.json").read_bytes())
    assert [event["kind"] for event in events] == ["origin", "promotion", "rollback"]


def test_a_calibration_counts_nothing_twice(old: Path, desra_here: Desra) -> None:
    ws, output = old / "detected", old / "again.toml"
    counted = touched(ws / "calibration")
    assert desra_here(*commands(old)["detected"]).returncode == 0
    run = desra_here("calibrate", "--workspace", ws, "--output", output, *CALIBRATE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("nothing to do: all was counted before\n")
    assert touched(ws / "calibration").keys() == counted.keys()
    before = touched(ws / "calibration")  # with a checksum, which an older desra lacked
    assert desra_here("calibrate", "--workspace", ws, "--output", output, *CALIBRATE).returncode == 0
    assert touched(ws / "calibration") == before
    then, now = (tomllib.loads(path.read_text()) for path in (old / "weights.toml", output))
    assert now["class"] == then["class"]
    assert now["suggestion"] == then["suggestion"]


def test_masks_by_people_count_and_can_be_taken_back(old: Path, desra_here: Desra) -> None:
    """What was exported is known as the detector's, and what was drawn as a person's."""
    ws, name = old / "mined", "page"
    run = desra_here(*commands(old)["mined"])
    assert "people   1 image with a human mask\n" in run.stdout
    drawn = cv2.imread(str(ws / f"human/{name}.png"), cv2.IMREAD_UNCHANGED)
    assert cv2.imread(str(ws / f"dataset/mask/{name}.png"), cv2.IMREAD_UNCHANGED).tolist() == drawn.tolist()
    undone = desra_here("import", "--undo", "--workspace", ws)
    assert undone.stdout.startswith("taken back: the masks of 1 image, of which 0 have an earlier mask again\n")
    detected = cv2.imread(str(ws / f"masks/{name}.png"), cv2.IMREAD_UNCHANGED)
    assert cv2.imread(str(ws / f"dataset/mask/{name}.png"), cv2.IMREAD_UNCHANGED).tolist() == detected.tolist()
    # By what the workspace has remembered of the export, an export that says nothing itself is known as unchanged.
    out, copy = old / "out", shutil.copytree(ws, old / "copy")
    assert desra_here("export", "--workspace", copy, "--format", "labelme", "--output", out).returncode == 0
    for hidden in out.glob(".*"):
        hidden.unlink()
    again = desra_here("import", "labelme", out, "--workspace", ws)
    assert again.stdout.startswith("nothing to import: every mask is as exported\n")
    shutil.rmtree(ws / "exported")
    assert desra_here("import", "labelme", out, "--workspace", ws).stdout.startswith("1 human mask")
