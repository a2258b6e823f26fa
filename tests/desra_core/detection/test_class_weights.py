"""Tables of class weights, and files that are no such table."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

import desra_core.detection.class_weights
from desra_core.detection.class_weights import class_names, load_weights
from desra_core.errors import UsageError
from desra_core.images.codec import CLASS_COUNT

TABLE = Path(desra_core.detection.class_weights.__file__).parent / "semantic_intervals.csv"
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "semantic_intervals.csv"


def table(column: str = "weight", value: object = 1.5, changes: dict[int, str] | None = None) -> str:
    rows = {index: f"{index},name {index},{value}" for index in range(CLASS_COUNT)} | (changes or {})
    return "\n".join([f"ade20k_index,name,{column}", *rows.values()]) + "\n"


def test_published_weights() -> None:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["ade20k_index"]) for row in rows] == list(range(CLASS_COUNT))
    expected = [20 / (20 - int(row["interval"])) for row in rows]
    weights = load_weights("published")
    assert weights.values.tolist() == expected
    assert weights.values.dtype == np.float64
    assert 1 <= min(expected) < max(expected) <= 20
    assert weights.key == load_weights(str(TABLE)).key


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside the checkout")
def test_the_table_is_the_authors() -> None:
    assert TABLE.read_bytes() == SHARED.read_bytes()


def test_class_names() -> None:
    names = class_names()
    assert len(names) == CLASS_COUNT == len(set(names))
    assert (names[0], names[2], names[149]) == ("wall", "sky", "flag")


def test_no_weights() -> None:
    assert load_weights("none").values.tolist() == [1.0] * CLASS_COUNT
    assert load_weights("none").key != load_weights("published").key


@pytest.mark.parametrize(
    ("content", "weight"),
    [
        (table("weight", 1.5), 1.5),
        (table("interval", 0), 1.0),
        (table("interval", 10), 2.0),
        (table("interval", 19), 20.0),
        ("\ufeff" + table("weight", 0.25), 0.25),
        (table("weight", 3).replace("\n", "\r\n"), 3.0),
        (table("weight,note", "2,of mine"), 2.0),
        ("\n".join([table().splitlines()[0], *table().splitlines()[:0:-1]]), 1.5),
    ],
    ids=["weight", "interval 0", "interval 10", "interval 19", "byte order mark", "CRLF", "more columns", "any order"],
)
def test_a_table_of_the_user(tmp_path: Path, content: str, weight: float) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content, newline="")
    weights = load_weights(str(path))
    assert weights.values.tolist() == [weight] * CLASS_COUNT
    path.rename(tmp_path / "renamed.csv")
    assert load_weights(str(tmp_path / "renamed.csv")).key == weights.key


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no row for 150 of the classes, the first is 0"),
        ("ade20k_index,name,weight\n", "no row for 150 of the classes, the first is 0"),
        (table().rsplit("\n", 2)[0], "no row for 1 of the classes"),
        (table().rsplit("\n", 4)[0], "no row for 3 of the classes, the first is 147"),
        (table(changes={5: "4,again,1"}), "line 7: class 4 is there twice"),
        (table(changes={5: "150,too many,1"}), "line 7: has class 150; ADE20K classes are 0..149"),
        (table(changes={5: "-1,negative,1"}), "line 7: has class -1"),
        (table(changes={5: "five,name,1"}), "line 7: is no class weight"),
        (table(changes={5: "5,name,heavy"}), "line 7: is no class weight"),
        (table(changes={5: "5,name"}), "line 7: is no class weight"),
        (table(changes={5: "5,name,0"}), "line 7: gives the weight 0"),
        (table(changes={5: "5,name,-2"}), "line 7: gives the weight -2"),
        (table(changes={5: "5,name,nan"}), "line 7: gives the weight nan"),
        (table(changes={5: "5,name,inf"}), "line 7: gives the weight inf"),
        (table("interval", 1, {5: "5,name,20"}), "line 7: .*intervals? .*0..19|line 7: is no class weight"),
        (table("interval", 1, {5: "5,name,21"}), "line 7: .*0..19"),
        (table("interval", 1, {5: "5,name,-1"}), "line 7: .*0..19"),
        (table("interval", 1, {5: "5,name,1.5"}), "line 7: is no class weight"),
        (table("mass"), "line 2: is no class weight"),
        ("just some text", "no row for 150 of the classes"),
        ("just\nsome\ntext", "line 2: is no class weight"),
        (b"\x89PNG\r\n\x1a\n\0\xff\xfe", "are not a CSV file"),
        ('ade20k_index,name,weight\n0,"' + "x" * 200_000, "are not a CSV file"),
    ],
)
def test_malformed_tables(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=reason) as caught:
        load_weights(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["a = " + "[" * 3000, "a = " + "1" * 5000, "a", "\ud800"])
def test_damaged_toml(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match="is damaged or no TOML") as caught:
        load_weights(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "nowhere.csv", tmp_path, tmp_path / "pipe.csv", Path("/dev/zero"), tmp_path / "a\0b.csv"):
        with pytest.raises(UsageError, match="class weights cannot be read"):
            load_weights(str(path))
