"""Benchmarks on made data sets of all layouts, judged by the rules of the published scripts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from desra_core import artifact_mask, variance_similarity
from desra_core.benchmarking import plan
from desra_core.benchmarking.annotated_results import ALL, results_of
from desra_core.detection.class_weights import load_weights
from desra_core.detection.detectors import METHODS
from desra_core.errors import UsageError
from desra_core.report.pages import publish_results
from desra_core.settings.models import Benchmarking
from tests.benchmark_sets import FAST, as_coco, as_published, ground_truth, judge, make_plain, run_here, write
from tests.desra_core.evaluation import published_scripts as slow

TIMES = ("seconds_per_megapixel",)


@pytest.fixture(scope="module")
def plain(make_pairs, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, make_plain(folder, make_pairs, 4)


@pytest.fixture(scope="module")
def judged(plain, tmp_path_factory):
    return judge(plain[0], tmp_path_factory.mktemp("judged") / "out")


def table(folder: Path, part: str | None = None) -> list[dict[str, str]]:
    with (folder / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if part is None or row["part"] == part]
    return [{name: value for name, value in row.items() if name not in (*TIMES, "part")} for row in chosen]


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_a_row_has_the_numbers_of_the_published_scripts(plain, judged) -> None:
    names = plain[1]
    output = judged[0].settings.output
    truths = [ground_truth(index)[5:-5, 5:-5] > 0 for index in range(len(names))]
    rows = {row["method"]: row for row in table(output)}
    assert list(rows) == ["desra", "desra, weight 1", "ldl, 0.01", "ldl, 0.005", "ldl, 0.001"]
    for method, stem in (("desra", "desra"), ("desra, weight 1", "desra-weight-1"), ("ldl, 0.005", "ldl-0.005")):
        masks = [read(output / "masks" / stem / f"{name}.png")[5:-5, 5:-5] > 0 for name in names]
        some = [index for index in range(len(names)) if (masks[index] | truths[index]).any()]
        assert len(some) >= 2
        row = rows[method]
        assert row["iou"] == str(slow.iou([masks[index] for index in some], [truths[index] for index in some]))
        assert row["precision"] == str(slow.precision(masks, truths))
        assert row["recall"] == str(slow.recall(masks, truths))
        assert int(row["empty_pairs"]) == len(names) - len(some)
    assert rows["desra, weight 1"]["empty_pairs"] == "2"


def test_masks_are_those_of_detection(plain, judged) -> None:
    folder, names = plain
    output = judged[0].settings.output
    weights = load_weights("published").values
    for name in names:
        pair = [read(folder / role / f"{name}.png")[:, :, ::-1] for role in ("mse_sr", "gan_sr")]
        similarity = variance_similarity(*pair)
        labels = read(folder / "labels" / f"{name}.png")
        unweighted = artifact_mask(similarity, min_area=100)
        weighted = artifact_mask(similarity, min_area=100, labels=labels, weights=weights)
        assert ((read(output / "masks" / "desra-weight-1" / f"{name}.png") > 0) == unweighted).all()
        assert ((read(output / "masks" / "desra" / f"{name}.png") > 0) == weighted).all()


@pytest.mark.parametrize(("min_area", "detected"), [
    ("11000", 2), pytest.param("30000", 0, marks=pytest.mark.slow),
    pytest.param("20%", 2, marks=pytest.mark.slow), ("60%", 0),
])  # fmt: skip
def test_small_regions_do_not_count(plain, tmp_path, min_area, detected) -> None:
    """The artifacts cover 100 x 120 px and their surroundings: more than a quarter of the image."""
    judge(plain[0], tmp_path / "out", min_area=min_area, methods="desra")
    rows = {row["method"]: row for row in table(tmp_path / "out")}
    assert rows["desra, weight 1"]["detected"] == str(detected)


def test_every_layout_gives_the_same_table(plain, judged, tmp_path) -> None:
    folder, names = plain
    expected = table(judged[0].settings.output)
    as_published(folder, tmp_path / "published", names)
    judge(tmp_path / "published", tmp_path / "a")
    assert table(tmp_path / "a", ALL) == expected
    assert {row["images"] for row in table(tmp_path / "a", "LDL")} == {"2"}
    judge(tmp_path / "published" / "SwinIR", tmp_path / "alone")
    assert table(tmp_path / "alone") == table(tmp_path / "a", "SwinIR"), "a method folder alone is a data set"
    pairs = {"mse_sr": folder / "mse_sr", "gan_sr": folder / "gan_sr", "labels": folder / "labels"}
    as_coco(folder, tmp_path / "somewhere.json", names)
    judge(tmp_path / "somewhere.json", tmp_path / "b", **pairs)
    assert table(tmp_path / "b") == expected


def test_the_curve_goes_through_the_operating_point(plain, judged) -> None:
    """Each of its points is the result of another threshold; the middle threshold is the method's own."""
    folder, names = plain
    benchmark, _ = judged
    results = results_of(benchmark)
    by_point = {row.point.name: row.scores.total for row in results.rows}
    assert results.curves.keys() == {"desra", "desra, weight 1", "ldl"}
    for name, point in (("desra", "desra"), ("desra, weight 1", "desra, weight 1"), ("ldl", "ldl, 0.005")):
        curve = results.curves[name]
        assert curve[len(curve) // 2][1] == by_point[point]
    threshold, agreement = results.curves["desra, weight 1"][5]
    masks = []
    for name in names:
        pair = [read(folder / role / f"{name}.png")[:, :, ::-1] for role in ("mse_sr", "gan_sr")]
        masks.append(artifact_mask(variance_similarity(*pair), threshold=1 - threshold, min_area=100)[5:-5, 5:-5])
    truths = [ground_truth(index)[5:-5, 5:-5] > 0 for index in range(len(names))]
    assert agreement.precision == slow.precision(masks, truths)
    assert agreement.recall == slow.recall(masks, truths)


def test_agreement_with_published_masks(plain, judged, tmp_path) -> None:
    """The published masks are ours, with and without the frame; one of them differs in four pixels."""
    folder, names = plain
    shutil.copytree(folder, tmp_path / "set")
    ours = judged[0].settings.output / "masks" / "desra-weight-1"
    for index, name in enumerate(names):
        mask = read(ours / f"{name}.png")
        if index == 1:
            mask[100, 100:104] = 255 - mask[100, 100:104]
        write(tmp_path / "set" / "DeSRA Masks" / f"{name}.png", mask if index % 2 else mask[5:-5, 5:-5])
    benchmark, published = judge(tmp_path / "set", tmp_path / "out")
    rows = {row.entry: row for row in results_of(benchmark).published}
    assert list(rows) == ["desra", "desra, weight 1"]
    row = rows["desra, weight 1"]
    area = int((read(ours / f"{names[1]}.png") > 0).sum())
    assert (row.images, row.same) == (4, 3)
    assert row.equal == 1 - 4 / (4 * 190 * 230)
    assert row.iou == pytest.approx((3 + (area - 4) / area) / 4)
    assert "3 of 4" in published.markdown
    assert "Agreement" not in judged[1].markdown


def test_only_what_is_new_is_computed(plain, tmp_path) -> None:
    folder, names = plain
    shutil.copytree(folder, tmp_path / "set")
    output = tmp_path / "out"
    settings = Benchmarking(dataset=tmp_path / "set", output=output, methods=FAST, min_area="100")
    assert sorted(run_here(plan(settings))) == sorted(names)
    publish_results(plan(settings))
    before = table(output)
    assert run_here(plan(settings)) == []

    (output / "records" / f"{names[2]}.json").unlink()
    (output / "masks" / "desra" / f"{names[1]}.png").unlink()
    (output / "records" / f"{names[3]}.json").write_text('{"part": ""')
    lacking = {work.name: work.missing for _, work in plan(settings).missing()}
    assert lacking == {names[2]: ("desra", "desra, weight 1", "ldl"), names[1]: ("desra",),
                       names[3]: ("desra", "desra, weight 1", "ldl")}  # fmt: skip
    run_here(plan(settings))
    publish_results(plan(settings))
    assert table(output) == before

    more = settings.model_copy(update={"methods": f"{FAST},ssim"})
    assert {work.missing for _, work in plan(more).missing()} == {("ssim",)}
    run_here(plan(more))
    assert run_here(plan(more)) == run_here(plan(settings)) == []

    write(tmp_path / "set" / "gt_mask" / f"{names[0]}.png", ground_truth(1))
    assert run_here(plan(settings)) == [names[0]]
    write(tmp_path / "set" / "labels" / f"{names[0]}.png", np.full((200, 240), 7, np.uint8))
    assert {work.missing for _, work in plan(settings).missing()} == {("desra",)}
    other = settings.model_copy(update={"min_area": "200"})
    assert len(plan(other).missing()) == 4


def test_parts_may_have_the_same_names(plain, tmp_path) -> None:
    """Parts with the same images stay apart; JPEG masks are read and reported."""
    folder, names = plain
    for part in ("LDL", "SwinIR"):
        shutil.copytree(folder, tmp_path / "set" / part)
    jpeg = tmp_path / "set" / "LDL" / "gt_mask" / f"{names[1]}.jpg"
    jpeg.with_suffix(".png").unlink()
    write(jpeg, ground_truth(1))
    benchmark, published = judge(tmp_path / "set", tmp_path / "out")
    assert len({image.id for image, _ in benchmark.work}) == published.judged == 8
    assert benchmark.lossy == [jpeg]
    ours = table(tmp_path / "out", "LDL")
    assert [row["marked"] for row in ours] == [row["marked"] for row in table(tmp_path / "out", "SwinIR")]


def test_failures_are_reported_and_the_others_go_on(plain, tmp_path) -> None:
    folder, names = plain
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    write(root / "gt_mask" / f"{names[1]}.png", np.zeros((100, 100), np.uint8))
    (root / "mse_sr" / f"{names[2]}.png").unlink()
    write(root / "gt_mask" / "set0" / "stray.png", ground_truth(1))
    (root / "gt_mask" / f"{names[3]}.png").unlink()
    benchmark, published = judge(root, tmp_path / "out")
    assert published.judged == 1
    assert [path.name for path in benchmark.unjudged] == [Path(names[3]).name + ".png"]
    told = "\n".join(map(str, published.failures))
    assert len(published.failures) == 3
    assert "is 100x100 but its image is 240x200" in told
    assert "has no image of its name in" in told
    assert "stray.png" in told
    assert json.loads((tmp_path / "out" / "benchmark.json").read_bytes())["failures"][0]["file"]
    # What failed for good is not tried again, until its files change.
    assert benchmark.missing() == []
    write(root / "gt_mask" / f"{names[1]}.png", ground_truth(1))
    assert run_here(plan(benchmark.settings)) == [names[1]]
    assert publish_results(plan(benchmark.settings)).judged == 2


def test_a_detector_in_a_file(plain, tmp_path) -> None:
    folder, names = plain
    path = tmp_path / "grain.py"
    path.write_text(
        "import numpy as np\n"
        "class Grain:\n"
        "    threshold, smallest, inputs = 20.0, 11, ('lr',)\n"
        "    def __call__(self, mse_sr, gan_sr, lr, labels):\n"
        "        assert labels is None and lr.shape == (50, 60, 3)\n"
        "        return np.abs(gan_sr.astype(float) - mse_sr).mean(axis=2)\n"
        "detector = Grain()\n"
    )
    judge(folder, tmp_path / "out", methods=f"desra,{path}")
    row = {row["method"]: row for row in table(tmp_path / "out")}["grain"]
    assert (row["images"], row["threshold"]) == ("4", "20.0")
    assert (tmp_path / "out" / "masks" / "grain" / f"{names[1]}.png").exists()

    path.write_text("class Broken:\n    threshold, smallest, inputs = 1.0, 11, ()\n    def __call__(self, *_):\n"
                    "        return 1 / 0\ndetector = Broken()\n")  # fmt: skip
    benchmark, published = judge(folder, tmp_path / "out", methods=f"desra,{path}")
    assert published.judged == 0
    assert "makes grain fail (ZeroDivisionError: division by zero)" in str(published.failures[0])
    without = plan(benchmark.settings.model_copy(update={"methods": "desra"}))
    assert without.missing() == []
    assert publish_results(without).judged == 4


def test_labels_are_computed_where_there_are_none(plain, judged, tmp_path, monkeypatch) -> None:
    """The model of this test looks the labels up."""
    folder, names = plain
    for role in ("mse_sr", "gan_sr", "gt_mask"):
        shutil.copytree(folder / role, tmp_path / "set" / role)
    pictures = {read(folder / "gan_sr" / f"{name}.png").tobytes(): name for name in names}
    spec = f"mmseg:{tmp_path / 'a'},{tmp_path / 'b'}"

    def load(asked: str, device: str):
        assert (asked, device) == (spec, "cpu")
        return lambda gan_sr: read(folder / "labels" / f"{pictures[gan_sr[:, :, ::-1].tobytes()]}.png")

    monkeypatch.setattr("desra_core.benchmarking.benchmark.load_segmenter", load)
    monkeypatch.setattr("desra_core.benchmarking.benchmark.segmenter_key", lambda asked: f"key of {asked}")
    benchmark, published = judge(tmp_path / "set", tmp_path / "out", segmenter=spec)
    assert benchmark.runs_networks
    assert table(tmp_path / "out") == table(judged[0].settings.output)
    assert "class labels take" in published.text
    assert "class labels take" not in judged[1].text
    monkeypatch.setattr("desra_core.benchmarking.benchmark.segmenter_key", lambda asked: "another")
    assert {work.missing for _, work in plan(benchmark.settings).missing()} == {("desra",)}


def test_results_of_a_lost_input_no_longer_count(plain, tmp_path) -> None:
    folder, names = plain
    root = tmp_path / "set"
    as_published(folder, root, names)
    judge(root, tmp_path / "out")
    page = (tmp_path / "out" / "benchmark.html").read_text()
    assert {row["images"] for row in table(tmp_path / "out", ALL)} == {"4"}
    shutil.rmtree(root / "LDL" / "labels")
    _, published = judge(root, tmp_path / "out")
    rows = {row["method"]: row["images"] for row in table(tmp_path / "out", ALL)}
    assert (rows["desra"], rows["ldl, 0.01"]) == ("2", "4")
    assert "desra" not in {row["method"] for row in table(tmp_path / "out", "LDL")}
    assert (tmp_path / "out" / "benchmark.html").read_text() != page
    assert published.judged == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"methods": "desra,wrong"}, "wrong: is no method"),
        ({"methods": "ldl,ldl"}, "has two methods called ldl-0.01"),
        ({"labels": "labels", "segmenter": "mmseg:a,b"}, "--labels: and --segmenter are both given"),
        ({"weights": "nothing.csv"}, "class weights cannot be read"),
        ({"mse_sr": "nowhere"}, "is no folder"),
    ],
)
def test_settings_are_refused(plain, settings, told) -> None:
    given = {name: plain[0] / value if name in ("labels", "mse_sr") else value for name, value in settings.items()}
    with pytest.raises(UsageError, match=told):
        plan(Benchmarking(dataset=plain[0], output=plain[0].parent / "out", **given))


