"""Label every pixel of a GAN result with its ADE20K class.

A segmenter is named by a spec, ``mmseg:CONFIG,CHECKPOINT``. Its key, a fingerprint of everything that determines its
labels, is found without importing torch and mmseg.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desra_core import third_party
from desra_core.errors import ImageError, UsageError, described
from desra_core.files import content_key
from desra_core.gpu import exact_on
from desra_core.images.codec import CLASS_COUNT, Labels, Pixels, bgr8
from desra_core.images.parts import row_strips
from desra_core.networks.checkpoints import LOAD_ERRORS, load_checkpoint

if TYPE_CHECKING:
    import torch

Segmenter = Callable[[Pixels], Labels]
Pipeline = Callable[[dict[str, Any]], dict[str, Any]]

# Up to this height + width, ATen's CPU kernel rounds a class differently when it is resized without the others.
_SMALL_SIZE = 128
# The largest number of files that make up a config: MMSegmentation's have up to five.
_MOST_CONFIGS = 100
# Side of the image by which a segmenter is tried, in pixels.
_TRIED_SIDE = 128
_CONFIG_REMEDY = "use the config of MMSegmentation 0.x for this checkpoint (its wheel holds them in mmseg/.mim/configs)"
_RESAVE = (
    "c = torch.load(path, weights_only=False), then torch.save(dict(state_dict=c['state_dict'], "
    "meta=dict(CLASSES=list(c['meta']['dataset_meta']['classes']))), new_path)"
)


def segmenter_key(spec: str) -> str:
    """Fingerprint a segmenter: the content of its config, of the configs that this inherits, and of its checkpoint.

    Args:
        spec: ``mmseg:CONFIG,CHECKPOINT``.

    Raises:
        UsageError: The spec is malformed, or a file is missing, unreadable or no Python config.
    """
    config, checkpoint = _files(spec)
    configs = hashlib.blake2b(digest_size=16)
    for path in _config_chain(config):
        configs.update(bytes.fromhex(content_key(path)))
    return f"mmseg:{configs.hexdigest()},{content_key(checkpoint)}"


def segmenter_files(spec: str) -> list[Path]:
    """List the files of a segmenter: its configs and its checkpoint; none for another origin of labels.

    Args:
        spec: As for `segmenter_key`, or ``none`` or ``labels:DIR``.

    Raises:
        UsageError: As `segmenter_key`.
    """
    if not spec.startswith("mmseg:"):
        return []
    config, checkpoint = _files(spec)
    return [*_config_chain(config), checkpoint]


def load_segmenter(spec: str, device: str) -> Segmenter:
    """Load a segmenter, once per process for the same files and device.

    Args:
        spec: As for `segmenter_key`.
        device: A torch device, such as ``cpu`` or ``cuda:0``.

    Returns:
        A function that gives the ADE20K class of each pixel, ``(H, W)`` uint8 in 0..149, of ``(H, W, 1 or 3)`` pixels.

    Raises:
        UsageError: As `segmenter_key` and `MMSegSegmenter`.
    """
    key = segmenter_key(spec)
    with exact_on(device):
        return _loaded(*_files(spec), key, device)


def segment(segmenter: Segmenter, gan_sr: Pixels, path: Path) -> Labels:
    """Label the pixels of the result of a photo with a segmenter of `load_segmenter`.

    Raises:
        ImageError: The image is too narrow for the model; the error names ``path``.
    """
    try:
        return segmenter(gan_sr)
    except ImageError as error:
        raise type(error)(path, error.reason, error.remedy) from None


def try_segmenter(spec: str) -> None:
    """Load a segmenter and label a small image on the CPU, to fail before anything is started.

    Raises:
        UsageError: As `load_segmenter`, or the model cannot be run.
    """
    segmenter = load_segmenter(spec, "cpu")
    try:
        segmenter(np.zeros((_TRIED_SIDE, _TRIED_SIDE, 3), np.uint8))
    except LOAD_ERRORS as error:
        remedy = "give the config of a model that labels whole images, such as SegFormer"
        raise UsageError(
            _files(spec)[0], f"describes a model that cannot be run ({described(error)})", remedy
        ) from None


class MMSegSegmenter:
    """A whole-image MMSegmentation model for ADE20K, such as SegFormer.

    Labels are those of ``mmseg.apis.inference_segmentor``, with less memory: beside the image and its labels,
    nine bytes per pixel instead of about 1200.

    Args:
        config: A config of MMSegmentation 0.x for an ``EncoderDecoder`` that sees the whole image once. It is a Python
            file, which is run: trust its source as you trust the source of a program.
        checkpoint: Weights that fit the config; ``meta`` names ADE20K's 150 classes, as 0.x or 1.x writes it. Code in
            the file is not run.
        device: A torch device, such as ``cpu`` or ``cuda:0``.

    Raises:
        UsageError: One of the files is unreadable, does not fit the other, or is for other classes than ADE20K's.
    """

    def __init__(self, config: Path, checkpoint: Path, device: str) -> None:
        self._checkpoint = checkpoint
        self._device = device
        for package in ("mmcv", "mmseg"):
            third_party.require(package, "segmentation", "--segmenter")
        third_party.mend_mmcv()
        self._model, self._pipeline = _built(config)
        content = load_checkpoint(checkpoint, _RESAVE)
        if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
            reason = "is not a checkpoint of MMSegmentation: it has no state_dict"
            raise UsageError(checkpoint, reason, "download or copy the checkpoint again")
        _check_classes(content.get("meta"), checkpoint)
        weights = {str(name).removeprefix("module."): value for name, value in content["state_dict"].items()}
        needed = {name: value.shape for name, value in self._model.state_dict().items()}
        given = {name: getattr(value, "shape", None) for name, value in weights.items()}
        names = sorted(needed.keys() | given)
        wrong = [name for name in names if name not in given or name not in needed or given[name] != needed[name]]
        if wrong:
            reason = f"does not fit {config} (parameters that differ: {len(wrong)}, such as {wrong[0]})"
            raise UsageError(checkpoint, reason, "give the config that it was trained with")
        try:
            self._model.load_state_dict(weights)
        except LOAD_ERRORS as error:  # tensors that are not stored as their values side by side
            raise UsageError(checkpoint, f"cannot be loaded ({described(error)})", "save its weights again") from None
        self._model.eval().to(device)

    def __call__(self, gan_sr: Pixels) -> Labels:
        """Label ``(H, W, 1 or 3)`` pixels, uint8 or uint16; returns ``(H, W)`` uint8.

        Raises:
            ImageError: The image is too narrow for the model.
            UsageError: The weights give values that are not finite.
        """
        import torch

        network_input, kept_size = self._network_input(gan_sr)
        with exact_on(self._device), torch.inference_mode():
            network_input = network_input.to(self._device)
            labels = upsampled_argmax(
                self._logits(network_input),
                network_size=network_input.shape[2:],
                kept_size=kept_size,
                size=gan_sr.shape[:2],
                align_corners=self._model.align_corners,
            )
        return labels.cpu().numpy()

    def _network_input(self, gan_sr: Pixels) -> tuple[torch.Tensor, tuple[int, int]]:
        """Make the network's ``(1, 3, h, w)`` input by the config's test pipeline, and its size without padding."""
        # In strips: the temporaries of `bgr8` for 16 bits are six times the image.
        bgr = np.empty((*gan_sr.shape[:2], 3), np.uint8)
        for rows in row_strips(gan_sr.shape):
            bgr[rows] = bgr8(gan_sr[rows])
        views = _views(self._pipeline, bgr)
        # `.data` is the tensor, whether the pipeline wraps it into a DataContainer or not.
        return views["img"][0].data[None], views["img_metas"][0].data["img_shape"][:2]

    def _logits(self, network_input: torch.Tensor) -> torch.Tensor:
        model = self._model
        try:
            features = model.extract_feat(network_input)
            logits: torch.Tensor = model.decode_head.forward_test(features, None, model.test_cfg)
        except RuntimeError as error:
            if "Kernel size can't be greater than actual input size" not in str(error):
                raise
            height, width = network_input.shape[2:]
            subject = f"an image that becomes {width}x{height} pixels for segmentation"
            remedy = "crop it to a less extreme ratio, or remove it"
            raise ImageError(subject, "is too narrow for the model", remedy) from None
        if not bool(logits.isfinite().all()):
            raise UsageError(self._checkpoint, "gives values that are not finite", "copy or train it again")
        return logits


def upsampled_argmax(
    logits: torch.Tensor,
    *,
    network_size: tuple[int, ...],
    kept_size: tuple[int, ...],
    size: tuple[int, ...],
    align_corners: bool,
) -> torch.Tensor:
    """Resize logits to image size as MMSegmentation does, and keep only the winning class.

    Classes are resized one at a time: each value is the same to the bit as when all are resized at once. (Resizing
    strips of rows would change bits.) Of classes with equal values the lower one wins, as in ``argmax``.

    Args:
        logits: ``(1, classes, h, w)``, at most 256 classes.
        network_size: The size ``(h, w)`` of the network's input, to which mmseg resizes the logits first.
        kept_size: The size of the part of the input that is not padding.
        size: The size of the image.
        align_corners: The setting of the decode head.

    Returns:
        ``(H, W)`` uint8.
    """
    import torch
    from torch.nn.functional import interpolate

    if sum(network_size) <= _SMALL_SIZE or sum(size) <= _SMALL_SIZE:
        planes = interpolate(logits, network_size, mode="bilinear", align_corners=align_corners)
        planes = planes[:, :, : kept_size[0], : kept_size[1]]
        planes = interpolate(planes, size, mode="bilinear", align_corners=align_corners)
        return planes[0].argmax(0).to(torch.uint8)
    device = logits.device
    best = torch.full(size, -torch.inf, device=device)
    better = torch.empty(size, dtype=torch.bool, device=device)
    labels = torch.zeros(size, dtype=torch.uint8, device=device)
    # Resize into one buffer: at 64 MP, new memory for each class takes longer than the arithmetic.
    resized = torch.empty((1, 1, *size), device=device)
    for index in _possible_winners(logits, network_size):
        plane = interpolate(logits[:, index : index + 1], network_size, mode="bilinear", align_corners=align_corners)
        plane = plane[:, :, : kept_size[0], : kept_size[1]]
        torch.ops.aten.upsample_bilinear2d.out(plane, size, align_corners, None, None, out=resized)
        torch.gt(resized[0, 0], best, out=better)
        torch.maximum(resized[0, 0], best, out=best)
        # The index ascends, so the newer label is the larger one. masked_fill_ would take several times as long.
        torch.maximum(labels, better.view(torch.uint8).mul_(index), out=labels)
    return labels


def _possible_winners(logits: torch.Tensor, network_size: tuple[int, ...]) -> list[int]:
    """List the classes that may win some pixel, ascending: only they need resizing.

    Where logits are first resized by a factor of 1 or more, a pixel is a mean of values within a 3x3 window.
    So a class loses there if its maximum in the window is below the minimum of another class.
    """
    from torch.nn.functional import max_pool2d

    if network_size[0] < logits.shape[2] or network_size[1] < logits.shape[3]:
        return list(range(logits.shape[1]))
    highest = max_pool2d(logits, 3, stride=1, padding=1)
    lowest = max_pool2d(logits.neg(), 3, stride=1, padding=1).neg_()
    rounding = 1e-4 * logits.abs().max()
    contends = highest + rounding >= lowest.amax(dim=1, keepdim=True)
    indices: list[int] = contends.any(dim=(0, 2, 3)).nonzero().flatten().tolist()
    return indices


@lru_cache(maxsize=2)
def _loaded(config: Path, checkpoint: Path, _key: str, device: str) -> MMSegSegmenter:
    return MMSegSegmenter(config, checkpoint, device)


def _files(spec: str) -> tuple[Path, Path]:
    kind, _, names = spec.partition(":")
    parts = [name.strip() for name in names.split(",")]
    if kind != "mmseg" or len(parts) != 2 or not all(parts):
        remedy = "give the paths of a config and a checkpoint, none with a comma in it"
        raise UsageError(f"segmenter {spec!r}", "is not of the form mmseg:CONFIG,CHECKPOINT", remedy)
    config, checkpoint = (Path(name).expanduser().absolute() for name in parts)
    return config, checkpoint


def _config_chain(config: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """List a config and, depth first, the files that it inherits from by ``_base_``; ``above`` inherit from it."""
    content_key(config)  # raises where the file cannot be read
    if config.resolve() in above:
        raise UsageError(config, "inherits from itself by _base_", _CONFIG_REMEDY)
    try:
        body = ast.parse(config.read_bytes()).body
        given = [node.value for node in body if isinstance(node, ast.Assign) and _sets_base(node)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(config, f"is not a Python file ({described(error)})", _CONFIG_REMEDY) from None
    chain = [config]
    for value in given:
        try:
            bases = ast.literal_eval(value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            bases = None
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list | tuple) or not all(isinstance(base, str) for base in bases):
            raise UsageError(config, "computes its _base_", "write _base_ as plain strings")
        for base in bases:
            chain += _config_chain(config.parent / base, (*above, config.resolve()))
            if len(chain) > _MOST_CONFIGS:
                raise UsageError(config, f"inherits from more than {_MOST_CONFIGS} files", _CONFIG_REMEDY)
    return chain


def _sets_base(statement: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "_base_" for target in statement.targets)


def _built(config: Path) -> tuple[Any, Pipeline]:
    """Build the ``EncoderDecoder`` of a config, and its test pipeline without the step that loads a file."""
    from mmcv import Config
    from mmseg.datasets.pipelines import Compose
    from mmseg.models import build_segmentor

    search_path = sys.path.copy()
    try:
        settings = Config.fromfile(str(config))
    except LOAD_ERRORS as error:
        sys.path[:] = search_path
        _drop_frames(error)
        raise UsageError(config, f"cannot be run as a config ({described(error)})", _CONFIG_REMEDY) from None
    if not isinstance(settings.get("model"), dict):
        raise UsageError(config, "describes no model", _CONFIG_REMEDY)
    if "data" not in settings:
        generation = "is of MMSegmentation 1.x" if "data_preprocessor" in settings.model else "has no test pipeline"
        raise UsageError(config, generation, _CONFIG_REMEDY)
    if settings.model.get("type") != "EncoderDecoder":
        raise UsageError(config, "describes no EncoderDecoder", "use a config of such a model, for example SegFormer")
    try:
        settings.model.pretrained = None
        settings.model.train_cfg = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*avg_non_ignore")  # about a loss of training
            model = build_segmentor(settings.model, test_cfg=settings.get("test_cfg"))
        pipeline = Compose(settings.data.test.pipeline[1:])
        mode, classes = model.test_cfg.mode, model.decode_head.out_channels
    except LOAD_ERRORS as error:
        reason = f"describes no model that can be built ({described(error)})"
        raise UsageError(config, reason, _CONFIG_REMEDY) from None
    if mode != "whole":
        reason = f"infers in {mode} mode, but the class weights assume whole images"
        raise UsageError(config, reason, "set model.test_cfg = dict(mode='whole')")
    if classes != CLASS_COUNT:
        raise UsageError(config, f"has a decode head for {classes} classes", "use a config for ADE20K, which has 150")
    _check_single_view(pipeline, config)
    return model, pipeline


def _drop_frames(error: BaseException) -> None:
    """Free the objects that mmcv leaves when a config fails.

    mmcv removes a temporary folder with an open self-deleting file in it, whose finalizer then prints a traceback.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _views(pipeline: Pipeline, bgr: Any) -> dict[str, Any]:
    """Run a test pipeline on an image, as ``inference_segmentor`` does for an array."""
    sizes = {"img_shape": bgr.shape, "ori_shape": bgr.shape}
    return pipeline({"img": bgr, **sizes, "filename": None, "ori_filename": None})


