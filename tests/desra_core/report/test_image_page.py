"""Pages about single images: pictures in their places, scores on one scale, reasons for what is not there."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from desra_core.detection.class_weights import class_names, load_weights
from desra_core.detection.detectors import METHODS, DetectorInputs, applied, load_detector
from desra_core.detection.similarity import variance_similarity
from desra_core.errors import ImageError, TransientError
from desra_core.report import document as document_module
from desra_core.report import workspace_page as page_module
from desra_core.report import write_report
from desra_core.report.document import csp_hash
from desra_core.report.pictures import HUMAN_OUTLINE, OUTLINE, class_shares, heat_map, label_picture
from desra_core.report.workspace_page import score_kinds, score_picture
from desra_core.settings import Detection
from desra_core.workspace import Workspace
from tests.browser import Page
from tests.desra_core.report.conftest import HOSTILE, SIZE, read, write
from tests.desra_core.report.pages import EVENTS, Elements, look_at, words
from tests.in_process import process

SCORES = ["difference", "adjusted", *list(METHODS)[1:]]
NAME = "set1/photo001"
SETTINGS = Detection(workspace=Path("ws"), mse_sr=Path("mse_sr"), gan_sr=Path("gan_sr"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, make_pairs) -> Path:
    """A folder with pairs, LR and labels, one image that a person has looked at, and ``ws`` with two pages."""
    folder = tmp_path_factory.mktemp("labelled & <i>")
    make_pairs(folder, 3)
    for path in (folder / "gan_sr").rglob("*.png"):
        labels = np.full(SIZE, 2, np.uint8)
        labels[:, 100:] = 9
        write(folder / "labels" / path.relative_to(folder / "gan_sr"), labels)
        write(folder / "lr" / path.relative_to(folder / "gan_sr"), read(path)[::4, ::4])
    roles = {role: folder / role for role in ("mse_sr", "gan_sr", "lr")}
    workspace = process(Detection(workspace=folder / "ws", segmenter=f"labels:{folder / 'labels'}", **roles))
    people = np.zeros(SIZE, np.bool_)
    people[50:90, 70:120] = True
    look_at(workspace, {NAME: people})
    write_report(workspace, pages=2)
    return folder


@pytest.fixture
def copied(labelled: Path, tmp_path: Path) -> Path:
    """A copy of that folder, whose workspace knows its own pictures."""
    folder = Path(shutil.copytree(labelled, tmp_path / "copied"))
    manifest = pq.read_table(folder / "ws" / "manifest.parquet")
    roots = {key: value.replace(os.fsencode(labelled), os.fsencode(folder)) for key, value in
             manifest.schema.metadata.items()}  # fmt: skip
    pq.write_table(manifest.replace_schema_metadata(roots), folder / "ws" / "manifest.parquet")
    return folder


@pytest.fixture(scope="module")
def exact(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The pictures of the page about NAME, encoded without loss."""

    def encode(pixels: np.ndarray) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "WEBP", lossless=True)
        return sink.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_module, "encode_webp", encode)
        report = write_report(Workspace(labelled / "ws"), pages=2, output=tmp_path_factory.mktemp("exact") / "r.html")
    return pictures(report.parent / "pages" / f"{NAME}.html")


def cells(page: Path) -> dict[str, np.ndarray | str]:
    """Pictures, or reasons, by kind."""
    text = page.read_text()
    found: dict[str, np.ndarray | str] = {}
    for kind, content in re.findall(r'<figure data-kind="(\w+)">(.*?)</figure>', text, re.DOTALL):
        uri = re.search(r'src="data:image/webp;base64,([^"]*)"', content)
        reason = re.search(r'<div class="missing"[^>]*>(.*?)</div>', content, re.DOTALL)
        if uri:
            found[kind] = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[1]))).convert("RGB")).astype(int)
        else:
            assert reason is not None
            found[kind] = unescape(reason[1])
    return found


def pictures(page: Path) -> dict[str, np.ndarray]:
    found = cells(page)
    assert not [reason for reason in found.values() if isinstance(reason, str)]
    return found  # type: ignore[return-value]


