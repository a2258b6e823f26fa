"""The scores of later papers in benchmarks: curves, regions found, ratings, references and ranks; slowly once more."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import average_precision_score

from desra_core.benchmarking import plan
from desra_core.benchmarking.annotated_results import RANKED, mean_ranks, results_of
from desra_core.detection.detectors import load_detector
from desra_core.errors import UsageError
from desra_core.settings.models import Benchmarking
from tests.benchmark_sets import ground_truth, judge, make_plain, run_here, write
from tests.desra_core.evaluation.published_scripts import components

Rows = dict[tuple[str, str], dict[str, Any]]
RATINGS = {("1", 1): 0.9, ("1", 2): 0.2, ("2", 1): 0.4, ("2", 2): 0.7}


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.fixture(scope="module")
def rated(make_pairs: Callable[[Path, int], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A data set with ratings of the four regions, and with other references: the MSE results shifted, and blurred."""
    folder = tmp_path_factory.mktemp("rated")
    names = make_plain(folder, make_pairs, 4)
    lines = [f"{names[int(index)]},{region},{share}" for (index, region), share in RATINGS.items()]
    (folder / "ratings.csv").write_text("\n".join(["image,region,noticed", *lines]))
    for name in names:
        mse_sr = read(folder / "mse_sr" / f"{name}.png")
        write(folder / "shifted" / f"{name}.png", np.roll(mse_sr, 3, axis=1))
        write(folder / "blurred" / f"{name}.png", cv2.GaussianBlur(mse_sr, (0, 0), 4))
    return folder, names


def rows_of(output: Path) -> Rows:
    document = json.loads((output / "benchmark.json").read_bytes())
    return {(row["method"], row["reference"]["name"]): row for row in document["table"]}


def slow_scores(folder: Path, names: list[str], method: str, reference: str = "mse_sr") -> list[np.ndarray]:
    """The method's scores on the valid region of each image."""
    detector, maps = load_detector(method), []
    for name in names:
        twin, gan_sr = (read(folder / role / f"{name}.png")[:, :, ::-1] for role in (reference, "gan_sr"))
        scores = np.asarray(detector(twin, gan_sr, None, None))
        frame = (gan_sr.shape[0] - scores.shape[0]) // 2
        maps.append(scores[5 - frame :, 5 - frame :][: gan_sr.shape[0] - 10, : gan_sr.shape[1] - 10])
    return maps


