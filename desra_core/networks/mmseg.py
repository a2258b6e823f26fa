"""Read an MMSegmentation config and a checkpoint into a model that labels ADE20K classes, or say why not.

Only `load_mmseg` needs torch and mmseg; they are imported there.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from desra_core import third_party
from desra_core.errors import UsageError
from desra_core.files.hashing import LOAD_ERRORS, content_key, load_checkpoint, load_failure

_CONFIG_REMEDY = "use the config of MMSegmentation 0.x for this checkpoint (its wheel holds them in mmseg/.mim/configs)"
_DAMAGED_REMEDY = "download or copy the checkpoint again"
# A config is a Python program: it and the models built from it can raise these.
_CONFIG_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def mmseg_key(config: Path, checkpoint: Path) -> str:
    """Hash the content of a config, of the files that it inherits from, and of a checkpoint.

    Raises:
        UsageError: A file is missing or unreadable, or a config is no Python file.
    """
    configs = hashlib.blake2b(digest_size=16)
    for path in _config_chain(config):
        configs.update(bytes.fromhex(content_key(path)))
    return f"{configs.hexdigest()},{content_key(checkpoint)}"


def load_mmseg(config: Path, checkpoint: Path) -> tuple[Any, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Build the model of a config, load its weights and build its test pipeline.

    Args:
        config: A config of MMSegmentation 0.x for an ``EncoderDecoder`` that sees the whole image once. It is run.
        checkpoint: Weights for exactly this model; ``meta`` names ADE20K's 150 classes, as 0.x or 1.x writes it.

    Returns:
        The ``EncoderDecoder`` on the CPU, in evaluation mode, and the pipeline without its loading step.

    Raises:
        UsageError: A file is unreadable, they do not fit each other, or they are for other classes.
    """
    third_party.mend_mmcv()
    settings = _read_config(config)
    model, pipeline = _build(settings, config)
    _check_single_view(pipeline, config)
    content = _read_checkpoint(checkpoint)
    _check_classes(content, checkpoint)
    _load_weights(model, content, config, checkpoint)
    return model.eval(), pipeline


def _read_config(path: Path) -> Any:
    from mmcv import Config

    search_path = sys.path.copy()
    try:
        settings = Config.fromfile(str(path))
    except _CONFIG_ERRORS as error:
        sys.path[:] = search_path
        _drop_frames(error)
        raise UsageError(path, f"cannot be run as a config ({_one_line(error)})", _CONFIG_REMEDY) from None
    if not isinstance(settings.get("model"), dict):
        raise UsageError(path, "describes no model", _CONFIG_REMEDY)
    if "data" not in settings:
        generation = "is of MMSegmentation 1.x" if "data_preprocessor" in settings.model else "has no test pipeline"
        raise UsageError(path, generation, _CONFIG_REMEDY)
    if settings.model.get("type") != "EncoderDecoder":
        raise UsageError(path, "describes no EncoderDecoder", "use a config of such a model, for example SegFormer")
    return settings


