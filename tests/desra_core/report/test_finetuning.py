"""The section on finetuning: documents as the gate publishes them, real crops, and everything that may be wrong."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from desra_core.errors import UsageError
from desra_core.files import content_key
from desra_core.gate.criteria import Judgement, NewRegion, OldRegion, Verdict, decide, score, score_rows
from desra_core.gate.model_registry import promote, rollback
from desra_core.images.parts import encode_webp
from desra_core.report import workspace_page as page_module
from desra_core.report import write_report
from desra_core.report.document import as_uri, render_page
from desra_core.report.finetuning import COLUMNS as EXPLAINED
from desra_core.report.finetuning import LOSSES, read_finetuning, verdict_markdown
from desra_core.settings.models import Gate, Training
from desra_core.workspace import Workspace
from tests.browser import Page
from tests.desra_core.report.conftest import HOSTILE
from tests.desra_core.report.pages import EVENTS, Elements, viewer, words

NAMES = [*HOSTILE, "street/0007", "park/0012", "coast/0001"]
CLASSES = ("tree", "building", "sky", None)
SIDE, CROP = 640, 212


def judgements(
    candidate: str, *, gone: float, added: int = 0, kept: float = 0.99, labelled: bool = True
) -> list[Judgement]:
    """Forty images with two regions each, and ten clean ones; of the regions a share is gone."""
    made = []
    for index in range(50):
        regions = [
            OldRegion(40 + 90 * part, 200, 150, 120, 9000 + 100 * index, CLASSES[index % 4] if labelled else None,
                       900.5 - 7 * index - part, 13 * (2 * index + part) % 80 < 80 * gone) for part in range(2)
        ]  # fmt: skip
        new = [NewRegion(5, 5, 80, 70, 5000, "sky", 80.0)] if index < added else []
        before = 0 if index >= 40 else sum(region.area for region in regions)
        left = sum(region.area for region in regions if not region.gone) if before else 0
        made.append(
            Judgement(
                image=NAMES[index % len(NAMES)], id=f"{index:032x}", candidate=candidate, pixels=SIDE**2,
                regions=regions if before else [], added=new, artifact_pixels_before=before, artifact_pixels_after=left,
                outside_pixels=SIDE**2 - before, squared_error=9.5 * SIDE**2, ssim=0.981, gradient_similarity=0.9912,
                lpips=None, sharpness_before=12.0, sharpness_after=12.0 * kept,
            )
        )  # fmt: skip
    return made


@cache
def crop(kind: str, seed: int) -> bytes:
    """A scene with a square of wrong texture before, in every third a trace of it after, and none in the others."""
    random = np.random.default_rng(seed)
    scene = sum(
        cv2.resize(random.normal(0, 25, (side, side, 1)), (CROP, CROP), interpolation=cv2.INTER_CUBIC)
        for side in (4, 12, 60)
    )
    rows, columns = np.mgrid[:CROP, :CROP] - CROP / 2
    stripes = np.sin(rows / 2.1) * np.cos(columns / 2.7) * (abs(rows) < 50) * (abs(columns) < 60)
    strength = {"before": 60.0, "after": 14.0 * (seed % 3 == 0)}.get(kind, 0.0)
    gray = 128 + scene + strength * stripes
    pixels = np.clip(gray[..., None] + (10, 0, -20), 0, 255).astype(np.uint8)
    return encode_webp(pixels[::4, ::4].repeat(4, 0).repeat(4, 1) if kind == "lr" else pixels)


def pictures(workspace: Workspace, judged: list[Judgement], key: str = "b" * 32) -> list[dict[str, Any]]:
    """Publish the crops of the worst regions, and list them as the gate does."""
    found = []
    for index, judgement in enumerate(judged[:8]):
        region = judgement.regions[0]
        crops = {}
        for kind in ("lr", "mse_sr", "before", "after"):
            path = workspace.judged_crop(key, judgement.id, kind, 0)
            workspace.publish(path, crop(kind, index))
            crops[kind] = str(path.relative_to(workspace.gate))
        found.append({"image": judgement.image, "region": dataclasses.asdict(region), "crops": crops})
    return found


def losses(count: int = 100) -> list[dict[str, float]]:
    steps = 10.0 * np.arange(1, count + 1)
    wave = np.random.default_rng(0).normal(0, 1, count)
    return [
        {"iteration": int(step), "pixel": 0.02 + 0.02 * np.exp(-step / 300) + 0.001 * dev,
         "perceptual": 4.2 + 0.2 * dev,
         "gan": 0.7 + 0.1 * np.tanh(step / 500) + 0.02 * dev, "discriminator_real": 0.66 - 0.02 * dev,
         "discriminator_fake": 0.64 + 0.02 * dev} for step, dev in zip(steps, wave, strict=True)
    ]  # fmt: skip


def publish(workspace: Workspace, *, gone: float = 0.9, kept: float = 0.97, **changes: Any) -> dict[str, Any]:
    """Publish a verdict on four candidates as `decide_and_publish` does, with some parts changed."""
    judged = judgements("000500 ema", gone=gone, kept=kept)
    others = [score(name, judgements(name, gone=gone * part, added=2, kept=kept)) for name, part in
              (("000250 raw", 0.6), ("000250 ema", 0.3), ("000500 raw", 0.95))]  # fmt: skip
    control = score("control", judgements("control", gone=0.0, added=1, kept=1.002))
    verdict = decide([*others, score("000500 ema", judged)], control, Gate())
    target = json.loads(workspace.settings.read_bytes())["target"]
    document = {
        "verdict": dataclasses.asdict(verdict),
        "before": {"path": "/models/of the team/gan.pth", "key": "0123456789abcdef" * 2},
        "mse_model": {"path": "/models/of the team/mse.pth", "key": "fedcba9876543210" * 2},
        "after": "/runs/first finetune",
        "best": {"path": "/runs/first finetune/models/iteration_000500.pth", "key": "ab" * 16, "weights": "ema",
                 "file": str(workspace.gate / "candidates" / f"{'ab' * 16}-ema.pth")},
        "pictures": pictures(workspace, judged),
        "finetune": {
            "parent": {"path": "/models/of the team/gan.pth", "key": "0123456789abcdef" * 2},
            "discriminator": None,
            "training": Training(preset="cpu").model_dump(mode="json"),
            "seed": 0,
            "images": [{"name": f"{NAMES[index % 8]} {index}", "id": f"{index:032x}", "severity": 900.0 - index}
                       for index in range(60)],
            "data": "d" * 32,
            "versions": {"desra": "0.4", "torch": "2.5.1"},
        },
        "losses": losses(),
        "images": [judgement.image for judgement in judged],
        "key": "k" * 32,
        "mask_key": target["mask_key"],
    } | changes  # fmt: skip
    workspace.publish(workspace.verdict, json.dumps(document, indent=1).encode())
    return document


def section(path: Path) -> str:
    found = re.search('<section id="finetuning">.*?</section>', path.read_text(), re.DOTALL)
    assert found is not None
    return found[0]


def rendered(workspace: Workspace) -> Path:
    """The section alone, which takes a fraction of the time of a report."""
    path = workspace.root.parent / "section.html"
    finetuning = read_finetuning(workspace, None)
    path.write_text(render_page("report_finetuning.html.j2", finetuning=finetuning))
    return path


def text_of(path: Path) -> str:
    return re.sub(r" ([,.:])(?= |$)", r"\1", words(section(path)))


def promoted(workspace: Workspace, model: Path, parent: Path) -> None:
    for path in (model, parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    promote(workspace, model, parent=parent, record={}, verdict={})


def test_without_a_verdict_there_is_no_section(page: str) -> None:
    assert "Finetuning" not in words(page)
    assert 'href="#finetuning"' not in page


def test_a_passed_verdict(workspace: Workspace, drawn_anew: None) -> None:
    document = publish(workspace)
    path = write_report(workspace, worst=2)
    content, page, text = path.read_bytes(), section(path), text_of(path)
    path.unlink()
    assert write_report(workspace, worst=2).read_bytes() == content
    for sentence in (
        "Passed. 000500 ema may replace the old model.",
        "90 % of 80 artifact regions are gone",
        "0 of 50 images gained a region; by noise alone 1",
        "3.0 % of the sharpness of clean images lost",
        "old model …/of the team/gan.pth 01234567",
        "finetuned …/models/iteration_000500.pth abababab, ema weights",
        "on 50 held-out images with 80 artifact regions; 10 of the images are clean",
        "75 % of the regions gone",
        "at most 10 % of the sharpness",
        "current model the old one: none was promoted yet",
        "tree 20 18 90 %",
        "no label 20 18 90 %",
        "The 8 most severe regions",
        "1 <script>alert(1)</script> gone severity 900.5 · tree · 9,000 px",
        "still there severity",
        "trained on 60 images",
        "And 10 more.",
        "learning rate 0.0001",
        "desra 0.4, torch 2.5.1",
    ):
        assert sentence in text
    for row in score_rows(TypeAdapter(Verdict).validate_python(document["verdict"])):
        assert " ".join(row.values()).replace("-", "−").replace("500 ema", "500 ema best") in text
    assert page.count('class="best"') == 1
    assert page.count("data:image/webp") == 32
    assert page.count("<svg") == page.count(">best</text>") == 3
    assert '<a href="#finetuning">' in path.read_text()


def test_the_pixel_loss_in_markdown_is_a_picture(workspace: Workspace) -> None:
    publish(workspace)
    uri = re.search(r"!\[pixel loss\]\(data:image/png;base64,([^)]*)\)", verdict_markdown(workspace))
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri[1]))) as picture:
        assert picture.width == 600
        assert len(picture.convert("RGB").getcolors(2**20)) > 20
    publish(workspace, losses=[])
    assert "pixel loss" not in verdict_markdown(workspace)


def test_dropped_candidates_are_told_from_the_others(workspace: Workspace) -> None:
    document = publish(workspace)
    verdict = TypeAdapter(Verdict).validate_python(document["verdict"])
    few = score("000250 raw", judgements("000250 raw", gone=0.3)[:8])
    dropped = dataclasses.replace(verdict, scores=(few, *verdict.scores[1:]), dropped=(few.candidate,))
    publish(workspace, verdict=dataclasses.asdict(dropped))
    path = rendered(workspace)
    page, text = section(path), text_of(path)
    assert "000250 raw 8 images, dropped" in text
    assert "000500 ema best 50 images" in text
    assert "is dropped" in text
    assert page.count('class="dropped"') == 1
    assert "8 images, dropped" in verdict_markdown(workspace)


def test_a_failed_verdict_says_why(workspace: Workspace) -> None:
    document = publish(workspace, gone=0.5, kept=0.8)
    path = rendered(workspace)
    page, text = section(path), text_of(path)
    assert "Not passed. The best of 4 candidates, 000500 ema, falls short:" in text
    assert len(document["verdict"]["reasons"]) == 2
    for reason in document["verdict"]["reasons"]:
        assert reason in text
    assert page.count('class="tile alert"') == 2


def test_no_candidate_no_labels_and_no_run(workspace: Workspace) -> None:
    control = score("control", judgements("control", gone=0))
    verdict = dataclasses.asdict(decide([], control, Gate()))
    publish(workspace, verdict=verdict, best=None, pictures=[], finetune=None, losses=[])
    text = text_of(rendered(workspace))
    assert "Not passed. There is no candidate." in text
    assert "Nothing is recorded beside the checkpoint." in text
    assert "Before and after" not in text
    only = score("model", judgements("model", gone=1, kept=1.1, labelled=False))
    publish(workspace, verdict=dataclasses.asdict(decide([only], control, Gate(min_removal=1))) | {"passed": False})
    text = text_of(rendered(workspace))
    assert "Not passed. model falls short:" in text
    assert "10 % of the sharpness of clean images gained" in text
    assert "Regions by class" not in text
    lone = decide([score("model", judgements("", gone=1)[:1])], score("control", judgements("", gone=0)[:1]), Gate())
    publish(workspace, verdict=dataclasses.asdict(lone))
    text = text_of(rendered(workspace))
    assert "on 1 held-out image with 2 artifact regions; none of the images is clean asked for" in text
    assert lone.reasons[0] in text
    assert "Undecided. Nothing speaks against model, but images are missing to judge it by:" in text
    assert "falls short" not in text
    assert verdict_markdown(workspace).startswith("**Undecided.** No clean image with detail was judged")


def test_many_candidates_are_folded(workspace: Workspace) -> None:
    some = judgements("", gone=0.5)[::5]
    scores = [score(f"{250 * index:06d} raw", some) for index in range(1, 300)]
    best = score("000001 ema", judgements("", gone=1.0)[::5])
    verdict = decide([best, *scores], score("control", some), Gate())
    publish(workspace, verdict=dataclasses.asdict(verdict))
    top, more = section(rendered(workspace)).split("All candidates")
    assert (top.count('class="best"'), top.count('class="candidate"'), top.count('class="control"')) == (1, 0, 1)
    assert (more.count('class="best"'), more.count('class="candidate"')) == (1, 199)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_nothing_else(workspace: Workspace, name: str) -> None:
    judged = [judgement for judgement in judgements("", gone=0.5) if judgement.regions]
    odd = [dataclasses.replace(region, class_name=name) for region in judged[0].regions]
    scored = score(name, [*judged, dataclasses.replace(judged[0], regions=odd)])
    model = {"path": f"/x/{name}/iteration_1{name}.pth", "key": name}
    run = publish(workspace)["finetune"] | {
        "parent": model,
        "discriminator": model,
        "data": name,
        "training": {name: name},
    }
    publish(workspace, verdict=dataclasses.asdict(decide([scored], scored, Gate())) | {"reasons": [name]}, before=model,
            after=name, mse_model=model, best=model | {"weights": name, "file": name}, losses=[],
            finetune=run | {"versions": {name: name}},
            pictures=[{"image": name, "region": dataclasses.asdict(odd[0]), "crops": {}}])  # fmt: skip
    path = rendered(workspace)
    elements = Elements(section(path))
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    assert not [key for _, attributes in elements.tags for key in attributes if EVENTS.match(key)]
    assert elements.text.count(name.replace("\n", "\\n").replace("\u202e", "\\u202e")) >= 12
    assert "\u202e" not in path.read_text()


def _threshold_lost(text: str) -> str:
    return text.replace("max_detail_loss", "max_loss")


DAMAGE: list[Callable[[str], str]] = [
    lambda _: "", lambda _: "[]", lambda _: "null", lambda text: text[:-9], _threshold_lost, lambda _: "[" * 10**5,
    lambda text: text.replace('"best": "000500 ema"', '"best": "lost"'), lambda text: text.replace("80", '"many"'),
    lambda text: text.replace('"losses"', '"lost"'),
]  # fmt: skip


def test_a_damaged_verdict_costs_the_section_only(workspace: Workspace) -> None:
    publish(workspace)
    text = workspace.verdict.read_text()
    for change in DAMAGE:
        workspace.verdict.write_text(change(text))
        with pytest.raises(UsageError, match="is damaged or of another version; run desra compare again"):
            read_finetuning(workspace, None)
    page = write_report(workspace, worst=2).read_text()
    assert 'id="finetuning"' not in page
    assert 'href="#finetuning"' not in page
    assert "The verdict on finetuned models is left out" in words(page)
    assert "is damaged or of another version; run desra compare again" in words(page)
    assert page.count('<article class="region">') == 2


def test_a_verdict_that_cannot_be_read(workspace: Workspace) -> None:
    workspace.verdict.mkdir(parents=True)
    page = write_report(workspace, worst=0).read_text()
    assert "cannot be read (Is a directory); run desra compare again" in words(page)


def test_crops_that_are_not_there_say_so(workspace: Workspace) -> None:
    document = publish(workspace)
    first, second, third, fourth, *_ = (picture["crops"] for picture in document["pictures"])
    (workspace.gate / first["after"]).unlink()
    (workspace.gate / second["after"]).write_bytes((workspace.gate / second["after"]).read_bytes()[:200])
    (workspace.gate / third["before"]).write_bytes(cv2.imencode(".png", np.zeros((9, 9), np.uint8))[1].tobytes())
    (workspace.gate / third["after"]).write_bytes(encode_webp(np.zeros((1200, 1200, 3), np.uint8)))
    outside = workspace.root / "private.webp"
    shutil.copy(workspace.gate / first["before"], outside)
    fourth |= {"lr": "../private.webp", "mse_sr": str(outside), "before": "a\0b"}
    del fourth["after"]
    workspace.verdict.write_text(json.dumps(document))
    page = section(rendered(workspace))
    assert page.count("data:image/webp") == 32 - 8
    for reason in ("there is no such file", "It has been changed.", "It lies elsewhere.", "None was made.", "pixels"):
        assert reason in words(page)
    shutil.rmtree(workspace.gate / "judgements")
    assert "data:image/webp" not in section(rendered(workspace))


def test_pictures_count_against_the_size_of_the_page(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    document = publish(workspace)
    noise = encode_webp(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    for picture in document["pictures"]:
        for crop in picture["crops"].values():
            (workspace.gate / crop).write_bytes(noise)
    workspace.verdict.write_text(json.dumps(document | {"pictures": 9 * document["pictures"]}))
    path = write_report(workspace, worst=0)
    assert section(path).count("data:image/webp") == 32
    assert 1_250_000 < path.stat().st_size < 1_750_000
    monkeypatch.setattr(page_module, "PICTURE_CHARACTERS", 32 * len(as_uri(noise)) + 1)
    text = words(write_report(workspace, worst=8).read_text())
    assert "8 more were asked for and are left out, to keep this page below 20 MB" in text


def test_a_verdict_under_older_settings_says_so(workspace: Workspace) -> None:
    publish(workspace, mask_key="another")
    assert "other settings, or another model, than this verdict" in text_of(write_report(workspace, worst=0))
    publish(workspace)
    assert "other settings, or another model" not in text_of(write_report(workspace, worst=0))


def test_the_current_model(workspace: Workspace, tmp_path: Path) -> None:
    document = publish(workspace)
    old, best = tmp_path / "old.pth", Path(document["best"]["file"])
    promoted(workspace, best, old)
    text = text_of(rendered(workspace))
    assert "current model the finetuned one, entry 1 of its history" in text
    rollback(workspace)
    text = text_of(rendered(workspace))
    assert "current model neither of these two, entry 2" in text
    publish(workspace, before={"path": str(old), "key": content_key(old)})
    assert "current model the old one, entry 2" in text_of(rendered(workspace))
    publish(workspace)
    promoted(workspace, best, old)
    promoted(workspace, tmp_path / "better.pth", best)
    assert "current model neither of these two, entry 4" in text_of(rendered(workspace))
    rollback(workspace)
    assert "current model the finetuned one, entry 5" in text_of(rendered(workspace))


def test_a_damaged_current_model_or_history_is_noted(workspace: Workspace, tmp_path: Path) -> None:
    document = publish(workspace)
    promoted(workspace, Path(document["best"]["file"]), tmp_path / "old.pth")
    (workspace.root / "models" / "0001" / "model.pth").write_text("another")
    text = text_of(rendered(workspace))
    assert "has changed since it was promoted" in text
    assert "the finetuned one, entry 1" in text
    (workspace.root / "models" / "0001" / "history.json").write_text("[{}]")
    text = text_of(rendered(workspace))
    assert "history.json: is not as it was written; restore it from a backup" in text
    assert "current model unknown" in text


def test_every_column_is_explained() -> None:
    measured = dataclasses.replace(score("a", judgements("a", gone=1, kept=1)), lpips=0.1, human_images=1)
    both = [measured, dataclasses.replace(measured, candidate="b")]
    row, *_ = score_rows(decide(both, measured, Gate(), dropped=["b"]))
    assert list(row) == list(EXPLAINED)


def test_every_loss_is_drawn() -> None:
    drawn = {name for _, names in LOSSES for name in names}
    assert drawn == {*losses(1)[0], "keep"} - {"iteration"}


def test_it_fits_its_window_and_before_and_after_are_enlarged_and_flipped(workspace: Workspace, browser: Page) -> None:
    publish(workspace)
    report = write_report(workspace, worst=2)
    for width in (420, 1400):
        browser.visit(report.as_uri(), width=width)
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("[...document.querySelectorAll('.card img')].every(image => image.naturalWidth > 0)")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.evaluate("document.querySelector('.card figure[data-kind=before] img').click()")
    assert viewer(browser) == [True, "1", "before", True]
    browser.evaluate("viewer.querySelector('img').click()")
    assert viewer(browser) == [True, "1", "after", True]
    browser.evaluate("viewer.querySelector('img').click()")
    assert viewer(browser) == [True, "1", "before", True]
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        browser.press(key)
    assert viewer(browser) == [True, "2", "LR", True]
    for _ in range(9):
        browser.press("ArrowDown")
    assert viewer(browser) == [True, "8", "LR", True]  # the worst regions of the corpus are another gallery
    assert browser.complaints == []
    assert browser.requests == []
