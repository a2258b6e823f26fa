"""Evaluating a set of masks: the published numbers for masks saved in any way, failures, files and severity labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from desra_core.errors import UsageError
from desra_core.evaluation.evaluation import (
    Evaluation,
    Rating,
    SeverityLabels,
    as_document,
    evaluate_masks,
    read_ratings,
    write_json,
    write_tables,
)
from desra_core.evaluation.mask_files import pair_folders, read_mask
from desra_core.evaluation.metrics import MaskRegion
from desra_core.images.codec import encode_mask, encode_png


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs: two of three regions found, nothing on either side, and a false region, each of another size."""
    masks, gt = tmp_path / "masks", tmp_path / "gt"
    drawn: dict[str, tuple[tuple[int, int], list[tuple[int, int]], list[tuple[int, int]]]] = {
        "a": ((60, 90), [(10, 10), (10, 40)], [(10, 10), (10, 40), (40, 70)]),
        "deep/b": ((50, 50), [], []),
        "c": ((40, 50), [(20, 20)], []),
    }
    for name, (shape, detected, marked) in drawn.items():
        for folder, corners in ((masks, detected), (gt, marked)):
            mask = np.zeros(shape, bool)
            for top, left in corners:
                mask[top : top + 10, left : left + 10] = True
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_mask(mask))
    return masks, gt


def evaluated(masks: Path, gt: Path, **options: Any) -> Evaluation:
    return evaluate_masks(pair_folders(masks, gt, labels=options.pop("labels", None)), **options)


def test_numbers_of_a_set(folders: tuple[Path, Path]) -> None:
    evaluation = evaluated(*folders)
    assert [image.pair.name for image in evaluation.images] == ["a", "c", "deep/b"]
    assert [image.shape for image in evaluation.images] == [(60, 90), (40, 50), (50, 50)]
    scores = evaluation.scores
    assert (scores.images, scores.empty_pairs) == (3, 1)
    assert (scores.values["iou"], scores.values["iou_with_empty"]) == ((2 / 3 + 0) / 2, (2 / 3 + 0 + 1) / 3)
    assert (scores.total.precision, scores.total.recall) == (2 / 3, 2 / 3)
    assert evaluation.classes is None
    assert evaluation.prominent is None
    assert evaluation.sizes == "image"


def cropped(mask: np.ndarray) -> np.ndarray:
    return mask[5:-5, 5:-5]


def framed(mask: np.ndarray) -> np.ndarray:
    return np.pad(mask, 5)


def same(mask: np.ndarray) -> np.ndarray:
    return mask


@pytest.mark.parametrize(
    ("of_mask", "of_truth", "sizes"),
    [
        (same, same, None),
        (framed, same, "image"),
        (same, cropped, "valid"),
        pytest.param(framed, cropped, None, marks=pytest.mark.slow),
    ],
)
def test_the_published_numbers(
    tmp_path: Path,
    shared_data: Path,
    of_mask: Callable[[np.ndarray], np.ndarray],
    of_truth: Callable[[np.ndarray], np.ndarray],
    sizes: str | None,
) -> None:
    """With the frame or without it on either side; the other side or the marked pixels show which."""
    pairs = shared_data / "pairs"
    published = json.loads((pairs / "metrics.json").read_text())
    for role, folder, change in (
        ("mask", pairs / published["predictions"], of_mask),
        ("truth", pairs / "gt_mask", of_truth),
    ):
        for path in folder.glob("*.png"):
            (tmp_path / role / "set").mkdir(parents=True, exist_ok=True)
            (tmp_path / role / "set" / path.name).write_bytes(encode_mask(change(read_mask(path))))
    evaluation = evaluated(tmp_path / "mask", tmp_path / "truth")
    document = as_document(evaluation)
    expected = published["published_scripts"]
    assert {key: document[key] for key in expected} == expected
    assert document["f1"] == pytest.approx(2 / (1 / expected["precision"] + 1 / expected["recall"]), rel=1e-14)
    assert document["iou_with_empty"] == document["iou"]
    assert evaluation.sizes == sizes
    assert all(low < expected[key] < high for key, (low, high) in document["intervals"].items() if key in expected)


