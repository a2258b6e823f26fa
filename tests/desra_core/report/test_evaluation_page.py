"""The page of an evaluation: what it shows, in what colours, and that it stands alone."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from desra_core.evaluation.evaluation import Evaluation, Rating, SeverityLabels, evaluate_masks
from desra_core.evaluation.mask_files import MaskPair, pair_folders
from desra_core.evaluation.metrics import compare_pair
from desra_core.images.codec import encode_mask, encode_png
from desra_core.report.pages import agreement_picture, gan_sr_of, worst_images, write_evaluation_page
from desra_core.report.pictures import AGREEMENT_SIDE, FALSE, MISSED, RIGHT
from tests.browser import Page
from tests.desra_core.report.pages import stands_alone


def put(folder: Path, name: str, *corners: tuple[int, int], shape: tuple[int, int] = (60, 90)) -> Path:
    """A mask with squares of 10 px."""
    mask = np.zeros(shape, bool)
    for top, left in corners:
        mask[top : top + 10, left : left + 10] = True
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mask(mask))
    return path


def pair(folder: Path, name: str, detected: list[tuple[int, int]], marked: list[tuple[int, int]]) -> MaskPair:
    return MaskPair(name, put(folder / "masks", name, *detected), put(folder / "gt", name, *marked))


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    pair(tmp_path, "half right", [(10, 10), (10, 40)], [(10, 10), (40, 40)])
    pair(tmp_path, "<b>all wrong</b>", [(10, 10)], [(40, 40)])
    pair(tmp_path, "empty", [], [])
    put(tmp_path / "masks", "alone")
    put(tmp_path / "gt", "other size", shape=(30, 30))
    put(tmp_path / "masks", "other size", shape=(31, 31))
    for name, folder in (("half right", "gan_sr"), ("half right", "labels")):
        (tmp_path / folder).mkdir(exist_ok=True)
        pixels = np.full((60, 90, 3), 200, np.uint8) if folder == "gan_sr" else np.full((60, 90), 4, np.uint8)
        (tmp_path / folder / f"{name}.png").write_bytes(encode_png(pixels))
    pairing = pair_folders(tmp_path / "masks", tmp_path / "gt", labels=tmp_path / "labels", gan_sr=tmp_path / "gan_sr")
    ratings = {"half right": {1: Rating(0.9, None, 2), 2: Rating(0.1, None, 3)}}
    return evaluate_masks(pairing, severity=SeverityLabels(ratings, tmp_path / "noticed.csv", 0.5))


def written(evaluation: Evaluation, folder: Path) -> str:
    return write_evaluation_page(evaluation, folder / "evaluation.html").read_text("utf-8")


def test_the_page_shows_scores_failures_and_names_as_text(evaluation: Evaluation, tmp_path: Path) -> None:
    page = written(evaluation, tmp_path)
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "3 images judged, 1 failed" in text
    assert "precision: 1 of 3 detected regions right 0.3333 0.000–0.500" in text
    assert "recall: 1 of 3 ground-truth regions found 0.3333 0.000–0.500" in text
    assert "IoU: with 1 pair of empty masks, as agreement 0.4444" in text
    assert "is 31x31 but" in text
    assert "alone.png" in text
    assert "Of 2 rated regions, those that at least 50 % of the viewers noticed." in text
    assert "recall: 1 of 1 ground-truth region found 1.0000" in text
    assert "2 images without class labels are left out by class" in text
    assert "tree" in text
    assert re.search('aria-label="Recall by class".*tree \\(2\\)', page, re.DOTALL)
    assert "nan" not in text.lower()
    assert "&lt;b&gt;all wrong&lt;/b&gt;" in page
    assert "<b>all wrong" not in page


def test_the_same_bytes_again_and_no_request(evaluation: Evaluation, tmp_path: Path) -> None:
    page = written(evaluation, tmp_path)
    assert written(evaluation, tmp_path) == page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)


def decoded(page: str, alt: str) -> np.ndarray:
    uri = re.search(rf'<img src="data:image/webp;base64,([^"]+)"[^>]*alt="{alt}"', page)
    assert uri is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[1]))))


def test_the_pictures(evaluation: Evaluation, tmp_path: Path) -> None:
    page = written(evaluation, tmp_path)
    assert decoded(page, "GAN-SR of half right").shape == (60, 90, 3)
    drawn = decoded(page, "mask against ground truth of half right").astype(int)
    gray = 150  # three quarters of the GAN result
    for (row, column), colour in (((15, 15), RIGHT), ((15, 45), FALSE), ((45, 45), MISSED), ((30, 30), (gray,) * 3)):
        expected = np.array(colour) if colour[0] == colour[1] else 0.72 * np.array(colour) + 0.28 * gray
        assert np.abs(drawn[row, column] - expected).max() < 12, (row, column)
    assert "GAN-SR of empty" not in page


def test_colours_without_a_gan_result(tmp_path: Path) -> None:
    image = compare_pair(pair(tmp_path, "a", [(10, 10), (10, 40)], [(10, 10), (40, 40)]))
    assert gan_sr_of(image) is None
    drawn = agreement_picture(image, None)
    assert tuple(drawn[15, 15]) == RIGHT
    assert tuple(drawn[15, 45]) == FALSE
    assert tuple(drawn[45, 45]) == MISSED
    assert len(set(drawn[30, 30].tolist())) == 1


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    """And the frame that nothing is judged in stays plain."""
    mask = np.ones((200, 1000), bool)
    (tmp_path / "a.png").write_bytes(encode_mask(mask))
    drawn = agreement_picture(compare_pair(MaskPair("a", tmp_path / "a.png", tmp_path / "a.png", whole=True)), None)
    assert drawn.shape == (96, AGREEMENT_SIDE, 3)
    assert tuple(drawn[50, 200]) == RIGHT
    assert tuple(drawn[0, 0]) != RIGHT


def test_a_gan_result_that_is_gone_or_of_another_size(tmp_path: Path) -> None:
    image = compare_pair(pair(tmp_path, "a", [(10, 10)], [(10, 10)]))
    other = tmp_path / "other.png"
    other.write_bytes(encode_png(np.zeros((61, 90, 3), np.uint8)))
    for path in (tmp_path / "none.png", other):
        object.__setattr__(image, "pair", image.pair._replace(gan_sr=path))
        assert gan_sr_of(image) is None


def test_the_worst(tmp_path: Path) -> None:
    """Each image but once; those without a fault are none."""
    corners = [(row, column) for row in (10, 25, 40) for column in (10, 25, 40, 55)]
    images = [
        compare_pair(pair(tmp_path, name, detected, marked))
        for name, detected, marked in (
            ("perfect", corners, corners),
            ("nothing", [], []),
            ("disjoint", [corners[0]], [corners[5]]),
            ("disjoint and larger", corners[:2], corners[5:7]),
            ("missed", corners[:8], corners),
            ("false", corners, corners[:7]),
            ("both", corners[:11], corners[1:]),
        )
    ]
    worst = {kind: [image.pair.name for image in found] for kind, found in worst_images(images, 2).items()}
    assert worst == {
        "Lowest IoU": ["disjoint and larger", "disjoint"],
        "Most missed regions": ["missed", "both"],
        "Most false regions": ["false"],
    }
    assert worst_images(images[:2]) == {}


def test_nothing_is_marked_anywhere(tmp_path: Path) -> None:
    pair(tmp_path, "a", [], [])
    evaluation = evaluate_masks(pair_folders(tmp_path / "masks", tmp_path / "gt"))
    text = " ".join(re.sub(r"<[^>]*>", " ", written(evaluation, tmp_path)).split())
    assert "IoU: undefined, no mask and no ground truth marks anything" in text
    assert "one image was judged: these numbers may not hold for other images" in text
    assert "Not judged nothing: every mask has a ground truth" in text
    assert "Worst images" not in text


def test_in_a_browser(evaluation: Evaluation, browser: Page, tmp_path: Path) -> None:
    written(evaluation, tmp_path)
    browser.visit((tmp_path / "evaluation.html").as_uri(), width=1400)
    stands_alone(browser)