def _check_single_view(pipeline: Pipeline, path: Path) -> None:
    """Check with a small image that the pipeline gives the network one view of it, not flipped."""
    try:
        views = _views(pipeline, np.zeros((64, 64, 3), np.uint8))
        flips = [meta.data["flip"] for meta in views["img_metas"]]
        sizes = [view.data.shape for view in views["img"]]
    except LOAD_ERRORS as error:
        raise UsageError(path, f"has a test pipeline that fails ({described(error)})", _CONFIG_REMEDY) from None
    if flips != [False] or len(sizes) != 1 or len(sizes[0]) != 3:
        reason = f"has a test pipeline that makes {len(sizes)} views of an image, scaled or flipped"
        raise UsageError(path, reason, "leave it one img_scale, no img_ratios and flip=False")


def _check_classes(meta: Any, path: Path) -> None:
    """Compare ``CLASSES``, as 0.x writes it, or ``dataset_meta['classes']``, as 1.x does, to ADE20K's names."""
    from mmseg.datasets import ADE20KDataset

    meta = meta if isinstance(meta, Mapping) else {}
    newer = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, Mapping) else None)
    if not isinstance(names, list | tuple):
        raise UsageError(
            path, "does not name its classes", "use a checkpoint as MMSegmentation saves it, with its meta"
        )
    names, expected = ([str(name).strip() for name in given] for given in (names, ADE20KDataset.CLASSES))
    remedy = "use a checkpoint trained on ADE20K: the weights of the classes are for it alone"
    if len(names) != len(expected):
        raise UsageError(path, f"has {len(names)} classes where ADE20K has {len(expected)}", remedy)
    for index, (name, ade) in enumerate(zip(names, expected, strict=True)):
        if name != ade:
            raise UsageError(path, f"calls class {index} {name!r} where ADE20K has {ade!r}", remedy)
