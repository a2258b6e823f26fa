"""The page in a real browser: everything shows, nothing is asked for, nothing is complained about."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from desra_core.report import write_report
from desra_core.workspace import Workspace
from tests.browser import Page
from tests.desra_core.report.pages import viewer


@pytest.fixture(scope="module")
def report(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(Workspace(corpus / "ws"), output=tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(report: Path, browser: Page) -> Page:
    """The report in a window of usual size."""
    browser.visit(report.as_uri(), width=1400)
    return browser


def test_it_renders_and_asks_for_nothing(page: Page, tmp_path: Path) -> None:
    assert page.evaluate("document.title") == "Artifacts in ws"
    assert page.evaluate("document.querySelectorAll('.region').length") == 8
    assert page.evaluate("document.querySelectorAll('.region img').length") == 8 * 6 - 1
    assert page.evaluate("[...document.querySelectorAll('.region img')].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.querySelectorAll('svg path').length") > 10
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    (tmp_path / "page.png").write_bytes(page.screenshot())
    assert page.complaints == []
    assert page.requests == []
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 1400
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_a_picture_is_enlarged_and_flipped(page: Page) -> None:
    assert viewer(page)[0] is False
    page.evaluate("document.querySelector('figure[data-kind=gan_sr] img').click()")
    assert viewer(page) == [True, "1", "GAN-SR", True]
    page.evaluate("viewer.querySelector('img').click()")
    assert viewer(page) == [True, "1", "MSE-SR", True]
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    assert viewer(page) == [True, "2", "1", True]  # 1 − D
    page.press("Escape")
    assert viewer(page)[0] is False
    assert page.complaints == []
    assert page.requests == []


def test_hostile_names_run_nothing(page: Page) -> None:
    page.evaluate("window.hit = 0; window.alert = () => { window.hit += 1; }")
    page.evaluate("document.querySelectorAll('.region img').forEach((image) => { image.click(); viewer.close(); })")
    assert page.evaluate("hit") == 0
    assert page.evaluate("document.querySelectorAll('img[onerror], h3 script, h3 img').length") == 0
    assert page.complaints == []


def test_the_policy_refuses_what_a_name_might_smuggle_in(report: Path, browser: Page, tmp_path: Path) -> None:
    """Even were escaping to fail, no script runs and no address is asked for; and the helper would notice."""
    smuggled = "<img src='http://127.0.0.1:9/x.png' onerror='window.smuggled = 1'><script>window.smuggled = 2</script>"
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text().replace("</main>", smuggled + "</main>"))
    browser.visit(changed.as_uri(), width=1400)
    assert browser.evaluate("window.smuggled === undefined")
    assert browser.complaints != []