def test_every_number_of_a_row(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """With ratings, an overlap of 0.3 and a dilation of 2 px; pixel by pixel and region by region."""
    folder, names = rated
    output = tmp_path / "out"
    judge(folder, output, methods="desra,ldl,ssim", severity=folder / "ratings.csv", kappa=0.3, dilate=2)
    truths = [ground_truth(index)[5:-5, 5:-5] > 0 for index in range(len(names))]
    regions = [components(truth) for truth in truths]
    prominent = [[RATINGS.get((str(index), number), 0) >= 0.5 for number in range(1, len(found) + 1)]
                 for index, found in enumerate(regions)]  # fmt: skip
    ignored = [np.any([np.zeros_like(truth), *(r for r, flag in zip(found, flags, strict=True) if not flag)], axis=0)
               for truth, found, flags in zip(truths, regions, prominent, strict=True)]  # fmt: skip
    rows = rows_of(output)
    for entry, method, stem in (("desra, weight 1", "desra", "desra-weight-1"), ("ldl, 0.005", "ldl", "ldl-0.005"),
                                ("ssim", "ssim", "ssim")):  # fmt: skip
        row = rows[entry, "MSE-SR"]
        masks = [read(output / "masks" / stem / f"{name}.png")[5:-5, 5:-5] > 0 for name in names]
        maps = slow_scores(folder, names, method)
        wide = [ndimage.binary_dilation(mask, np.ones((5, 5))) for mask in masks]
        found = [
            [(region & mask).sum() / region.sum() >= 0.3 for region in of]
            for of, mask in zip(regions, wide, strict=True)
        ]
        assert row["found_at_kappa"] == sum(map(sum, found))
        assert row["flagged_share"] == np.mean(masks)
        exact = average_precision_score(np.ravel(truths), np.ravel(maps))
        assert abs(row["pr_auc"] - exact) <= row["pr_auc_error"] < 0.01
        pairs = [
            (maps[int(index)][regions[int(index)][number - 1]].mean(), share)
            for (index, number), share in RATINGS.items()
        ]
        assert row["rank_correlation"] == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic)
        assert row["rated_regions"] == 4
        left = ~np.array(ignored)
        chosen = np.array(truths) & left
        exact = average_precision_score(chosen[left], np.array(maps)[left])
        assert abs(row["prominent_pr_auc"] - exact) <= row["prominent_pr_auc_error"] < 0.01
        scores = row["prominent"]
        kept = np.array(masks) & left
        assert scores["pixel_f1"] == pytest.approx(2 * (kept & chosen).sum() / (kept.sum() + chosen.sum()))
        assert scores["flagged_share"] == pytest.approx(kept.sum() / left.sum())
        assert (scores["marked"], scores["found_at_kappa"]) == (
            sum(map(sum, prominent)),
            sum(sum(np.array(one) & two) for one, two in zip(found, prominent, strict=True) if one),
        )
    with (output / "benchmark.csv").open() as file:
        lines = {row["method"]: row for row in csv.DictReader(file)}
    assert float(lines["ssim"]["prominent_pixel_f1"]) == rows["ssim", "MSE-SR"]["prominent"]["pixel_f1"]
    assert float(lines["ssim"]["pr_auc"]) == rows["ssim", "MSE-SR"]["pr_auc"]
    told = (output / "benchmark.md").read_text()
    assert "Found: regions with at least 30 % in the mask, widened by 2 px." in told
    assert "## Prominent regions" in told
    assert "rank correlation" in told