def _drop_frames(error: BaseException) -> None:
    """Free the objects of mmcv that are left of a config that failed, quietly.

    It removes a temporary folder with an open self-deleting file in it, whose finalizer then prints a traceback.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _build(settings: Any, path: Path) -> tuple[Any, Callable[[dict[str, Any]], dict[str, Any]]]:
    from mmseg.datasets.pipelines import Compose
    from mmseg.models import build_segmentor

    try:
        settings.model.pretrained = None
        settings.model.train_cfg = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*avg_non_ignore")  # about a loss, for training
            model = build_segmentor(settings.model, test_cfg=settings.get("test_cfg"))
        pipeline = Compose(settings.data.test.pipeline[1:])
        mode, classes = model.test_cfg.mode, model.decode_head.out_channels
    except _CONFIG_ERRORS as error:
        raise UsageError(path, f"describes no model that can be built ({_one_line(error)})", _CONFIG_REMEDY) from None
    if mode != "whole":
        reason = f"infers in {mode} mode, but the class weights assume whole images"
        raise UsageError(path, reason, "set model.test_cfg = dict(mode='whole')")
    if classes != 150:
        raise UsageError(path, f"has a decode head for {classes} classes", "use a config for ADE20K, which has 150")
    return model, pipeline


def _check_single_view(pipeline: Callable[[dict[str, Any]], dict[str, Any]], path: Path) -> None:
    """Try the pipeline on a small image: it must give the network one view, not flipped."""
    image = np.zeros((64, 64, 3), np.uint8)
    try:
        views = pipeline({"img": image, "img_shape": image.shape, "ori_shape": image.shape,
                          "filename": None, "ori_filename": None})  # fmt: skip
        flips = [meta.data["flip"] for meta in views["img_metas"]]
        sizes = [view.data.shape for view in views["img"]]
    except _CONFIG_ERRORS as error:
        raise UsageError(path, f"has a test pipeline that fails ({_one_line(error)})", _CONFIG_REMEDY) from None
    if flips != [False] or len(sizes) != 1 or len(sizes[0]) != 3:
        reason = f"has a test pipeline that makes {len(sizes)} views of an image, scaled or flipped"
        raise UsageError(path, reason, "leave it one img_scale, no img_ratios and flip=False")


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    try:
        content = load_checkpoint(path)
    except LOAD_ERRORS as error:
        way = (
            "c = torch.load(path, weights_only=False), then torch.save(dict(state_dict=c['state_dict'], "
            "meta=dict(CLASSES=list(c['meta']['dataset_meta']['classes']))), new_path)"
        )
        raise load_failure(path, error, way) from None
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise UsageError(path, "is not a checkpoint of MMSegmentation: it has no state_dict", _DAMAGED_REMEDY)
    return content


def _check_classes(content: Mapping[str, Any], path: Path) -> None:
    """Hold ``meta['CLASSES']`` of 0.x or ``meta['dataset_meta']['classes']`` of 1.x against ADE20K's names."""
    from mmseg.datasets import ADE20KDataset

    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    newer = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, Mapping) else None)
    if not isinstance(names, list | tuple):
        remedy = "use a checkpoint as MMSegmentation saves it, with its meta"
        raise UsageError(path, "does not name its classes", remedy)
    names, expected = ([str(name).strip() for name in given] for given in (names, ADE20KDataset.CLASSES))
    remedy = "use a checkpoint trained on ADE20K: the weights of the classes are for it alone"
    if len(names) != len(expected):
        raise UsageError(path, f"has {len(names)} classes where ADE20K has {len(expected)}", remedy)
    for index, (name, ade) in enumerate(zip(names, expected, strict=True)):
        if name != ade:
            raise UsageError(path, f"calls class {index} {name!r} where ADE20K has {ade!r}", remedy)


def _load_weights(model: Any, content: Mapping[str, Any], config: Path, path: Path) -> None:
    import torch

    weights = {str(name).removeprefix("module."): value for name, value in content["state_dict"].items()}
    needed = model.state_dict()
    wrong = sorted(needed.keys() ^ weights.keys()) + [
        name
        for name, value in needed.items()
        if name in weights and not (isinstance(weights[name], torch.Tensor) and weights[name].shape == value.shape)
    ]
    if wrong:
        reason = f"does not fit {config}: {len(wrong)} parameters differ, such as {wrong[0]}"
        raise UsageError(path, reason, "give the config that it was trained with")
    model.load_state_dict(weights)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _config_chain(config: Path) -> list[Path]:
    """List a config and, depth first, the files that it inherits from by ``_base_``."""
    content_key(config)
    try:
        body = ast.parse(config.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise UsageError(config, f"is not a Python file ({_one_line(error)})", _CONFIG_REMEDY) from None
    chain = [config]
    for statement in body:
        if isinstance(statement, ast.Assign) and "_base_" in map(ast.unparse, statement.targets):
            try:
                bases = ast.literal_eval(statement.value)
            except ValueError:
                raise UsageError(config, "computes its _base_", "write _base_ as plain strings") from None
            for base in [bases] if isinstance(bases, str) else bases:
                chain += _config_chain(config.parent / base)
    return chain