def test_weights_need_labels_and_methods_their_inputs(plain, tmp_path) -> None:
    folder = plain[0]
    for role in ("mse_sr", "gan_sr", "gt_mask"):
        shutil.copytree(folder / role, tmp_path / "set" / role)
    settings = Benchmarking(dataset=tmp_path / "set", output=tmp_path / "out")
    assert [method.name for method in plan(settings).methods] == ["desra, weight 1", *list(METHODS)[1:]]
    with pytest.raises(UsageError, match="--weights: published needs class labels"):
        plan(settings.model_copy(update={"weights": "published"}))
    path = tmp_path / "needy.py"
    path.write_text("class Needy:\n    threshold, smallest, inputs = 1.0, 11, ('lr',)\n    def __call__(self, *_):\n"
                    "        raise AssertionError\ndetector = Needy()\n")  # fmt: skip
    with pytest.raises(UsageError, match="--methods: needy needs LR photos"):
        plan(settings.model_copy(update={"methods": str(path)}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_published_numbers_of_the_shared_pairs(shared_data, tmp_path) -> None:
    """The numbers of the authors' scripts for masks of weight 1, and the masks of their detection by class."""
    pairs, root = shared_data / "pairs", tmp_path / "set"
    root.mkdir()
    for role in ("mse_sr", "gan_sr", "gt_mask", "labels"):
        (root / role).symlink_to(pairs / role)
    (root / "DeSRA-Mask").symlink_to(pairs / "reference_mask" / "semantic_t0.7_a400")
    benchmark, _ = judge(root, tmp_path / "out", methods="desra", min_area="400")
    (row,) = [row for row in table(tmp_path / "out") if row["method"] == "desra, weight 1"]
    expected = json.loads((pairs / "metrics.json").read_bytes())["published_scripts"]
    assert {name: float(row[name]) for name in expected} == expected
    (same,) = [row for row in results_of(benchmark).published if row.entry == "desra"]
    assert same[2:] == (8, 8, 1.0, 1.0)
