"""Label every pixel of a GAN result with its ADE20K class.

A segmenter is named by a spec, ``mmseg:CONFIG,CHECKPOINT``. Its key, a fingerprint of everything that
determines its labels, is found without importing torch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from desra_core.errors import ImageError, UsageError
from desra_core.gpu import exact_on
from desra_core.images.bit_depth import bgr8
from desra_core.images.codec import Labels, Pixels
from desra_core.networks.mmseg import load_mmseg, mmseg_key

if TYPE_CHECKING:
    import torch

_BAND_ROWS = 512
# Up to this height + width, ATen's CPU kernel rounds differently from class to class of one call.
_SMALL_SIZE = 128
# Side of the image by which a segmenter is tried, in pixels.
_TRIED_SIDE = 128
# Networks that do not fit their config raise these.
_MISFIT_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Segmenter(Protocol):
    """A segmentation model for ADE20K's 150 classes."""

    key: str
    """Fingerprint of everything that determines the labels."""

    def __call__(self, gan_sr: Pixels) -> Labels:
        """Return the ADE20K class of each pixel, ``(H, W)`` uint8 in 0..149, of ``(H, W, 1 or 3)`` pixels."""
        ...


def segmenter_key(spec: str) -> str:
    """Fingerprint a segmenter: the content of its config, of that one's bases and of its checkpoint.

    Args:
        spec: ``mmseg:CONFIG,CHECKPOINT``.

    Raises:
        UsageError: The spec is malformed, or a file is missing, unreadable or no Python config.
    """
    return f"mmseg:{mmseg_key(*_mmseg_files(spec))}"


def load_segmenter(spec: str, device: str) -> Segmenter:
    """Load a segmenter, once per process for the same files and device.

    Args:
        spec: As for `segmenter_key`.
        device: A torch device, such as ``cpu`` or ``cuda:0``.

    Raises:
        UsageError: As `segmenter_key` and `MMSegSegmenter`.
    """
    config, checkpoint = _mmseg_files(spec)
    with exact_on(device):
        return _loaded(config, checkpoint, mmseg_key(config, checkpoint), device)


def try_segmenter(spec: str) -> None:
    """Load a segmenter and label a small image on the CPU, to fail before anything is started.

    Raises:
        UsageError: As `load_segmenter`, or it cannot be run.
    """
    segmenter = load_segmenter(spec, "cpu")
    try:
        segmenter(np.zeros((_TRIED_SIDE, _TRIED_SIDE, 3), np.uint8))
    except (UsageError, MemoryError):
        raise
    except _MISFIT_ERRORS as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "give the config of a model that labels whole images, such as SegFormer"
        raise UsageError(_mmseg_files(spec)[0], f"describes a model that cannot be run ({problem})", remedy) from None