def test_a_map_with_a_wider_frame_than_the_masks(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Pixels without a score are flagged last; whole numbers are scores, too."""
    folder, names = rated
    path = tmp_path / "inner.py"
    path.write_text(
        "import numpy as np\n"
        "class Inner:\n"
        "    threshold, smallest, inputs = 20, 41, ()\n"
        "    def __call__(self, mse_sr, gan_sr, lr, labels):\n"
        "        return np.abs(gan_sr.astype(int) - mse_sr).max(axis=2)[20:-20, 20:-20]\n"
        "detector = Inner()\n"
    )
    judge(folder, tmp_path / "out", methods=str(path))
    row = rows_of(tmp_path / "out")["inner", "MSE-SR"]
    truths, maps = [], []
    for index, name in enumerate(names):
        twin, gan_sr = (read(folder / role / f"{name}.png").astype(int) for role in ("mse_sr", "gan_sr"))
        scores = np.full((190, 230), -1)
        scores[15:-15, 15:-15] = np.abs(gan_sr - twin).max(axis=2)[20:-20, 20:-20]
        maps.append(scores)
        truths.append(ground_truth(index)[5:-5, 5:-5] > 0)
    assert row["pr_auc"] == pytest.approx(average_precision_score(np.ravel(truths), np.ravel(maps)))
    assert row["pr_auc_error"] == 0


def test_rows_are_methods_by_references(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """NIQE looks at the GAN result alone, so it says the same under every reference; others do not."""
    folder, names = rated
    given = tuple(f"{name}={folder / name}" for name in ("shifted", "blurred"))
    benchmark, published = judge(folder, tmp_path / "out", methods="desra,ldl,niqe", reference=given)
    rows = rows_of(tmp_path / "out")
    entries = ["desra", "desra, weight 1", "ldl, 0.01", "ldl, 0.005", "ldl, 0.001", "niqe"]
    references = ["MSE-SR", "shifted", "blurred"]
    assert list(rows) == [(entry, reference) for reference in references for entry in entries]
    assert len({row["reference"]["hash"] for row in rows.values()}) == 3
    apart = ("reference", "seconds_per_megapixel", "mean_rank")
    niqe, ldl, desra = (
        [{key: value for key, value in rows[entry, reference].items() if key not in apart} for reference in references]
        for entry in ("niqe", "ldl, 0.005", "desra, weight 1")
    )
    assert niqe[0] == niqe[1] == niqe[2]
    assert niqe[0]["pr_auc"] is not None
    for scores in (ldl, desra):
        assert len({row["pr_auc"] for row in scores}) == 3
    for reference in references:
        maps = slow_scores(folder, names, "ldl", "mse_sr" if reference == "MSE-SR" else reference)
        truths = [ground_truth(index)[5:-5, 5:-5] > 0 for index in range(len(names))]
        row = rows["ldl, 0.005", reference]
        exact = average_precision_score(np.ravel(truths), np.ravel(maps))
        assert abs(row["pr_auc"] - exact) <= row["pr_auc_error"] < 0.01
    # A judgement without references is the same.
    judge(folder, tmp_path / "alone", methods="desra,ldl,niqe")
    for (entry, _), row in rows_of(tmp_path / "alone").items():
        assert row | {"seconds_per_megapixel": 0} == rows[entry, "MSE-SR"] | {"seconds_per_megapixel": 0}
    assert "Mean rank over all references" in published.markdown
    ranks = {entry: np.mean([rows[entry, reference]["mean_rank"] for reference in references]) for entry in entries}
    document = json.loads((tmp_path / "out" / "benchmark.json").read_bytes())
    assert document["mean_ranks"] == pytest.approx(ranks)
    # Another content of a reference concerns its rows alone.
    shutil.copytree(folder / "blurred", tmp_path / "other")
    write(tmp_path / "other" / f"{names[0]}.png", read(folder / "mse_sr" / f"{names[0]}.png"))
    again = benchmark.settings.model_copy(update={"reference": (given[0], f"blurred={tmp_path / 'other'}")})
    missing = {job.name: job.missing for _, job in plan(again).missing()}
    assert list(missing) == [names[0]]
    assert all(name.endswith(" against blurred") for name in missing[names[0]])
    assert len(missing[names[0]]) == 4


def test_references_that_cannot_be_used(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = rated
    for given, told in (
        ("blurred", "is no NAME=FOLDER"),
        ("a b=x", "is no NAME=FOLDER"),
        ("MSE-SR=x", "the name MSE-SR"),
    ):
        with pytest.raises(ValueError, match=told):
            Benchmarking(dataset=folder, output=tmp_path / "out", reference=(given,))
    with pytest.raises(ValueError, match="the name x twice"):
        Benchmarking(dataset=folder, output=tmp_path / "out", reference=("x=a", "x=b"))
    with pytest.raises(UsageError, match="nowhere: is no folder"):
        plan(Benchmarking(dataset=folder, output=tmp_path / "out", reference=(f"x={folder / 'nowhere'}",)))
    shutil.copytree(folder / "blurred", tmp_path / "some")
    (tmp_path / "some" / f"{names[0]}.png").unlink()
    write(tmp_path / "some" / f"{names[1]}.png", np.zeros((50, 60, 3), np.uint8))
    _, published = judge(folder, tmp_path / "out", methods="ldl", reference=(f"some={tmp_path / 'some'}",))
    assert published.judged == 2
    told = "\n".join(map(str, published.failures))
    assert f"has no image of its name in {tmp_path / 'some'}" in told
    assert "and its some are 240x200 and 60x50; give results of one size" in told


def test_ratings_that_do_not_fit(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """An image that is not there ends the command; a region that is not there fails its image, until it is mended."""
    folder, names = rated
    path = tmp_path / "ratings.csv"
    asked = {"methods": "ldl", "severity": path}
    path.write_text(f"image,region,noticed\n{names[1]},1,1\nnobody,1,1\n")
    with pytest.raises(UsageError, match=r"ratings\.csv, line 3: names nobody, an image without ground truth"):
        plan(Benchmarking(dataset=folder, output=tmp_path / "out", **asked))
    path.write_text(f"image,region,noticed\n{names[1]},1,1\n{names[2]},3,1\n")
    _, published = judge(folder, tmp_path / "out", **asked)
    assert [str(error) for error in published.failures] == [
        f"{path}, line 3: names region 3 of {names[2]}, which has 2; fill in the column noticed of the regions.csv "
        "that desra evaluate --output writes"
    ]
    path.write_text(f"image,region,noticed\n{names[1]},1,1\n{names[2]},2,1\n")
    settings = Benchmarking(dataset=folder, output=tmp_path / "out", min_area="100", **asked)
    assert run_here(plan(settings)) == [names[2]]


def test_ranks() -> None:
    """The mean over the measures that some row has; a row without a value is last."""
    rng = np.random.default_rng(0)
    rows = [{name: None if rng.random() < 0.2 else float(rng.integers(0, 4)) for name in RANKED} for _ in range(6)]
    for row in rows:
        row["rank_correlation"] = None
    expected = np.zeros(6)
    for name in set(RANKED) - {"rank_correlation"}:
        worse = 1 if name == "flagged_share" else -1
        expected += rankdata([np.inf if row[name] is None else worse * row[name] for row in rows])
    assert mean_ranks(rows) == pytest.approx(expected / 5)
    assert mean_ranks([dict.fromkeys(RANKED)] * 2) == [0, 0]


def test_the_sensitivity_of_the_ranking(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """At another overlap or dilation it is the ranking of a benchmark with that; at the own ones that of the table."""
    folder = tmp_path / "set"
    shutil.copytree(rated[0], folder)
    for name in rated[1][1:3]:  # the masks cover these regions in part
        truth = np.zeros((200, 240), np.uint8)
        for index in range(6):
            truth[20 + 25 * index : 40 + 25 * index, 15 + 6 * index : 75] = 255
        write(folder / "gt_mask" / f"{name}.png", truth)
    benchmark, _ = judge(folder, tmp_path / "out", methods="desra,ldl,ssim", kappa=0.5)
    results = results_of(benchmark)
    ranks = {row.entry: row.rank for row in results.rows}
    overlap, dilation, threshold = results.sensitivity.values()
    assert {entry: dict(points)[0.5] for entry, points in overlap.items()} == pytest.approx(ranks)
    assert {entry: dict(points)[0] for entry, points in dilation.items()} == pytest.approx(ranks)
    for name, curves, value in (("kappa", overlap, 0.6), ("dilate", dilation, 8)):
        other, _ = judge(folder, tmp_path / name, methods="desra,ldl,ssim", **{name: value})
        expected = {row.entry: row.rank for row in results_of(other).rows}
        assert expected != ranks
        assert {entry: dict(points)[value] for entry, points in curves.items()} == pytest.approx(expected)
    other, _ = judge(folder, tmp_path / "own", methods="ldl", kappa=0.45, dilate=3)
    overlap, dilation, _ = results_of(other).sensitivity.values()
    assert 0.45 in dict(overlap["ldl, 0.005"])
    assert 3 in dict(dilation["ldl, 0.005"])
    factors = [factor for factor, _ in threshold["ssim"]]
    assert len(factors) == 15
    assert factors[7] == 1
    row = next(row for row in results.rows if row.entry == "ssim")
    assert list(threshold) == ["desra", "desra, weight 1", "ldl, 0.005", "ssim"]
    assert row.method.thresholds[7] == row.point.threshold


def test_a_damaged_histogram(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = rated
    benchmark, _ = judge(folder, tmp_path / "out", methods="ldl")
    path = tmp_path / "out" / "histograms" / "ldl" / f"{names[0]}.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"is damaged; delete it, and run desra benchmark again"):
        results_of(benchmark)
    path.unlink()
    assert run_here(plan(benchmark.settings)) == [names[0]]


def masks_in_a_table(folder: Path, names: list[str], *, framed: bool = True) -> Path:
    """The ground truth of `ground_truth` as a mask per region, with other names of columns; one image has none."""
    lines = ["picture;x,share,file"]
    for index, name in enumerate(names):
        for number, region in enumerate(components(ground_truth(index) > 0), 1):
            write(folder / "parts" / f"{index}-{number}.png", (region if framed else region[5:-5, 5:-5]) * 255)
            share = RATINGS.get((str(index), number), "")
            lines.append(f"results/{name}.png,{share},parts/{index}-{number}.png")
    (folder / "masks.csv").write_text("\n".join(lines))
    return folder / "masks.csv"


@pytest.mark.parametrize("framed", [True, False])
def test_a_table_of_masks_is_a_ground_truth_with_ratings(rated: tuple[Path, list[str]], tmp_path: Path, framed) -> None:
    """The same numbers as with a folder of masks and a file of ratings, of the images that have a mask."""
    folder, names = rated
    path = masks_in_a_table(tmp_path, names, framed=framed)
    pairs = {"mse_sr": folder / "mse_sr", "gan_sr": folder / "gan_sr"}
    columns = {"image_column": "picture;x", "mask_column": "file", "prominence_column": "share"}
    benchmark, _ = judge(path, tmp_path / "table", methods="ldl", **pairs, **columns)
    assert sorted(job.name for _, job in benchmark.work) == sorted(names[1:3])
    assert len(benchmark.unjudged) == 2
    for name in names[1:3]:
        for role in ("mse_sr", "gan_sr", "gt_mask"):
            (tmp_path / "some" / role / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / role / f"{name}.png", tmp_path / "some" / role / f"{name}.png")
    judge(tmp_path / "some", tmp_path / "folders", methods="ldl", severity=folder / "ratings.csv")
    rows, expected = rows_of(tmp_path / "table"), rows_of(tmp_path / "folders")
    apart = {"seconds_per_megapixel": 0}
    assert {key: row | apart for key, row in rows.items()} == {key: row | apart for key, row in expected.items()}
    assert rows["ldl, 0.01", "MSE-SR"]["rated_regions"] == 4


def test_a_region_has_the_share_of_its_largest_mask(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Masks that touch are one region."""
    folder, names = rated
    masks = np.zeros((3, 200, 240), np.uint8)
    masks[0, 50:60, 50:60] = masks[1, 60:90, 50:60] = masks[2, 100:120, 100:120] = 255
    for index, mask in enumerate(masks):
        write(tmp_path / f"{index}.png", mask)
    rows = "\n".join(f"{names[1]},{index}.png,{share}" for index, share in enumerate((0.9, 0.3, "")))
    (tmp_path / "masks.csv").write_text(f"image,mask,prominence\n{rows}\n")
    pairs = {"mse_sr": folder / "mse_sr", "gan_sr": folder / "gan_sr"}
    settings = Benchmarking(dataset=tmp_path / "masks.csv", output=tmp_path / "out", methods="ldl", **pairs)
    ((_, job),) = plan(settings).work
    assert {number: rating.noticed for number, rating in job.severity.ratings[names[1]].items()} == {1: 0.3, 2: None}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("image,mask\n", "has no column prominence"),
        ("image,mask,prominence\nx,,1\n", "line 2: has no mask"),
        ("image,mask,prominence\nx,a.png,7\n", "line 2: has the share '7'"),
        ("image,mask,prominence\nx,a.png\n", "line 2: has more or fewer cells"),
        ("\xff\xfe", "is no CSV file in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(rated: tuple[Path, list[str]], tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "masks.csv").write_bytes(content.encode("latin-1"))
    pairs = {"mse_sr": rated[0] / "mse_sr", "gan_sr": rated[0] / "gan_sr"}
    with pytest.raises(UsageError, match=told):
        plan(Benchmarking(dataset=tmp_path / "masks.csv", output=tmp_path / "out", **pairs))


def test_masks_of_a_table_that_cannot_be_used(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """They fail their image alone; two sources of ratings are one too many."""
    folder, names = rated
    write(tmp_path / "good.png", ground_truth(1))
    write(tmp_path / "small.png", np.zeros((9, 9), np.uint8))
    rows = [f"{names[1]},good.png,1", f"{names[2]},small.png,1", f"{names[3]},gone.png,1", "nobody,good.png,1"]
    (tmp_path / "masks.csv").write_text("\n".join(["image,mask,prominence", *rows]))
    asked: dict[str, Any] = {"mse_sr": folder / "mse_sr", "gan_sr": folder / "gan_sr", "methods": "ldl"}
    benchmark, published = judge(tmp_path / "masks.csv", tmp_path / "out", **asked)
    assert [job.name for _, job in benchmark.work] == [names[1]]
    told = "\n".join(map(str, published.failures))
    assert "small.png: is 9x9" in told
    assert "gone.png: " in told
    assert "masks.csv: nobody: has no image of its name in" in told
    with pytest.raises(UsageError, match="--severity: is given beside the shares in"):
        plan(benchmark.settings.model_copy(update={"severity": folder / "ratings.csv"}))


def tagged(folder: Path, plain: Path, names: list[str]) -> None:
    """A folder of NAME@LR@, NAME@RF@ and NAME@SR@, with heat maps and files that do not count."""
    for index, name in enumerate(names):
        for role, tag in (("lr", "LR"), ("mse_sr", "RF"), ("gan_sr", "SR")):
            target = folder / f"{name}@{tag}@.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(plain / role / f"{name}.png", target)
        noise = np.random.default_rng(index).random(ground_truth(0).shape)
        np.save(folder / "map.npy", (ground_truth(index) / 255 + noise).astype(np.float32) / 2)
        (folder / f"{name}@SR@.npy.gz").write_bytes(gzip.compress((folder / "map.npy").read_bytes()))
    write(folder / "readme.png", ground_truth(1))


def test_files_whose_names_tell_their_role(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The same numbers as with folders; heat maps are a method of their own, once for all references."""
    folder, names = rated
    tagged(tmp_path / "set", folder, names)
    shutil.copytree(folder / "gt_mask", tmp_path / "set" / "GT-Mask")
    given = (f"blurred={folder / 'blurred'}",)
    judge(tmp_path / "set", tmp_path / "tagged", methods="ldl", reference=given)
    judge(folder, tmp_path / "folders", methods="ldl", reference=given)
    rows, expected = rows_of(tmp_path / "tagged"), rows_of(tmp_path / "folders")
    apart = {"seconds_per_megapixel": 0, "mean_rank": 0}
    heat = rows.pop(("heat map SR", "MSE-SR"))
    assert {key: row | apart for key, row in rows.items()} == {key: row | apart for key, row in expected.items()}
    truths, maps = [], []
    for index in range(len(names)):
        noise = np.random.default_rng(index).random(ground_truth(0).shape)
        maps.append(((ground_truth(index) / 255 + noise).astype(np.float32) / 2)[5:-5, 5:-5])
        truths.append(ground_truth(index)[5:-5, 5:-5] > 0)
    exact = average_precision_score(np.ravel(truths), np.ravel(maps))
    assert abs(heat["pr_auc"] - exact) <= heat["pr_auc_error"] < 0.01
    assert (heat["threshold"], heat["images"]) == (0.5, 4)


def test_a_table_of_masks_beside_such_files(rated: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = rated
    tagged(tmp_path / "set", folder, names)
    masks_in_a_table(tmp_path / "set", names)
    path = tmp_path / "set" / "masks.csv"
    path.write_text(path.read_text().replace("picture;x,share,file", "image,prominence,mask").replace("results/", ""))
    (tmp_path / "set" / f"{names[2]}@SR@.npy.gz").write_bytes(b"damaged")
    benchmark, published = judge(path, tmp_path / "out", methods="ldl")
    assert [method.name for method in benchmark.methods] == ["ldl", "heat map SR"]
    assert published.judged == 1
    (error,) = published.failures
    assert "@SR@.npy.gz: is no array of NumPy, or is damaged; save it with numpy.save" in str(error)
    (tmp_path / "set" / f"{names[1]}@RF@.png").unlink()
    _, published = judge(path, tmp_path / "out", methods="ldl")
    assert "has no image of its name in" in str(published.failures[0])
