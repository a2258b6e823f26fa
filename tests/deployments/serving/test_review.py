"""The page of `desra review`, in a browser: keys, clicks and strokes, and what becomes of them, pixel for pixel."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deployments.serving.review import review_server
from desra_core.annotations.review import Review
from desra_core.images.codec import decode_mask, read_image
from desra_core.workspace import Workspace
from desra_core.workspace.answers import Stroke, noticed, open_answers, read_answers
from tests.browser import Page, opened
from tests.conftest import desra_command, refusal
from tests.desra_core.annotations.conftest import maker_below

SIZE = (1100, 1300)  # several tiles


def marked(*corners: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for x, y in corners:
        mask[y : y + 80, x : x + 100] = True
    return mask


MASKS = {"set/a & <b>": marked((480, 490), (1200, 1000)), "b": marked((5, 5)), "c": marked()}


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return maker_below(tmp_path_factory.mktemp("detected"))(MASKS)


@pytest.fixture
def workspace(detected: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(detected.root, tmp_path / "ws")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened("about:blank", tmp_path_factory.mktemp("browser")) as page:
        yield page


@contextlib.contextmanager
def reviewed(workspace: Workspace, rater: str = "ann", *, seconds: float | None = None, **given) -> Iterator[str]:
    with open_answers(workspace, rater) as file:
        review = Review(workspace, file, rater, rating=seconds is not None, **given)
        with review_server(review, 0, seconds) as address:
            yield address


READY = "document.body.dataset.ready && !busy"


def go(page: Page, address: str) -> None:
    page.visit(address, width=1400, height=900)
    page.wait_until(READY)


def press(page: Page, key: str, then: str = READY) -> None:
    """Press a key that the server hears of, and wait for its answer."""
    before = page.evaluate("document.body.dataset.state")
    page.press(key)
    page.wait_until(f"document.body.dataset.state !== {json.dumps(before)}")
    page.wait_until(then)


def answers(workspace: Workspace, rater: str = "ann") -> list[str]:
    return [one.answer for one in read_answers(workspace, rater)]


def canvas(page: Page, kind: str = "gan_sr") -> np.ndarray:
    """What a canvas shows, RGBA."""
    page.evaluate("drawAll()")
    page.wait_until("!asked && [...tiles.values()].every(tile => tile.bitmap || tile.error)")
    data = page.evaluate(f"document.querySelector('canvas[data-kind={kind}]').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))


def human(workspace: Workspace, name: str) -> np.ndarray:
    path = workspace.human_mask(name)
    return decode_mask(path.read_bytes(), path)


def shown_at(page: Page, shape: tuple[int, int], scale: float) -> tuple[slice, slice]:
    """The rows and columns of the image that lie in the large canvas."""
    found = page.evaluate("(w => [w.scale, w.left, w.top, large.width, large.height])(windowOf(large))")
    assert found[0] == scale
    left, top = -found[1], -found[2]
    assert 0 <= left <= shape[1] - found[3]
    assert 0 <= top <= shape[0] - found[4]
    return slice(top, top + found[4]), slice(left, left + found[3])


def test_regions_are_answered_by_keys_and_become_human_masks(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        assert "ann: 0 answered, 3 left, of 3" in browser.text()
        for lacking in ("LR photo: none of this name; add it to its folder", "is not kept; run again with --keep maps"):
            assert lacking in browser.text()
        order = []
        for key in "ara":
            order.append(json.loads(browser.evaluate("document.body.dataset.ready")))
            press(browser, key, "!busy" if len(order) == 3 else READY)
            assert len(read_answers(workspace, "ann")) == len(order)  # on the disk before the next region shows
        browser.wait_for("Nothing is left to answer.")
        browser.wait_for("human masks: 2")
        assert answers(workspace) == ["accept", "reject", "accept"]
        assert [[one.id, list(one.box or ())] for one in read_answers(workspace, "ann")] == order
        rejected = read_answers(workspace, "ann")[1]
        masks = {name: mask.copy() for name, mask in MASKS.items() if mask.any()}
        x, y, width, height = rejected.box or (0, 0, 0, 0)
        masks[rejected.name][y : y + height, x : x + width] = False
        for name, mask in masks.items():
            assert np.array_equal(human(workspace, name), mask)
        press(browser, "z")
        browser.wait_for("undone: accept")
        browser.wait_for("human masks: 1")
        assert browser.complaints == []
        assert all(url.startswith((address, "data:")) for url in browser.requests)


def test_the_page_shows_the_pixels_of_the_results_and_flips_them_in_place(
    detected: Workspace, workspace: Workspace, browser: Page
) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        name = read_name(browser)
        browser.press("m")  # without the outline
        browser.press("9")
        browser.press("+")
        browser.wait_until("view.scale === 1")
        browser.wait_until(READY)
        for kind in ("gan_sr", "mse_sr", "gan_sr"):
            browser.wait_until(READY)
            pixels = read_image(detected.root.parent / kind / f"{name}.png")
            assert np.array_equal(canvas(browser)[:, :, :3], pixels[shown_at(browser, SIZE, 1)])
            browser.press("f")


def test_what_is_not_shown_yet_cannot_be_answered(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        browser.evaluate("document.body.dataset.ready = ''; press('a')")
        browser.evaluate("drawAll()")
        assert answers(workspace) == []
        browser.evaluate("press('a'); press('r')")  # the second comes before the next region
        browser.wait_until("now.state === 1")
        browser.wait_until(READY)
        assert answers(workspace) == ["accept"]
        assert browser.evaluate("document.querySelector('#said').textContent") == ""


@pytest.mark.parametrize("seconds", [None, 0.1])
def test_a_picture_that_cannot_be_shown_cannot_be_answered(
    tmp_path: Path, browser: Page, seconds: float | None
) -> None:
    workspace = maker_below(tmp_path)({"a": MASKS["b"], "b": MASKS["b"]})
    with reviewed(workspace, seconds=seconds) as address:
        first = json.loads(get(f"{address}state")[1])["place"]["name"]
        picture = tmp_path / f"ws/gan_sr/{first}.png"
        picture.write_bytes(picture.read_bytes()[:2000])
        browser.visit(address, width=1400, height=900)
        browser.wait_for("; N goes on without an answer")
        assert f"{first}.png" in browser.text()
        for key in "ay":
            browser.press(key)
        assert not browser.evaluate("busy || covered || timer || document.body.dataset.ready")
        browser.press("n")
        browser.wait_until("document.body.dataset.ready")
        assert read_name(browser) != first
        browser.wait_until("!now.seconds || covered")
        press(browser, "a" if seconds is None else "y", "!busy")
        assert answers(workspace) == ["accept" if seconds is None else "yes"]
        browser.wait_until("lacking")
        browser.press("n")  # nothing else is left, so it comes again
        browser.wait_until("!busy && lacking")
        assert read_name(browser) == first
    assert len(answers(workspace)) == 1


def test_a_picture_that_did_not_come_is_asked_for_again(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        browser.cut_off(True)
        try:
            browser.press("9")  # tiles that the browser has not stored yet
            browser.wait_until("[...tiles.values()].some(tile => tile.error)")
            browser.evaluate("drawAll()")
            assert not browser.evaluate("document.body.dataset.ready")
        finally:
            browser.cut_off(False)
        browser.wait_until(READY)


def read_name(page: Page) -> str:
    return str(page.evaluate("now.place.name"))


def test_canvases_zoom_and_pan_together(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        middle = """[...document.querySelectorAll('canvas')]
            .map(c => (w => [(c.width / 2 - w.left) / w.scale, c.width / w.scale])(windowOf(c)))"""
        before = browser.evaluate(middle)
        x, y = browser.evaluate("(b => [b.x + b.width / 2, b.y + b.height / 2])(large.getBoundingClientRect())")
        browser.drag((x, y), (x + 20, y), (x + 60, y))
        browser.wheel(x, y, 100)
        browser.wait_until("document.querySelector('#scale').textContent !== ''")
        after = browser.evaluate(middle)
        assert after[0][0] < before[0][0]
        assert after[0][1] > before[0][1]
        for place, width in after[1:]:
            assert width == pytest.approx(after[0][1])
            assert place == pytest.approx(after[0][0], abs=after[0][1] / 100)


def test_strokes_of_brush_and_eraser_are_in_the_mask_pixel_for_pixel(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        name = read_name(browser)
        # Browsers tell where a mouse is in whole pixels.
        box = browser.evaluate("(b => [b.x, b.y, large.width / b.width])(large.getBoundingClientRect())")
        lines = {"b": [(100, 100), (180, 100), (180, 220)], "e": [(40, 160), (300, 160)]}
        expected = MASKS[name].copy()
        for key, line in lines.items():
            browser.press(key)
            scale, left, top = browser.evaluate("(w => [w.scale, w.left, w.top])(windowOf(large))")
            clicked = [(round(box[0] + x), round(box[1] + y)) for x, y in line]
            points = [
                (((x - box[0]) * box[2] - left) // scale, ((y - box[1]) * box[2] - top) // scale) for x, y in clicked
            ]
            before = browser.evaluate("document.body.dataset.state")
            browser.drag(*clicked)
            browser.wait_until(f"document.body.dataset.state !== {json.dumps(before)} && !stroke")
            near = np.zeros(SIZE, bool)
            rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
            for (x0, y0), (x1, y1) in pairwise(points):  # lines along an axis
                dx = np.maximum(np.maximum(min(x0, x1) - columns, columns - max(x0, x1)), 0)
                dy = np.maximum(np.maximum(min(y0, y1) - rows, rows - max(y0, y1)), 0)
                near |= dx**2 + dy**2 <= browser.evaluate("radius") ** 2
            expected = expected | near if key == "b" else expected & ~near
        assert answers(workspace) == ["drawn", "drawn"]
        browser.wait_until(READY)
        # The pane of the mask shows it: black where nothing is marked.
        pane = canvas(browser, "mask")
        scale, left, top = browser.evaluate("(w => [w.scale, w.left, w.top])(windowOf(small[3]))")
        for y, x in [(y, x) for y in range(40, pane.shape[0], 29) for x in range(7, pane.shape[1], 23)]:
            row, column = int((y + 0.5 - top) / scale), int((x + 0.5 - left) / scale)
            around = expected[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            if 0 <= row < SIZE[0] and 0 <= column < SIZE[1] and around.all() == around.any():
                assert pane[y, x, :3].any() == around.all()
        while not browser.evaluate("!now.place"):
            press(browser, "a", "!busy && (!now.place || document.body.dataset.ready)")
        browser.wait_for("human masks: 2")
        assert np.array_equal(human(workspace, name), expected)
        assert browser.complaints == []


def test_strokes_of_other_raters_appear(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address, open_answers(workspace, "bob") as file:
        bob = Review(workspace, file, "bob")
        go(browser, address)
        before = canvas(browser, "mask")
        place = bob.current()
        assert place is not None
        assert place.key[1] is not None
        x, y = place.key[1][:2]
        bob.draw(place.key, Stroke(((x - 20, y - 20),), 5), bob.state())
        deadline = time.monotonic() + 30
        while np.array_equal(canvas(browser, "mask"), before):
            assert time.monotonic() < deadline


def test_a_stroke_stays_as_wide_as_it_began(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        browser.press("b")
        wide = "(stroke = {points: [[9, 9]], erase: false, radius: 3}, drawStroke(), large.getContext('2d').lineWidth)"
        scale = browser.evaluate("windowOf(large).scale")
        assert browser.evaluate(f"(pointer = null, radius = 20, {wide})") == 7 * scale
        browser.evaluate("stroke = null")


def test_buttons_do_what_keys_do(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace, everything=True) as address:
        go(browser, address)
        for key, answer in (("u", "unsure"), ("c", "clean"), ("r", "reject")):
            before = browser.evaluate("document.body.dataset.state")
            button = f"document.querySelector('#decide [data-key={key}]')"
            x, y = browser.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({button}.getBoundingClientRect())")
            browser.drag((x, y))
            browser.wait_until(f"document.body.dataset.state !== {json.dumps(before)}")
            browser.wait_until("!busy && (!now.place || document.body.dataset.ready)")
            assert answers(workspace)[-1] == answer


def test_a_rating_shows_a_region_for_some_seconds_and_asks(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace, seconds=0.2, passes=None) as address:
        browser.visit(address, width=1400, height=900)
        for key in "yny":
            browser.wait_for("Did you notice something wrong?")
            assert browser.evaluate("getComputedStyle(large).visibility") == "hidden"
            shown = browser.text()
            assert "severity" not in shown
            assert "MSE-SR" not in shown
            press(browser, key, "!busy")
        browser.wait_for("Nothing is left to answer.")
        assert [kind.rpartition("/tiles/")[2].split("/")[1] for kind in browser.requests if "/tiles/" in kind] == [
            "gan_sr"
        ] * sum("/tiles/" in url for url in browser.requests)
        assert browser.complaints == []
    assert sorted(found.yes for found in noticed(workspace, None).values()) == [0, 1, 1]
    assert {found.raters for found in noticed(workspace, None).values()} == {1}


def test_two_tabs_of_a_rater(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        # What a second tab does, with the page's own words.
        state = json.loads(get(f"{address}state")[1])
        given = {"state": 0, "key": [state["place"]["id"], state["place"]["box"]], "answer": "accept"}
        browser.evaluate("busy = true")  # so that this tab does not ask by itself
        assert get(f"{address}answer", json.dumps(given).encode())[0] == 200
        browser.evaluate("busy = false; press('r')")
        browser.wait_for("this tab: is behind: another tab of this rater has answered; here is what comes next")
        browser.wait_until(READY)
        assert answers(workspace) == ["accept"]
        assert "1 answered, 2 left" in browser.text()
        press(browser, "r")
        assert answers(workspace) == ["accept", "reject"]


def test_the_page_shows_how_far_raters_agree(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace, "bob") as address:
        go(browser, address)
        for key in "aar":
            press(browser, key, "!busy && (!now.place || document.body.dataset.ready)")
        assert "kappa" not in browser.text()
    with reviewed(workspace, passes=2) as address:
        go(browser, address)
        for key in "ara":
            press(browser, key, "!busy && (!now.place || document.body.dataset.ready)")
        # Of three regions one is equal. By chance: 4 / 9 + 1 / 9.
        browser.wait_for("2 raters agree on 33 % of 3 shared, kappa -0.50")


def get(url: str, data: bytes | None = None, host: str | None = None, method: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, data, {"Host": host} if host else {}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode("latin-1")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_without_the_token_there_is_nothing(workspace: Workspace) -> None:
    with reviewed(workspace) as address:
        origin, token = address.rstrip("/").rsplit("/", 1)
        image = json.loads(get(f"{address}state")[1])["place"]["id"]
        given = json.dumps({"state": 0, "key": [image, None], "answer": "clean"}).encode()
        for wrong in ("", "x", token[:-1], token + "x", token.swapcase()):
            for path in ("", "/", "/state", "/review.js", f"/tiles/{image}/gan_sr/0/0/0", "/nothing"):
                for data in (None, given):
                    code, text = get(f"{origin}/{wrong}{path}", data)
                    assert (code, text) == (
                        403,
                        "This address lacks its key: take the one that desra review has printed.",
                    )
        assert get(f"{origin}/{token}/state", host="evil.example")[0] == 400
        assert get(f"{address}nothing")[0] == get(f"{address}state", method="DELETE")[0] == 403
        assert read_answers(workspace, "ann") == []
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as page:
            assert page.headers["Referrer-Policy"] == "no-referrer"
            assert "http" not in page.headers["Content-Security-Policy"]
            assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; ")


def test_what_no_page_sends_is_refused_in_a_line(workspace: Workspace) -> None:
    with reviewed(workspace) as address:
        place = json.loads(get(f"{address}state")[1])["place"]
        key = [place["id"], place["box"]]
        stroke = {"state": 0, "key": key, "points": [[1, 1]], "radius": 3, "erase": False}
        cases = {
            "request: is not one of this page; load the page again": [
                ("answer", b"{"), ("answer", b"[]"), ("nothing", {"state": 0, "key": key}), ("answer", {"state": 0}),
                ("answer", {"state": "x", "key": key, "answer": "accept"}), ("stroke", stroke | {"points": [[1]]}),
                ("answer", {"state": 0, "key": 5, "answer": "accept"}), ("answer", b"[" * 100_000),
                ("stroke", stroke | {"points": [[1e999, 1]]}),
            ],
            "region: is not in this review; load the page again": [
                ("answer", {"state": 0, "key": ["x", None], "answer": "accept"}),
            ],
            "answer: 'yes' is none; give one of accept, reject, unsure, clean": [
                ("answer", {"state": 0, "key": key, "answer": "yes"}),
            ],
            "answer: 'drawn' is none; give one of accept, reject, unsure, clean": [
                ("answer", {"state": 0, "key": key, "answer": "drawn"}),
            ],
            "stroke: is too wide, too long, or empty; draw a smaller one": [
                ("stroke", stroke | {"points": []}), ("stroke", stroke | {"radius": 10**9}),
            ],
            "stroke: lies far outside the image; draw it in the image": [("stroke", stroke | {"points": [[10**6, 1]]})],
        }  # fmt: skip
        for line, sent in cases.items():
            for action, given in sent:
                data = given if isinstance(given, bytes) else json.dumps(given).encode()
                code, text = get(f"{address}{action}", data)
                assert (code, json.loads(text)) == (400, {"error": line}), given
        assert get(f"{address}stroke", b" " * 3_000_000)[0] == 413
        for tile in (f"{place['id']}/gan_sr/0/9/9", f"{place['id']}/gan_sr/99/0/0", "x/gan_sr/0/0/0",
                     f"{place['id']}/secret/0/0/0",
                     *(f"{place['id']}/mask/0/0/0?box={box}" for box in ("[1,2,3,4]", "x", "[1]", "5", "[1e999,1,1,1]"))
                     ):  # fmt: skip
            code, text = get(f"{address}tiles/{tile}")
            assert (code, list(json.loads(text))) == (400, ["error"])
        assert get(f"{address}tiles/{place['id']}/lr/0/0/0")[0] == 404
        assert read_answers(workspace, "ann") == []


def test_a_damaged_file_of_one_rater_is_named_to_the_others(workspace: Workspace, browser: Page) -> None:
    other = workspace.answers("bob")
    with reviewed(workspace) as address:
        go(browser, address)
        other.write_text("{\n")
        browser.wait_for(f"{other}: is damaged in line 1; bring the file back from a copy, or empty this line")
        place = browser.evaluate("now.place")
        given = {"state": 0, "key": [place["id"], place["box"]], "answer": "reject"}
        asked = (f"tiles/{place['id']}/mask/0/0/0?box={json.dumps(place['box'], separators=(',', ':'))}", None)
        for path, data in (("state", None), ("answer", json.dumps(given).encode()), asked):
            code, text = get(f"{address}{path}", data)
            assert code == 400
            assert "bob.jsonl: is damaged in line 1; " in json.loads(text)["error"]
        other.write_text("\n")
        browser.wait_until("!document.querySelector('#said').textContent")
        press(browser, "a")
    assert answers(workspace) == ["accept"]


def test_masks_follow_once_the_list_of_masks_can_be_read(workspace: Workspace, browser: Page) -> None:
    with reviewed(workspace) as address:
        go(browser, address)
        workspace.review.joinpath("masks.json").write_text("{ damaged")
        for _ in range(3):
            press(browser, "a", "!busy && (!now.place || document.body.dataset.ready)")
        browser.wait_for("masks.json: is damaged; bring it back from a copy, or delete it")
        workspace.reviewed.unlink()
        browser.wait_for("human masks: 2")


@contextlib.contextmanager
def command(workspace: Workspace, *given: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    run = desra_command("review", "--workspace", workspace.root, "--rater", "ann", "--no-browser", *given)
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            assert process.stdout.readline() == "end      Ctrl-C\n"
            yield process, address
        finally:
            process.kill()


def test_a_review_that_is_killed_at_any_moment_goes_on_where_it_was(workspace: Workspace, desra_here) -> None:
    with command(workspace) as (process, address):
        for number, answer in enumerate(("accept", "unsure")):
            place = json.loads(get(f"{address}state")[1])["place"]
            given = {"state": number, "key": [place["id"], place["box"]], "answer": answer}
            assert get(f"{address}answer", json.dumps(given).encode())[0] == 200
        second = desra_here("review", "--workspace", workspace.root, "--rater", "ann", "--no-browser")
        assert refusal(second) == (
            f"error: --rater ann: reviews already, in process {process.pid} on {os.uname().nodename}; open its page in "
            "another tab, or give another name"
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert answers(workspace) == ["accept", "unsure"]
    with command(workspace) as (process, address):
        state = json.loads(get(f"{address}state")[1])
        assert state["counts"] == {"answered": 1, "left": 2, "all": 3}
        for number in range(2):
            place = json.loads(get(f"{address}state")[1])["place"]
            given = {"state": 2 + number, "key": [place["id"], place["box"]], "answer": "accept"}
            assert get(f"{address}answer", json.dumps(given).encode())[0] == 200
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate()
        assert process.returncode == 0, complaints
        root = workspace.root
        assert said.splitlines() == [
            f"answers  3 of 3 regions, 0 left: {root}/review/ann.jsonl",
            f"masks    2 human masks of reviews in {root}/human",
            f"next     desra evaluate --workspace {root}; desra finetune --workspace {root} --output RUN",
        ]


def test_the_secret_of_the_address_is_not_on_the_command_line_of_the_browser(
    workspace: Workspace, browser: Page, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {given}.part && mv {given}.part {given}\n')
    program.chmod(0o700)
    run = desra_command("review", "--workspace", workspace.root, "--rater", "ann")
    environment = os.environ | {"BROWSER": str(program), "DISPLAY": ":0"}
    with subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            deadline = time.monotonic() + 30
            while not given.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            leads = workspace.review / "ann.html"
            assert given.read_text().split() == [leads.as_uri()]
            assert leads.stat().st_mode & 0o777 == 0o600
            browser.visit(leads.as_uri(), width=1400, height=900)
            browser.wait_until(f"location.href === {json.dumps(address)}")
            browser.wait_until("document.body?.dataset.ready")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not leads.exists()


def test_a_port_that_is_taken_is_refused_in_a_line(workspace: Workspace, desra_here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = desra_here("review", "--workspace", workspace.root, "--rater", "ann", "--port", port)
    assert refusal(run) == f"error: --port {port}: cannot be had (Address already in use); give another one"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["a/b"], "error: --rater: 'a/b' is no name for a file; take 1 to 64 of A-Z, a-z, 0-9, dot, _ and -"),
        (["a", "--seconds", "3"], "error: --seconds: counts only with --rate; leave it out, or give --rate"),
        (["a", "--rate", "--all"], "error: --all: and --rate are both given; leave one out: only regions are rated"),
    ],
)
def test_bad_calls_are_refused_in_a_line(workspace: Workspace, desra_here, given: list[str], line: str) -> None:
    assert refusal(desra_here("review", "--workspace", workspace.root, "--rater", *given)) == line