class MMSegSegmenter:
    """A whole-image MMSegmentation model for ADE20K, such as SegFormer.

    Labels are those of ``mmseg.apis.inference_segmentor``, with less memory: beside the image and its labels,
    nine bytes per pixel instead of about 1200.

    Args:
        config: A config of MMSegmentation 0.x. It is a Python file, which is run: take it from where you take code.
        checkpoint: Weights that fit the config, with the classes in ``meta`` as 0.x or 1.x writes them. Cannot run
            code.
        device: A torch device, such as ``cpu`` or ``cuda:0``.

    Raises:
        UsageError: One of the files is unreadable, does not fit the other, or is for other classes than ADE20K's.
    """

    def __init__(self, config: Path, checkpoint: Path, device: str) -> None:
        self.key = f"mmseg:{mmseg_key(config, checkpoint)}"
        self._checkpoint = checkpoint
        self._device = device
        self._model, self._pipeline = load_mmseg(config, checkpoint)
        self._model.to(device)

    def __call__(self, gan_sr: Pixels) -> Labels:
        """Label ``(H, W, 1 or 3)`` pixels, uint8 or uint16; returns ``(H, W)`` uint8.

        Raises:
            ImageError: The image is too narrow for the model.
            UsageError: The weights give values that are not finite.
        """
        import torch

        with exact_on(self._device), torch.inference_mode():
            network_input, kept = self._network_input(gan_sr)
            logits = self._logits(network_input)
            labels = upsampled_argmax(
                logits,
                network_size=network_input.shape[2:],
                kept_size=kept,
                size=gan_sr.shape[:2],
                align_corners=self._model.align_corners,
            )
        return labels.cpu().numpy()

    def _network_input(self, gan_sr: Pixels) -> tuple[torch.Tensor, tuple[int, int]]:
        """Make the network's ``(1, 3, h, w)`` input by the config's test pipeline, and its unpadded size."""
        # In bands of rows: the temporaries of `bgr8` for 16 bits are six times the image.
        bgr = np.empty((*gan_sr.shape[:2], 3), np.uint8)
        for top in range(0, gan_sr.shape[0], _BAND_ROWS):
            bgr[top : top + _BAND_ROWS] = bgr8(gan_sr[top : top + _BAND_ROWS])
        names = {"filename": None, "ori_filename": None}  # as for an array given to inference_segmentor
        views = self._pipeline({"img": bgr, "img_shape": bgr.shape, "ori_shape": bgr.shape, **names})
        rows, columns = views["img_metas"][0].data["img_shape"][:2]
        # `.data` is the tensor, whether the pipeline wraps it into a DataContainer or not
        return views["img"][0].data[None].to(self._device), (int(rows), int(columns))

    def _logits(self, network_input: torch.Tensor) -> torch.Tensor:
        model = self._model
        try:
            logits: torch.Tensor = model.decode_head.forward_test(
                model.extract_feat(network_input), None, model.test_cfg
            )
        except RuntimeError as error:
            if "Kernel size can't be greater than actual input size" not in str(error):
                raise
            rows, columns = network_input.shape[2:]
            raise ImageError(
                f"an image that becomes {columns}x{rows} pixels for segmentation",
                "is too narrow for the model",
                "crop it to a less extreme ratio, or remove it",
            ) from None
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

    One class at a time: each value is the same to the bit as when all are resized at once, which is not so for a band
    of rows. Equal values go to the lower class, as in ``argmax``.

    Args:
        logits: ``(1, classes, h, w)``, at most 256 classes.
        network_size: The size of the network's input, to which mmseg resizes first.
        kept_size: The part of it that is not padding.
        size: The size of the image.
        align_corners: As the decode head has it.

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
    # Resizing into one buffer: at 64 MP, fresh pages for each class cost more than the arithmetic.
    resized = torch.empty((1, 1, *size), device=device)
    for index in _possible_winners(logits, network_size):
        plane = interpolate(logits[:, index : index + 1], network_size, mode="bilinear", align_corners=align_corners)
        plane = plane[:, :, : kept_size[0], : kept_size[1]]
        torch.ops.aten.upsample_bilinear2d.out(plane, size, align_corners, None, None, out=resized)
        torch.gt(resized[0, 0], best, out=better)
        torch.maximum(resized[0, 0], best, out=best)
        # The index ascends, so the larger label is the newer one; several times faster than masked_fill_.
        torch.maximum(labels, better.view(torch.uint8).mul_(index), out=labels)
    return labels


def _possible_winners(logits: torch.Tensor, network_size: tuple[int, ...]) -> list[int]:
    """List the classes that may win some pixel, ascending: only they need resizing.

    Where logits are first resized by a factor of 1 or more, a pixel is a mean of values within a 3x3 window.
    So a class stays below another one there if its maximum is below the other's minimum.
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


def _mmseg_files(spec: str) -> tuple[Path, Path]:
    kind, _, names = spec.partition(":")
    parts = [name.strip() for name in names.split(",")]
    if kind != "mmseg" or len(parts) != 2 or not all(parts):
        remedy = "give the paths of a config and a checkpoint, none with a comma in it"
        raise UsageError(f"segmenter {spec!r}", "is not of the form mmseg:CONFIG,CHECKPOINT", remedy)
    config, checkpoint = (Path(name).expanduser().absolute() for name in parts)
    return config, checkpoint
