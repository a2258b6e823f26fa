"""``desra verify`` as its users meet it."""

from __future__ import annotations

import json


def test_damage_is_named_and_mended(desra, make_pairs, tmp_path) -> None:
    make_pairs(tmp_path, 4)
    workspace = tmp_path / "ws"
    detect = "detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--workspace", workspace
    assert desra(*detect, "--min-area", "300").returncode == 0
    verify = "verify", "--workspace", workspace
    whole = desra(*verify)
    assert (whole.returncode, "found    all as they were written" in whole.stdout) == (0, True), whole.stderr

    mask, table = sorted(workspace.glob("masks/**/*.png"))[0], workspace / "outcomes/00000000.parquet"
    before = {path: path.read_bytes() for path in workspace.glob("masks/**/*.png")}
    for path, stranger in ((mask, False), (workspace / "masks/note.txt", True)):
        path.write_bytes(b"x" if stranger else path.read_bytes()[:-1])
    found = desra(*verify)
    assert found.returncode == 1
    assert f"damaged: {mask}: is not as it was written; desra can make it again" in found.stderr
    assert "unknown: masks/note.txt" in found.stderr
    assert f"next     desra verify --repair --workspace {workspace}" in found.stdout

    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    document = json.loads(desra(*verify, "--json").stdout)
    assert [damage["path"] for damage in document["damaged"]] == [str(table)]
    assert (document["unchecked"], document["unknown"]) == (4, ["masks/note.txt"])
    again = desra(*detect, "--min-area", "300")
    assert (again.returncode, again.stderr.splitlines()[-1].partition(": cannot be read")[0]) == (2, f"error: {table}")

    assert desra(*verify, "--repair").returncode == 0  # the records alone can be checked
    assert desra(*detect, "--min-area", "300").returncode == 0
    assert desra(*verify, "--repair").returncode == 0
    assert desra(*detect, "--min-area", "300").returncode == 0
    assert desra(*verify).returncode == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_that_is_no_workspace_is_one_line(desra_here, tmp_path) -> None:
    run = desra_here("verify", "--workspace", tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "is no workspace; name the workspace of desra mine, detect or cycle" in run.stderr
