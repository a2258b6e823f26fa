"""Severity labels: what is read, and the one line by which each mistake is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from desra_core.errors import UsageError
from desra_core.evaluation.image_agreement import MaskRegion
from desra_core.evaluation.severity_labels import Rating, check_ratings, read_ratings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "noticed.csv"


def test_reading(file: Path) -> None:
    """Columns in any order, others beside them, a byte order mark, a name with a comma and one with a line break."""
    file.write_bytes(
        b'\xef\xbb\xbfnoticed,note,region,image\r\n0.25,,1,a/b\r\n,nobody,2,a/b\r\n1,,3,"c,d"\r\n0,,1,"e\nf"\r\n'
    )
    assert read_ratings(file) == {
        "a/b": {1: Rating(0.25, None, 2), 2: Rating(None, None, 3)},
        "c,d": {3: Rating(1.0, None, 4)},
        "e\nf": {1: Rating(0.0, None, 6)},
    }


def test_boxes_are_read_where_all_of_one_is_there(file: Path) -> None:
    file.write_text("image,region,x,y,width,height,noticed\na,1,5,6,7,8,0.5\na,2,,,,,0.5\n")
    assert read_ratings(file)["a"] == {1: Rating(0.5, ("5", "6", "7", "8"), 2), 2: Rating(0.5, None, 3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,region\na,1\n", ": has no column noticed; fill in the column noticed of the regions.csv"),
        ("image;region;noticed\na;1;1\n", ": has no column image;"),
        ("", ": has no column image;"),
        ("image,region,noticed\n", ": rates no region;"),
        ("image,region,noticed\na,1,\n", ": rates no region;"),
        ("image,region,noticed\na,1,0.5\na,1,0.5\n", ", line 3: rates region 1 of a a second time; keep one"),
        ("image,region,noticed\na,1,0.5\na,01,0.6\n", ", line 3: rates region 1 of a a second time"),
        ("image,region,noticed\na,1,1.01\n", ", line 2: has the share '1.01'; shares of viewers are numbers in 0..1"),
        ("image,region,noticed\na,1,-0.1\n", ", line 2: has the share '-0.1'"),
        ("image,region,noticed\na,1,nan\n", ", line 2: has the share 'nan'"),
        ("image,region,noticed\na,1,60%\n", ", line 2: has the share '60%'"),
        ("image,region,noticed\na,1,0.5\na,0,0.5\n", ", line 3: has the region '0'; regions are numbered 1, 2"),
        ("image,region,noticed\na,1.0,0.5\n", ", line 2: has the region '1.0'"),
        ("image,region,noticed\na,\u00b2,0.5\n", ", line 2: has the region"),
        ("image,region,noticed\na,1\n", ", line 2: has more or fewer cells than there are columns"),
        ("image,region,noticed\na,1,0.5,7\n", ", line 2: has more or fewer cells than there are columns"),
        ('image,region,noticed\n"a,1,0.5\n', ": is no CSV file in UTF-8"),
    ],
)
def test_mistakes(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read_ratings(file)
    assert f"{file}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file(file: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_ratings(file)
    file.write_bytes(b"image,region,noticed\n\xff,1,1\n")
    with pytest.raises(UsageError, match="is no CSV file in UTF-8"):
        read_ratings(file)


REGIONS = {"a": [MaskRegion(5, 6, 7, 8, 40, 3, None)] * 2, "failed": None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,2,5,6,7,8,1\nb,1,,,,,1\nb,2,,,,,1", ", line 3: names b, an image without ground truth;"),
        ("a,1,,,,,1\na,3,,,,,", ", line 3: names region 3 of a, which has 2;"),
        ("a,1,5,6,7,9,1", ", line 2: describes another region than number 1 of a;"),
    ],
)
def test_labels_of_another_ground_truth(file: Path, rows: str, message: str) -> None:
    file.write_text(f"image,region,x,y,width,height,noticed\n{rows}\n")
    with pytest.raises(UsageError) as error:
        check_ratings(read_ratings(file), file, REGIONS)
    assert f"{file}{message}" in str(error.value)


def test_labels_of_this_ground_truth(file: Path) -> None:
    """And of an image that could not be judged, of whose regions nothing is known."""
    file.write_text("image,region,x,y,width,height,noticed\na,2,5,6,7,8,1\na,1,,,,,0\nfailed,9,1,1,1,1,1\n")
    check_ratings(read_ratings(file), file, REGIONS)