def test_several_sizes_in_one_folder(folders: tuple[Path, Path]) -> None:
    """The size is found for each pair: a mask without the frame, a ground truth without it, and equal sizes."""
    masks, gt = folders
    whole = as_document(evaluated(masks, gt))
    (masks / "a.png").write_bytes(encode_mask(cropped(read_mask(masks / "a.png"))))
    (gt / "c.png").write_bytes(encode_mask(cropped(read_mask(gt / "c.png"))))
    mixed = as_document(evaluated(masks, gt))
    for image, before in zip(mixed["per_image"], whole["per_image"], strict=True):
        assert image == before
    assert mixed["iou"] == whole["iou"]


def test_the_size_of_masks_as_large_as_their_ground_truth(folders: tuple[Path, Path]) -> None:
    """One mask that marks its outermost 5 px decides for all of them; pairs of known size do not change."""
    masks, gt = folders
    (masks / "a.png").write_bytes(encode_mask(cropped(read_mask(masks / "a.png"))))
    touching = np.zeros((40, 50), bool)
    touching[0:8, 20:30] = True
    for folder in folders:
        (folder / "c.png").write_bytes(encode_mask(touching))
    assert evaluated(masks, gt, sizes="image").sizes == "image"
    assert evaluated(masks, gt, sizes="image").images[1].agreement.union == 30
    found = evaluated(masks, gt)
    assert found.sizes == "valid"
    assert [image.shape for image in found.images] == [(60, 90), (50, 60), (60, 60)]
    assert [image.agreement.union for image in found.images] == [300, 80, 0]
    assert [image.pair.name for image in found.images] == ["a", "c", "deep/b"]


def test_files_that_cannot_be_judged(folders: tuple[Path, Path]) -> None:
    """Each is reported in one line; the others are judged as without them."""
    masks, gt = folders
    for folder in folders:
        (folder / "other size.png").write_bytes(encode_mask(np.zeros((30, 30 if folder == gt else 31), bool)))
        (folder / "soft.png").write_bytes(encode_mask(np.ones((30, 30), bool)))
        (folder / "torn.png").write_bytes(encode_mask(np.ones((30, 30), bool)))
    (gt / "soft.png").write_bytes(encode_png(np.arange(900, dtype=np.uint16).reshape(30, 30).astype(np.uint8)))
    (masks / "torn.png").write_bytes((masks / "a.png").read_bytes()[:-30])
    evaluation = evaluated(masks, gt)
    told = [str(error).replace(f"{masks}", "M").replace(f"{gt}", "G") for error in evaluation.failures]
    assert told[0].startswith("M/other size.png: is 31x30 but G/other size.png is 30x30; masks have the size of their")
    assert told[1].startswith("G/soft.png: is not binary: it has the values 0, 1, 2, 3 and more; save it as PNG with 0")
    assert told[2].startswith("M/torn.png: is truncated or damaged")
    assert len(told) == 3
    for name in ("other size", "soft", "torn"):
        for folder in folders:
            (folder / f"{name}.png").unlink()
    assert evaluated(masks, gt).scores == evaluation.scores


def test_a_name_with_two_candidates_fails(folders: tuple[Path, Path]) -> None:
    (folders[0] / "c.bmp").write_bytes((folders[0] / "c.png").read_bytes())
    evaluation = evaluated(*folders)
    assert [image.pair.name for image in evaluation.images] == ["a", "deep/b"]
    assert as_document(evaluation)["failures"] == [
        {
            "file": "c",
            "reason": "has two candidates among the mask files: c.bmp and c.png",
            "remedy": "keep one of them",
        }
    ]


def test_nothing_can_be_judged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    masks, gt = folders
    for name in ("a", "c", "deep/b"):
        (gt / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"a.png: is not an image \(2 more files fail\)"):
        evaluated(masks, gt)
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.png").write_bytes(encode_mask(np.ones((30, 30), bool)))
    with pytest.raises(UsageError, match=r"a.png: has no twin, and neither has any other mask"):
        evaluated(masks, other)


