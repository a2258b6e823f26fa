"""The public library: its names and parameters, its examples, and `detect_artifacts`, which does it all."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import desra_core
from desra_core import (
    ArgumentError,
    DesraError,
    Result,
    artifact_mask,
    assemble_pseudo_gt,
    detect_artifacts,
    find_regions,
    load_model,
    load_weights,
    read_image,
    super_resolve,
    variance_similarity,
)
from tests.conftest import MODELS

ROOT = Path(__file__).resolve().parents[2]
# What programs of others call. A name or parameter may be added here; none may be renamed or taken away.
PARAMETERS = {
    "artifact_mask": "similarity threshold min_area labels weights frame",
    "assemble_pseudo_gt": "mse_sr gan_sr mask",
    "detect_artifacts": "mse_sr gan_sr labels weights threshold min_area window",
    "find_regions": "mask similarity threshold labels weights",
    "load_model": "path device engine",
    "load_pair": "mse_model gan_model device engine",
    "load_weights": "source",
    "read_image": "path",
    "super_resolve": "model pixels",
    "variance_similarity": "mse_sr gan_sr window sigma tile threads",
}
FIELDS = {
    "Enlarged": "pixels tile",
    "Region": "x y width height area dominant_class mean_similarity severity",
    "Result": "similarity mask regions pseudo_gt",
}
OTHERS = {"ArgumentError", "DesraError", "Model"}


def test_names_and_parameters_stay() -> None:
    assert set(desra_core.__all__) == PARAMETERS.keys() | FIELDS.keys() | OTHERS
    assert set(desra_core.__all__) <= set(dir(desra_core))
    found = {name: " ".join(inspect.signature(getattr(desra_core, name)).parameters) for name in PARAMETERS}
    assert found == PARAMETERS
    assert {name: " ".join(getattr(desra_core, name)._fields) for name in FIELDS} == FIELDS
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = desra_core.no_such_name


def test_the_package_alone_is_light() -> None:
    program = "import sys, desra_core; assert not {'torch', 'numpy', 'cv2'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("desra_core", "tasks", "flows", "deployments")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert found.attempted
    assert not found.failed


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("mse.pth", "gan.pth"):
        (tmp_path / name).write_bytes((MODELS / name).read_bytes())
    Image.fromarray(np.full((32, 40, 3), 128, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "reference" / "library.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.startswith("[Region(x=")


def test_the_notebook_runs() -> None:
    notebook = nbformat.read(ROOT / "docs" / "library.ipynb", 4)
    made = NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(" regions, " in output.get("text", "") for output in outputs)


def _pair(channels: tuple[int, ...] = (3,)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mse_sr = rng.integers(100, 110, (120, 130, *channels)).astype(np.uint8)
    gan_sr = mse_sr.copy()
    gan_sr[20:90, 20:100] = rng.integers(0, 255, (70, 80, *channels))
    return mse_sr, gan_sr


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_all_steps_in_one(channels: tuple[int, ...], labelled: bool, bits: int) -> None:
    mse_sr, gan_sr = (picture if bits == 8 else picture.astype(np.uint16) * 257 for picture in _pair(channels))
    labels = np.full((120, 130), 2, np.uint8) if labelled else None
    weights = load_weights("published").values if labelled else None
    similarity = variance_similarity(mse_sr, gan_sr, window=9)
    mask = artifact_mask(similarity, threshold=0.6, min_area=500, labels=labels, weights=weights)
    assert mask.any()
    found = detect_artifacts(mse_sr, gan_sr, labels, threshold=0.6, min_area=500, window=9)
    expected = Result(
        similarity,
        mask,
        find_regions(mask, similarity, threshold=0.6, labels=labels, weights=weights),
        assemble_pseudo_gt(mse_sr, gan_sr, mask),
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.pseudo_gt.shape == gan_sr.shape
    assert np.array_equal(found.pseudo_gt[mask], mse_sr[mask])
    assert np.array_equal(found.pseudo_gt[~mask], gan_sr[~mask])


def test_a_pair_of_two_depths_has_a_pseudo_gt_in_that_of_the_gan_result() -> None:
    mse_sr, gan_sr = _pair()
    plain = detect_artifacts(mse_sr, gan_sr, min_area=500)
    assert plain.mask.any()
    deep_mse, deep_gan = (picture.astype(np.uint16) * 257 for picture in (mse_sr, gan_sr))
    for one, other, scale in ((deep_mse, gan_sr, 1), (mse_sr, deep_gan, 257)):
        found = detect_artifacts(one, other, min_area=500)
        assert found.pseudo_gt.dtype == other.dtype
        assert np.array_equal(found.pseudo_gt, plain.pseudo_gt.astype(int) * scale)


def test_weights_can_be_given() -> None:
    mse_sr, gan_sr = _pair()
    labels = np.zeros(mse_sr.shape[:2], np.uint8)
    found = detect_artifacts(mse_sr, gan_sr, labels, weights=np.full(150, 1000.0))
    assert not found.mask.any()
    assert detect_artifacts(mse_sr, gan_sr, labels, weights=np.ones(150)).mask.any()


@pytest.mark.parametrize("photo", [np.zeros((20, 30, 3), np.float32), np.zeros((20, 30, 4), np.uint8), "photo.jpg"])
def test_what_is_no_picture_is_not_enlarged(photo: object) -> None:
    model = load_model(str(MODELS / "gan.pth"))
    with pytest.raises(ArgumentError, match=r"^pixels: is of"):
        super_resolve(model, photo)  # type: ignore[arg-type]
    gray = np.full((20, 30), 7, np.uint8)
    assert np.array_equal(super_resolve(model, gray).pixels, super_resolve(model, gray[:, :, None]).pixels[:, :, 0])
    assert len(repr(model)) < 300


def test_an_image_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DesraError, match=r"nope\.jpg: there is no such file; check its path"):
        read_image(tmp_path / "nope.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mse_sr": np.zeros((7, 7, 3), np.uint8)}, "gan_sr: is 130x120 pixels, but mse_sr is 7x7; give"),
        ({"labels": np.zeros((7, 7), np.uint8)}, r"labels: are of shape \(7, 7\), but the image of \(120, 130\)"),
        ({"labels": np.full((120, 130), 150, np.uint8)}, "labels: hold the class 150; give"),
        ({"gan_sr": _pair()[1] / 255}, "gan_sr: is of float64; give an array of uint8"),
        ({"mse_sr": np.zeros((120, 130, 4), np.uint8)}, r"mse_sr: is of shape \(120, 130, 4\); give"),
        ({"mse_sr": "mse.png"}, "mse_sr: is of str; give an array"),
        ({"threshold": 1.5}, "threshold: is 1.5, no similarity; give"),
        ({"threshold": 0.0}, "threshold: is 0.0, no similarity; give"),
        ({"weights": np.ones(150)}, r"weights: are of shape \(150,\); give \(150,\), and labels"),
        ({"weights": np.ones(7), "labels": np.zeros((120, 130), np.uint8)}, r"weights: are of shape \(7,\); give"),
        ({"labels": np.full((120, 130), -1)}, "labels: are of dtype int64; give uint8"),
        ({"window": 4}, "window: is 4; give an odd"),
        ({"gan_sr": _pair()[1][:, :, 0]}, r"mse_sr: is of shape \(120, 130, 3\), but gan_sr of \(120, 130\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    mse_sr, gan_sr = _pair()
    with pytest.raises(ArgumentError, match=f"^{message}") as refused:
        detect_artifacts(**({"mse_sr": mse_sr, "gan_sr": gan_sr} | change))  # type: ignore[arg-type]
    assert isinstance(refused.value, DesraError)
    assert isinstance(refused.value, ValueError)
