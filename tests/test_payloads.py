"""Files that run code when they are unpickled, given to all that reads weights: one line comes, and no code runs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import desra_core
from desra_core.errors import DesraError
from desra_core.images.codec import encode_png, read_image
from desra_core.networks.checkpoints import load_checkpoint, load_model, read_kinds, read_weights
from desra_core.networks.perceptual import load_lpips
from desra_core.networks.segmentation import load_segmenter
from desra_core.settings import Mining
from desra_core.settings.models import SETTINGS
from desra_core.training import networks
from desra_core.training.loop import finetune
from desra_core.training.patches import open_frozen
from desra_core.training.plan import RunFolder
from tests.conftest import MODELS, Desra, refusal
from tests.in_process import process


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def archive(**records: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name, content in records.items():
            file.writestr(f"model/{name.replace('_', '.', 1)}", content)
    return sink.getvalue()


def tarred(**files: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink, **options)
    return sink.getvalue()


def numpy_file(content: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([content], dtype=object), allow_pickle=True)
    return sink.getvalue()


def program() -> bytes:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still around
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4)), sink)
    return sink.getvalue()


# Every form in which a file can hold the payload. Each pickle of old torch files and archives has its turn.
FORMS: dict[str, Callable[[Payload], bytes]] = {
    "beside weights": lambda payload: saved({"params": weights(), "hook": payload}),
    "among weights": lambda payload: saved({"params": weights() | {"conv.weight": payload}}),
    "as a key": lambda payload: saved({"params": weights(), payload: 1}),
    "alone": saved,
    "old format": lambda payload: saved(
        {"params": weights(), "hook": payload}, _use_new_zipfile_serialization=False
    ),
    "old format, first": lambda payload: pickle.dumps(payload, 2) + saved({}, _use_new_zipfile_serialization=False),
    "module": lambda payload: saved(module(payload)),
    **{f"pickle {protocol}": lambda payload, p=protocol: pickle.dumps({"w": payload}, p) for protocol in range(6)},  # type: ignore[misc]
    "text pickle": lambda payload: b"cposix\nmkdir\n(S'" + os.fsencode(payload.trace) + b"'\ntR.",
    "tar": lambda payload: tarred(
        **{name: pickle.dumps(payload, 2) for name in ("sys_info", "pickle", "tensors", "storages")}
    ),
    "tar, first right": lambda payload: tarred(
        sys_info=pickle.dumps({}, 2), storages=pickle.dumps(payload, 2), tensors=b"", pickle=b""
    ),
    "zip": lambda payload: archive(data_pkl=pickle.dumps(payload, 2), version=b"3\n"),
    "zip, other pickles": lambda payload: archive(
        data_pkl=pickle.dumps({}, 2), version=b"3\n",
        **{f"{name}_pkl": pickle.dumps(payload, 2) for name in ("constants", "attributes", "extra/hook")},
    ),
    "zip, only constants": lambda payload: archive(constants_pkl=pickle.dumps(payload, 2), version=b"3\n"),
    "zip in zip": lambda payload: archive(data_pkl=archive(data_pkl=pickle.dumps(payload, 2))),
    "checkpoint in zip": lambda payload: archive(model_pth=saved(payload)),
    "checkpoint in tar": lambda payload: tarred(model=saved(payload)),
    "safetensors before": lambda payload: (2).to_bytes(8, "little") + b"{}" + pickle.dumps(payload, 2),
    "npy": numpy_file,
    "npz": lambda payload: archive(weights_npy=numpy_file(payload)),
    "program": lambda _: program(),
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.zeros(2, 2)}


def module(payload: Payload) -> torch.nn.Module:
    network = torch.nn.Conv2d(3, 3, 1)
    network.hook = payload  # type: ignore[assignment]
    return network


def resumed(path: Path) -> None:
    """A finetune goes on from the state in its folder."""
    run = RunFolder(path.parent)
    from desra_core.settings.models import Training

    quick = Training(patch=32, batch=2, iterations=2, checkpoint_every=2, perceptual="off", gan_weight=0.0)
    run.state.write_bytes(path.read_bytes())
    for name, shape in (("lr", (8, 8, 3)), ("pseudo_gt", (32, 32, 3)), ("mask", (32, 32))):
        (run.data / "0000").mkdir(parents=True, exist_ok=True)
        np.save(run.data / "0000" / f"{name}.npy", np.ones(shape, np.uint8 if len(shape) > 2 else np.bool_))
    finetune(run, MODELS / "gan.pth", quick, "cpu", 1)


def frozen(path: Path) -> None:
    """The images of a finetune, one of them replaced."""
    for name in ("lr", "pseudo_gt", "mask"):
        (path.parent / "data" / "0000").mkdir(parents=True, exist_ok=True)
        (path.parent / "data" / "0000" / f"{name}.npy").write_bytes(path.read_bytes())
    open_frozen(path.parent / "data")


def segmenter(path: Path) -> None:
    load_segmenter(f"mmseg:{_config()},{path}", "cpu")


# Everything that reads a file of weights, or of arrays.
ENTRIES: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "desra_core.load_model": lambda path: desra_core.load_model(path),
    "desra_core.load_pair": lambda path: desra_core.load_pair(path, MODELS / "gan.pth"),
    "desra_core.load_pair, GAN": lambda path: desra_core.load_pair(MODELS / "mse.pth", path),
    "openvino": lambda path: load_model(path, engine="openvino-float32"),
    "compare": read_kinds,
    "twin": read_weights,
    "load_checkpoint": lambda path: refuse_unless_weights(load_checkpoint(path, "save it again")),
    "--lpips": load_lpips,
    "--perceptual": lambda path: networks.PerceptualLoss(str(path)),
    "--discriminator": lambda path: networks.load_discriminator(path, 4),
    "finetune --gan-model": networks.load_generator,
    "--segmenter": segmenter,
    "state.pth": resumed,
    "npy": frozen,
    "photo": read_image,
}


def refuse_unless_weights(content: Any) -> None:
    """What the callers of `load_checkpoint` do with content that is no network's."""
    if not isinstance(content, dict) or "params" not in content:
        raise DesraError("content", "holds no weights", "give another file")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    folder = tmp_path_factory.mktemp("payloads")
    trace = folder / "the code has run"
    found = {}
    for index, (form, make) in enumerate(FORMS.items()):
        found[form] = folder / f"{index}.pth"
        found[form].write_bytes(make(Payload(trace)))
    return found, trace