def test_every_picture_shows_the_whole_image(labelled: Path, exact: dict[str, np.ndarray]) -> None:
    assert list(exact) == ["lr", "mse_sr", "gan_sr", "mask", "human", "pseudo_gt", "labels", *SCORES]
    assert {picture.shape for picture in exact.values()} == {(*SIZE, 3)}
    mse_sr, gan_sr = (read(labelled / kind / f"{NAME}.png")[:, :, ::-1] for kind in ("mse_sr", "gan_sr"))
    marked = read(labelled / "ws" / "masks" / f"{NAME}.png") > 0
    assert np.array_equal(exact["mse_sr"], mse_sr)
    assert np.array_equal(exact["gan_sr"], gan_sr)
    assert np.array_equal(exact["lr"], gan_sr[::4, ::4].repeat(4, 0).repeat(4, 1))
    assert np.array_equal(exact["pseudo_gt"], np.where(marked[..., None], mse_sr, gan_sr))
    people = np.zeros(SIZE, np.bool_)
    people[50:90, 70:120] = True
    for kind, mask, colour in (("mask", marked, OUTLINE), ("human", people, HUMAN_OUTLINE)):
        assert np.array_equal(exact[kind][~mask], gan_sr[~mask])
        assert (exact[kind] != gan_sr).any(axis=2)[mask].mean() > 0.9
        assert (exact[kind] == colour).all(axis=2)[mask].sum() > 150
    assert (exact["labels"][:, :100] == exact["labels"][0, 0]).all()
    assert (exact["labels"][:, 100:] == exact["labels"][0, 100]).all()
    assert (exact["labels"][0, 100] != exact["labels"][0, 0]).any()


def test_scores_are_those_of_the_detectors_on_one_scale(labelled: Path, exact: dict[str, np.ndarray]) -> None:
    mse_sr, gan_sr = (read(labelled / kind / f"{NAME}.png")[:, :, ::-1].copy() for kind in ("mse_sr", "gan_sr"))
    labels = read(labelled / "labels" / f"{NAME}.png")
    similarity = np.pad(variance_similarity(mse_sr, gan_sr).astype(float), 5, constant_values=np.nan)
    adjusted = np.clip(similarity * load_weights("published").values[labels], 0, 1)
    expected = {"difference": (1 - similarity) / 0.3, "adjusted": (1 - adjusted) / 0.3}
    for method in ("ldl", "ssim", "niqe"):
        detector = load_detector(method)
        scores = np.asarray(detector(mse_sr, gan_sr, None, None), float)
        frame = (SIZE[0] - scores.shape[0]) // 2
        expected[method] = np.pad(scores, frame, constant_values=np.nan) / detector.threshold
    for kind, ratio in expected.items():
        off = np.abs(exact[kind] - heat_map(np.clip(ratio / 2, 0, 1)).astype(int)).max()
        assert off <= 4, kind  # a step of the colour map, by rounding to float32
    text = words((labelled / "ws" / "pages" / f"{NAME}.html").read_text())
    assert "each score is divided by the threshold of its detector" in text


def test_a_score_at_its_threshold_has_the_middle_colour(tmp_path: Path) -> None:
    flat = np.zeros((64, 64, 3), np.uint8)
    kinds = {kind.kind: kind for kind in score_kinds(applied())}
    assert list(kinds) == SCORES
    assert [kinds[method].detector.heat_threshold for method in METHODS if method in kinds] == [
        load_detector(method).threshold for method in METHODS if method in kinds
    ]
    assert kinds["difference"].detector.heat_threshold == pytest.approx(0.3)
    assert score_kinds(applied("desra", 0.5))[0].detector.heat_threshold == 0.5
    assert {kind.kind: kind.detector.heat_threshold for kind in score_kinds(applied("ldl", 0.01))}["ldl"] == 0.01
    assert [kind.kind for kind in score_kinds(applied("/a/mine.py", 3.0))] == [*SCORES, "own"]
    for index, (score, brightness) in enumerate([(4.0, 0.5), (8.0, 1.0), (36.0, 1.0), (0.0, 0.0)]):
        file = tmp_path / f"flat{index}.py"
        file.write_text(FLAT.format(score=score))
        kind = score_kinds(applied(str(file), 4.0))[-1]
        picture = score_picture(kind, DetectorInputs(flat, flat, None, None), SETTINGS, largest=900)
        assert (picture[2:-2, 2:-2] == heat_map(np.full((1, 1), brightness))).all()
        assert (picture[:2] == 128).all()