def test_jpeg_masks(folders: tuple[Path, Path]) -> None:
    masks, gt = folders
    exact = evaluated(masks, gt)
    pixels = read_mask(masks / "a.png").astype(np.uint8) * np.uint8(255)
    (masks / "a.png").unlink()
    (masks / "a.jpg").write_bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes())
    lossy = evaluated(masks, gt)
    assert lossy.lossy == [masks / "a.jpg"]
    assert as_document(lossy)["lossy"] == [str(masks / "a.jpg")]
    assert lossy.scores.total.precision == exact.scores.total.precision
    assert lossy.scores.values["iou"] == pytest.approx(exact.scores.values["iou"], abs=0.05)


def test_classes_of_a_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    masks, gt = folders
    labels = tmp_path / "labels"
    labels.mkdir()
    classes = np.zeros((60, 90), np.uint8)
    classes[:, 60:] = 4
    (labels / "a.png").write_bytes(encode_png(classes))
    (labels / "c.png").write_bytes(encode_png(np.full((40, 50), 4, np.uint8)))
    evaluation = evaluated(masks, gt, labels=labels)
    assert evaluation.unlabelled == 1
    rows = {row["name"]: row for row in as_document(evaluation)["per_class"]}
    assert list(rows) == ["wall", "tree"]
    assert (rows["wall"]["iou"], rows["wall"]["precision"], rows["wall"]["recall"]) == (1, 1, 1)
    assert (rows["tree"]["iou"], rows["tree"]["precision"], rows["tree"]["recall"]) == (0, 0, 0)
    assert (rows["tree"]["marked"], rows["tree"]["detected"], rows["tree"]["f1"]) == (1, 1, 0)
    assert (rows["tree"]["pixel_precision"], rows["tree"]["union"]) == (0, 200)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = evaluated(*folders)
    written = write_tables(evaluation, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}
    assert [path.name for path in written] == ["images.csv", "regions.csv", "detections.csv"]
    images = read_csv(tmp_path / "out" / "images.csv")
    assert [(row["image"], row["iou"], row["precision"], row["marked"]) for row in images] == [
        ("a", str(2 / 3), "1.0", "3"),
        ("c", "0.0", "0.0", "0"),
        ("deep/b", "", "", "0"),
    ]
    regions = read_csv(tmp_path / "out" / "regions.csv")
    assert [tuple(row.values()) for row in regions] == [
        ("a", "1", "10", "10", "10", "10", "100", "1.0", "", "true", ""),
        ("a", "2", "40", "10", "10", "10", "100", "1.0", "", "true", ""),
        ("a", "3", "70", "40", "10", "10", "100", "0.0", "", "false", ""),
    ]
    detections = read_csv(tmp_path / "out" / "detections.csv")
    assert [(row["image"], row["region"], row["x"], row["right"]) for row in detections] == [
        ("a", "1", "10", "true"),
        ("a", "2", "40", "true"),
        ("c", "1", "20", "false"),
    ]


def test_the_same_bytes_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        evaluation = evaluated(*folders)
        write_tables(evaluation, tmp_path / folder)
        write_json(evaluation, tmp_path / folder / "evaluation.json")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
    document = json.loads(contents[0]["evaluation.json"])
    assert document["per_image"] == as_document(evaluation)["per_image"]
    assert document["per_image"][2]["iou"] is None


def test_tables_of_an_earlier_evaluation_do_not_stay(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "c.png").write_bytes(encode_png(np.zeros((40, 50), np.uint8)))
    write_tables(evaluated(*folders, labels=tmp_path / "labels"), tmp_path / "out")
    assert (tmp_path / "out" / "classes.csv").exists()
    write_tables(evaluated(*folders), tmp_path / "out")
    assert not (tmp_path / "out" / "classes.csv").exists()