def test_the_payload_would_run(files: tuple[dict[str, Path], Path]) -> None:
    paths, trace = files
    for form in ("pickle 2", "text pickle"):
        pickle.loads(paths[form].read_bytes())
        trace.rmdir()
    trace.mkdir()
    with pytest.raises(FileExistsError):
        torch.load(paths["beside weights"], weights_only=False)
    trace.rmdir()


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_in_a_file_never_runs(entry: str, files: tuple[dict[str, Path], Path], tmp_path: Path) -> None:
    paths, trace = files
    for form, path in paths.items():
        given = tmp_path / form.replace(" ", "") / path.name
        given.parent.mkdir()
        given.write_bytes(path.read_bytes())
        with pytest.raises(DesraError) as caught:
            ENTRIES[entry](given)
        assert not trace.exists(), form
        assert "\n" not in str(caught.value), form
        assert len(str(caught.value)) < 800, form


@pytest.fixture(scope="module")
def place(make_models: Any, make_photos: Any, make_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, the workspace of their artifacts, pairs, and pairs with masks."""
    root = tmp_path_factory.mktemp("place")
    mse, gan = make_models(root / "models")
    make_photos(root / "photos", 18)
    process(Mining(photos=root / "photos", mse_model=str(mse), gan_model=gan, workspace=root / "ws"))
    make_pairs(root / "pairs", 2)
    make_pairs(root / "set", 2)
    for old, new in (("mse_sr", "MSE-SR"), ("gan_sr", "GAN-SR")):
        (root / "set" / old).rename(root / "set" / new)
    for path in (root / "set/GAN-SR").rglob("*.png"):
        mask = root / "set/GT-Mask" / path.relative_to(root / "set/GAN-SR")
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(encode_png(np.zeros((200, 240), np.uint8)))
    return root


# Of each command, the settings that it needs; HERE is the folder of `place`, NEW one that does not exist.
_MODELS = {"gan_model": "HERE/models/gan.pth", "mse_model": "HERE/models/mse.pth"}
_PAIRS = {"mse_sr": "HERE/pairs/mse_sr", "gan_sr": "HERE/pairs/gan_sr"}
_MINING = _MODELS | {"photos": "HERE/photos", "workspace": "NEW"}
GIVEN: dict[str, dict[str, str]] = {
    "mine": _MINING,
    "detect": _PAIRS | {"workspace": "NEW"},
    "twin": {"photos": "HERE/photos", "gan_model": _MODELS["gan_model"], "output": "NEW/twin.pth"},
    "finetune": {"workspace": "HERE/ws", "output": "NEW", "perceptual": "off"},
    "compare": {"workspace": "HERE/ws", "after": "HERE/models/mse.pth"},
    "cycle": _MINING | {"perceptual": "off"},
    "serve": _MINING | {"perceptual": "off"},
    "calibrate": {"workspace": "HERE/ws", "output": "NEW.toml"},
    "benchmark": {"dataset": "HERE/set", "output": "NEW"},
    "benchmark synthetic": _PAIRS | {"output": "NEW"},
    "verify": {"workspace": "HERE/ws"},
    "deliver": _MINING | {"output": "NEW/out"},
    "inspect": _MODELS | {"photos": "HERE/photos"},
}
# Settings that name a file of weights, and all others that may hold a path.
WEIGHTS = ("gan_model", "mse_model", "after", "before", "segmenter", "weights", "perceptual", "discriminator", "lpips",
           "severity_model")  # fmt: skip
OTHERS = {"photos", "workspace", "output", "lr", "mse_sr", "gan_sr", "labels", "dataset", "twin_photos"}
OTHERS |= {
    "exclude",
    "include",
    "method",
    "methods",
    "reference",
    "severity",
}  # globs, code by design, folders, a CSV file
TEXTS = {"min_area", "suffix", "group_by", "name", "mine_at", "cycle_at", "timezone", "webhook", "history"}
TEXTS |= {"image_column", "mask_column", "prominence_column"}


def _weights_settings() -> list[tuple[str, str]]:
    return [(verb, name) for verb, kind in SETTINGS.items() for name in kind.model_fields if name in WEIGHTS]


def test_each_setting_is_known_to_name_weights_or_not() -> None:
    for verb, kind in SETTINGS.items():
        for name, field in kind.model_fields.items():
            if {Path, str} & {field.annotation, *get_args(field.annotation)}:
                assert name in OTHERS | TEXTS | set(WEIGHTS), f"{verb} {name}: does it name a file of weights?"
    assert SETTINGS.keys() == GIVEN.keys()


@pytest.mark.parametrize(("verb", "name"), _weights_settings())
def test_commands_refuse_it(
    verb: str, name: str, files: tuple[dict[str, Path], Path], place: Path, desra_here: Desra, tmp_path: Path
) -> None:
    """In one line that names the file, before anything starts."""
    paths, trace = files
    for form in ("beside weights", "pickle 4"):
        value = f"mmseg:{_config()},{paths[form]}" if name == "segmenter" else str(paths[form])
        given = GIVEN[verb] | {name: value}
        given = {
            key: text.replace("HERE", str(place)).replace("NEW", str(tmp_path / "new")) for key, text in given.items()
        }
        positional = [given.pop(key) for key in ("photos", "dataset") if key in given and verb != "serve"]
        flags = [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", value)]
        line = refusal(desra_here(*verb.split(), *positional, *flags))
        assert str(paths[form]) in line
        assert len(line) < 800
        assert not trace.exists()
        assert not (tmp_path / "new").exists()


def _config() -> Path:
    found = find_spec("mmseg")  # importing it would warn
    if found is None:
        pytest.skip("MMSegmentation is not installed")
    return Path(str(found.origin)).parent / ".mim/configs/segformer/segformer_mit-b0_512x512_160k_ade20k.py"