FLAT = """
import numpy as np
class Flat:
    threshold, smallest, inputs = 4.0, 1, ()
    def __call__(self, mse_sr, gan_sr, lr, labels):
        return np.full((gan_sr.shape[0] - 4, gan_sr.shape[1] - 4), {score})
detector = Flat()
"""


def test_the_table_and_the_legend(labelled: Path) -> None:
    text = words((labelled / "ws" / "pages" / f"{NAME}.html").read_text())
    (region,) = (row for row in pq.read_table(labelled / "ws" / "regions.parquet").to_pylist() if row["image"] == NAME)
    assert "240×200 pixels, 1 artifact region" in text
    place = f"{region['width']}×{region['height']} {region['x']}, {region['y']} {region['mean_similarity']:.3f}"
    assert f"{region['class_name']} {region['area']:,} {place}" in text
    assert f"{class_names()[9]} 58.3 %" in text
    assert f"{class_names()[2]} 41.7 %" in text


def test_the_report_and_its_pages_link_to_each_other(labelled: Path) -> None:
    report = labelled / "ws" / "report.html"
    links = [value for tag, attributes in Elements(report.read_text()).tags
             if tag == "a" and not (value := attributes["href"]).startswith("#")]  # fmt: skip
    assert len(links) == 4  # each in the list and above its region
    for link in links:
        page = report.parent / unquote(link)
        assert page.is_file()
        back = next(attributes["href"] for tag, attributes in Elements(page.read_text()).tags if tag == "a")
        assert (page.parent / unquote(back)).resolve() == report.resolve()
    assert 'href="pages/' not in write_report(Workspace(labelled / "ws"), output=report.with_name("r.html")).read_text()