def test_ratings_come_back_with_the_table(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A person fills in regions.csv: the scores are those of prominent regions, and the next table has the ratings."""
    write_tables(evaluated(*folders), tmp_path)
    rows = read_csv(tmp_path / "regions.csv")
    for row, noticed in zip(rows, ("0.2", "", "0.5"), strict=True):
        row["noticed"] = noticed
    with (tmp_path / "rated.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    severity = SeverityLabels(read_ratings(tmp_path / "rated.csv"), tmp_path / "rated.csv", 0.5)
    evaluation = evaluated(*folders, severity=severity)
    assert evaluation.scores == evaluated(*folders).scores
    prominent = as_document(evaluation)["prominent"]
    assert (prominent["rated_regions"], prominent["marked"], prominent["found"]) == (2, 1, 0)
    assert (prominent["detected"], prominent["right"], prominent["recall"]) == (1, 0, 0)
    assert (prominent["iou"], prominent["empty_pairs"], prominent["images"]) == (0, 1, 3)
    write_tables(evaluation, tmp_path)
    assert [row["noticed"] for row in read_csv(tmp_path / "regions.csv")] == ["0.2", "", "0.5"]


def test_ratings_of_another_ground_truth(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Ratings of an image without a mask, and of an image that failed, are no mistake."""
    masks, gt = folders
    (gt / "z.png").write_bytes(encode_mask(np.zeros((40, 50), bool)))
    (masks / "c.png").write_bytes(b"no image")
    path = tmp_path / "rated.csv"
    for row, message in (("a,4,1", "names region 4 of a, which has 3"), ("b,1,1", "names b, an image without")):
        path.write_text(f"image,region,noticed\nz,1,1\nc,1,1\n{row}\n")
        with pytest.raises(UsageError, match=f"line 4: {message}"):
            evaluated(masks, gt, severity=SeverityLabels(read_ratings(path), path, 0.5))


def test_progress(folders: tuple[Path, Path]) -> None:
    told: list[tuple[int, int]] = []
    evaluated(*folders, on_judged=lambda *counts: told.append(counts))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "noticed.csv"


def test_reading(file: Path) -> None:
    """Columns in any order, further columns, a byte order mark, a name with a comma and one with a line break."""
    file.write_bytes(
        b'\xef\xbb\xbfnoticed,note,region,image\r\n0.25,,1,a/b\r\n,nobody,2,a/b\r\n1,,3,"c,d"\r\n0,,1,"e\nf"\r\n'
    )
    assert read_ratings(file) == {
        "a/b": {1: Rating(0.25, None, 2), 2: Rating(None, None, 3)},
        "c,d": {3: Rating(1.0, None, 4)},
        "e\nf": {1: Rating(0.0, None, 6)},
    }


def test_a_box_is_read_where_all_its_columns_are_filled(file: Path) -> None:
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
        (f"image,region,noticed\na,{'9' * 5000},0.5\n", ", line 2: has the region"),
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


def test_a_missing_file_and_one_in_another_encoding(file: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_ratings(file)
    file.write_bytes(b"image,region,noticed\n\xff,1,1\n")
    with pytest.raises(UsageError, match="is no CSV file in UTF-8"):
        read_ratings(file)


REGIONS = {"a": [MaskRegion(5, 6, 7, 8, 40, 3, None)] * 2, "failed": None}


def check(file: Path) -> None:
    severity = SeverityLabels(read_ratings(file), file, 0.5)
    severity.check_images(REGIONS)
    for image, regions in REGIONS.items():
        if regions is not None:
            severity.check(image, [region[:4] for region in regions])


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
        check(file)
    assert f"{file}{message}" in str(error.value)


def test_labels_of_this_ground_truth(file: Path) -> None:
    """The regions of an image that could not be judged are unknown, so any rating of them is accepted."""
    file.write_text("image,region,x,y,width,height,noticed\na,2,5,6,7,8,1\na,1,,,,,0\nfailed,9,1,1,1,1,1\n")
    check(file)