def test_a_page_is_self_contained_and_the_same_every_time(copied: Path) -> None:
    page = copied / "ws" / "pages" / f"{NAME}.html"
    write_report(Workspace(copied / "ws"), pages=2)
    content, made = page.read_bytes(), page.stat().st_mtime_ns
    others = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    write_report(Workspace(copied / "ws"), pages=2)
    assert page.read_bytes() == content
    assert page.stat().st_mtime_ns == made
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == others
    text = content.decode()
    assert "http:" not in text
    assert "https:" not in text
    script = re.search("<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    assert f"script-src '{csp_hash(script[1])}'" in unescape(text)
    assert len(content) < 20_000_000


def test_hostile_names(workspace: Workspace) -> None:
    """Their pages lie below ``pages`` and run nothing, and the links reach them."""
    report = write_report(workspace, pages=500, output=workspace.root / "new folder & ?#%" / "a #1?.html")
    links = {attributes["href"] for tag, attributes in Elements(report.read_text()).tags if tag == "a"}
    links = {link for link in links if not link.startswith("#")}
    assert all(re.fullmatch(r"[\w.~/%-]+", link, re.ASCII) for link in links)
    pages = {report.parent / unquote(link) for link in links}
    assert {path for path in report.parent.rglob("*.html") if path != report} == pages
    assert len(pages) == 8  # two of the ten are copies
    named = {f"pages/{name}.html" for name in HOSTILE}
    assert named <= {str(page.relative_to(report.parent)) for page in pages}
    for page in pages:
        elements = Elements(page.read_text())
        assert [tag for tag, _ in elements.tags].count("script") == 1
        assert not [name for _, attributes in elements.tags for name in attributes if EVENTS.match(name)]
        back = next(attributes["href"] for tag, attributes in elements.tags if tag == "a")
        assert (page.parent / unquote(back)).resolve() == report.resolve()


def test_each_missing_or_damaged_file_has_its_reason(copied: Path) -> None:
    workspace = Workspace(copied / "ws")
    page = workspace.root / "pages" / f"{NAME}.html"
    (copied / "labels" / f"{NAME}.png").unlink()
    workspace.mask(NAME).write_bytes(b"damaged")
    write(copied / "lr" / f"{NAME}.png", np.zeros((7, 9, 3), np.uint8))
    write_report(workspace, pages=2)
    found = cells(page)
    reasons = {kind: reason for kind, reason in found.items() if isinstance(reason, str)}
    assert sorted(reasons) == ["adjusted", "labels", "mask", "pseudo_gt"]
    assert "there is no such file" in reasons["labels"]
    assert "there are none, so that every weight is 1" in reasons["adjusted"]
    assert "is not an image" in reasons["mask"]
    write(copied / "mse_sr" / f"{NAME}.png", np.zeros((10, 10, 3), np.uint8))
    write_report(workspace, pages=2)
    found = cells(page)
    assert {kind for kind, reason in found.items() if isinstance(reason, str) and "is 10x10 now" in reason} == {
        "mse_sr", *SCORES,
    }  # fmt: skip
    (copied / "gan_sr" / f"{NAME}.png").unlink()
    shutil.rmtree(workspace.human)
    write_report(workspace, pages=2)
    found = cells(page)
    assert "human" not in found
    assert {kind for kind, picture in found.items() if not isinstance(picture, str)} == {"lr"}


def test_a_mined_workspace(mined: Workspace) -> None:
    write_report(mined, pages=1)
    (page,) = (mined.root / "pages").rglob("*.html")
    found = cells(page)
    assert [kind for kind, reason in found.items() if isinstance(reason, str)] == ["labels", "adjusted"]
    assert np.abs(found["pseudo_gt"] - (30, 200, 10)).max() < 4


def test_large_images_are_scaled_down_together(tmp_path: Path) -> None:
    labels = np.zeros((1000, 3000), np.uint8)
    labels[:, 2900:] = 7
    picture = label_picture(labels, largest=900)
    assert picture.shape == (300, 900, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2
    large = np.zeros((1000, 3000, 3), np.uint8)
    pair = DetectorInputs(large, large, None, None)
    assert score_picture(score_kinds(applied())[0], pair, SETTINGS, largest=900).shape == (300, 900, 3)


def test_images_too_small_or_too_large_for_a_detector() -> None:
    def reason(height: int, width: int, kind: str) -> str:
        image = np.zeros((height, width, 3), np.uint8)
        (chosen,) = (score for score in score_kinds(applied()) if score.kind == kind)
        with pytest.raises(ImageError) as error:
            score_picture(chosen, DetectorInputs(image, image, None, None), SETTINGS, largest=900)
        return str(error.value)

    assert "is 95x200, smaller than the 96 px that niqe needs" in reason(200, 95, "niqe")
    assert "has results of 10x200, smaller than the 11 px window" in reason(200, 10, "difference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "_MOST_PIXELS", 9999)
        assert "not computed for 100x100 pixels" in reason(100, 100, "ldl")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('two\\nlines')", "fail (ValueError: two"),
        ("return gan_sr", "instead of finite scores"),
        ("return gan_sr[1:, :, 0]", "instead of finite scores"),
        ("return gan_sr[:, :, 0] * float('nan')", "instead of finite scores"),
    ],
)
def test_a_detector_of_a_users_own_that_fails(tmp_path: Path, body: str, reason: str) -> None:
    head = "class D:\n threshold, smallest, inputs = 1.0, 1, ()\n def __call__(self, mse_sr, gan_sr, lr, labels):\n"
    (tmp_path / "mine.py").write_text(f"{head}  {body}\ndetector = D()\n")
    measure = applied(str(tmp_path / "mine.py"), 1.0)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ImageError) as error:
        score_picture(score_kinds(measure)[-1], DetectorInputs(image, image, None, None), SETTINGS, largest=900)
    assert reason in error.value.reason
    assert "\n" not in error.value.reason


def test_a_detector_gets_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "class D:\n threshold, smallest, inputs = 1.0, 1, ('lr',)\n def __call__(self, mse_sr, gan_sr, lr, labels):\n"
        "  assert labels is None and lr.shape == (16, 16, 3)\n  return gan_sr[:, :, 0] * 0.0\n"
    )
    (tmp_path / "needs_lr.py").write_text(code + "detector = D()\n")
    measure = applied(str(tmp_path / "needs_lr.py"), 1.0)
    image, lr = np.zeros((64, 64, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    score_picture(score_kinds(measure)[-1], DetectorInputs(image, image, lr, labels), SETTINGS, largest=900)
    with pytest.raises(ImageError, match="has no LR photos"):
        score_picture(score_kinds(measure)[-1], DetectorInputs(image, image, None, labels), SETTINGS, largest=900)


def test_classes_keep_their_colours() -> None:
    labels = np.repeat(np.arange(12, dtype=np.uint8), np.arange(30, 18, -1))[np.newaxis]
    shares = class_shares(labels)
    assert [share.name for share in shares] == class_names()[:12]
    assert len({share.colour for share in shares[:8]}) == 8
    assert len({share.colour for share in shares[7:]}) == 2
    assert sum(share.share for share in shares) == pytest.approx(1)
    picture = label_picture(labels, largest=900)
    for index, share in enumerate(shares):
        assert {"#" + bytes(pixel).hex() for pixel in picture[labels == index]} == {share.colour}


def test_pictures_beyond_the_room_of_a_page_are_left_out(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "PICTURE_CHARACTERS", 30_000)
    workspace = Workspace(copied / "ws")
    write_report(workspace, pages=1)
    page = next(path for path in (workspace.root / "pages").rglob("*.html") if "Left out, to keep" in path.read_text())
    kept = [kind for kind, picture in cells(page).items() if not isinstance(picture, str)]
    assert 0 < len(kept) < 12
    assert page.stat().st_size < 30_000 + 30_000


def test_a_page_that_cannot_be_written_is_an_error(copied: Path) -> None:
    workspace = Workspace(copied / "ws")
    shutil.rmtree(workspace.root / "pages")
    (workspace.root / "pages").write_text("in the way")
    before = workspace.report.read_bytes()
    with pytest.raises(TransientError, match="cannot be written"):
        write_report(workspace, pages=1)
    assert workspace.report.read_bytes() == before


def test_on_the_command_line(copied: Path, desra_here) -> None:
    shutil.rmtree(copied / "ws" / "pages")
    run = desra_here("report", "--workspace", copied / "ws", "--pages", 1)
    assert run.returncode == 0, run.stderr
    assert f"report   {copied / 'ws' / 'report.html'}" in run.stdout
    assert len(list((copied / "ws" / "pages").rglob("*.html"))) == 1


@pytest.mark.parametrize("width", [1200, 420])
def test_in_a_browser(labelled: Path, browser: Page, width: int) -> None:
    browser.visit((labelled / "ws" / "pages" / f"{NAME}.html").as_uri(), width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("[...document.images].filter(image => image.src).every(image => image.naturalWidth > 0)")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown = "[viewer.querySelector('h2').textContent, viewer.querySelector('img').alt.split(' of ')[0]]"
    browser.evaluate("document.querySelector('figure[data-kind=labels] img').click()")
    assert browser.evaluate(shown) == [NAME, "class labels"]
    browser.press("ArrowRight")
    assert browser.evaluate(shown) == [NAME, "1 − D"]
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.evaluate(shown) == [NAME, "pseudo-GT"]
    browser.evaluate("viewer.querySelector('img').click()")
    browser.evaluate("viewer.querySelector('img').click()")
    assert browser.evaluate(shown)[1] in ("MSE-SR", "GAN-SR")
    assert browser.complaints == []
    assert browser.requests == []


def test_a_name_without_room_for_a_suffix_costs_one_page(make_pairs, tmp_path: Path) -> None:
    make_pairs(tmp_path, 3)
    long = "x" * 251
    for role in ("mse_sr", "gan_sr"):
        (tmp_path / role / "set0/photo002.png").rename(tmp_path / role / "set0" / f"{long}.png")
    workspace = process(Detection(mse_sr=tmp_path / "mse_sr", gan_sr=tmp_path / "gan_sr", workspace=tmp_path / "ws"))
    errors: list[ImageError] = []
    report = write_report(workspace, pages=5, on_left_out=errors.append)
    assert [error.subject for error in errors] == [str(tmp_path / f"ws/pages/set0/{long}.html")]
    assert [path.name for path in (tmp_path / "ws/pages").rglob("*.html")] == ["photo001.html"]
    assert 'href="pages/set1/photo001.html"' in report.read_text()
    assert f"{long}.html" not in report.read_text()
