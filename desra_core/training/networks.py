"""The networks of a finetune and its losses: the generator, VGG19 features, and a U-Net discriminator."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.spectral_norm import SpectralNorm

from desra_core.errors import UsageError
from desra_core.networks.architectures import ARCHITECTURES
from desra_core.networks.checkpoints import LOAD_ERRORS, read_weights, recognised, spandrel
from desra_core.settings.models import Training
from desra_core.third_party import mend_basicsr, mend_torchvision

# The layers of the perceptual loss, before ReLU: index in VGG19's features, and weight.
PERCEPTUAL_LAYERS = {"conv1_2": (2, 0.1), "conv2_2": (7, 0.1), "conv3_4": (16, 1.0), "conv4_4": (25, 1.0),
                     "conv5_4": (34, 1.0)}  # fmt: skip

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Generator:
    """A super-resolution network in training: spandrel's module, float32.

    ``scale`` is the side of an LR pixel in SR pixels. ``weights`` are the parent checkpoint's tensors by their names.
    ``names`` maps these names to the names in ``network``, for the tensors that the network holds.
    """

    network: nn.Module
    scale: int
    weights: dict[str, torch.Tensor]
    names: dict[str, str]

    def checkpoint_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename a state dict of the network to the parent checkpoint's names, so that the usual tools load it."""
        return {
            name: state[self.names[name]].detach().cpu().clone() if name in self.names else value
            for name, value in self.weights.items()
        }


def load_generator(path: Path) -> Generator:
    """Load a network to be finetuned, on the CPU.

    Raises `UsageError` as `desra_core.networks.load_model`, and where the architecture cannot be finetuned.
    """
    descriptor = recognised(path)
    entry = ARCHITECTURES.get(str(descriptor.architecture.id))
    if entry is None or entry.trainable is None:
        known = ", ".join(sorted(known.trainable for known in ARCHITECTURES.values() if known.trainable))
        name = descriptor.architecture.name
        raise UsageError(path, f"is a network that cannot be finetuned here ({name})", f"those that can are {known}")
    weights = read_weights(path)
    # Number the names in the checkpoint, and fill each tensor with the number of its name. After spandrel has renamed
    # the tensors, their values still say which names they had.
    ordered = list(weights)
    numbered = {name: torch.full_like(weights[name], index, dtype=torch.float32) for index, name in enumerate(ordered)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SwinIR warns about torch.meshgrid
        state = spandrel().ModelLoader().load_from_state_dict(numbered).model.state_dict()
    own = {ordered[int(value.flatten()[0])]: name for name, value in state.items() if value.is_floating_point()}
    network = descriptor.model.float().train().requires_grad_(True)
    names = {name: own[name] for name in ordered if name in own}
    return Generator(network, int(descriptor.scale), weights, names)


def pixel_loss(sr: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, training: Training) -> torch.Tensor:
    """Average the absolute or squared difference of ``(N, 3, H, W)`` images, weighted in the mask ``(N, 1, H, W)``."""
    difference = functional.l1_loss if training.pixel == "l1" else functional.mse_loss
    return (difference(sr, target, reduction="none") * (1 + (training.mask_weight - 1) * mask)).mean()


def keep_loss(sr: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the absolute difference outside the mask, where the pseudo-GT is the old model's result."""
    return (functional.l1_loss(sr, target, reduction="none") * (1 - mask)).mean()


def gan_loss(logits: torch.Tensor, *, real: bool) -> torch.Tensor:
    """Compute Real-ESRGAN's "vanilla" GAN loss: the cross-entropy of a discriminator's logits to real or fake."""
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


class PerceptualLoss(nn.Module):
    """Sum the weighted mean absolute differences of VGG19 features of ``(N, 3, H, W)`` images in 0..1."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.features = _vgg19_features(weights)
        self.features.eval().requires_grad_(False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, sr: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss."""
        with torch.no_grad():
            wanted = self._layers(target)
        pairs = zip(self._layers(sr), wanted, PERCEPTUAL_LAYERS.values(), strict=True)
        return torch.stack([weight * functional.l1_loss(a, b) for a, b, (_, weight) in pairs]).sum()

    def _layers(self, image: torch.Tensor) -> list[torch.Tensor]:
        wanted = {index for index, _ in PERCEPTUAL_LAYERS.values()}
        values, found = (image - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            values = layer(values)
            if index in wanted:
                found.append(values.clone())  # the ReLU that follows works in place
        return found


def load_discriminator(path: Path | None, features: int) -> nn.Module:
    """Load Real-ESRGAN's U-Net discriminator with spectral norm, or make a new one with ``features`` channels.

    Raises `UsageError` where the file holds something else.
    """
    mend_basicsr()
    from basicsr.archs.discriminator_arch import UNetDiscriminatorSN

    if path is None:
        return _norms_in_float32(UNetDiscriminatorSN(3, num_feat=features))
    weights = read_weights(path)
    remedy = "give the discriminator that the GAN model was trained with, or none"
    first = weights.get("conv0.weight")
    if first is None or first.ndim != 4:
        raise UsageError(path, "is no U-Net discriminator with spectral norm", remedy)
    if first.shape[1] != 3:
        reason = f"judges images of {first.shape[1]} channels, but the generator makes 3"
        raise UsageError(path, reason, remedy)
    network: nn.Module = UNetDiscriminatorSN(3, num_feat=first.shape[0])
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise UsageError(path, "does not fit a U-Net discriminator with spectral norm", remedy) from None
    return _norms_in_float32(network)


def _norms_in_float32(network: nn.Module) -> nn.Module:
    """Exempt spectral norms from autocast: on a GPU their power iteration would have bfloat16's 8 bits."""

    def exempt(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def computed(module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
            with torch.autocast(next(module.parameters()).device.type, enabled=False):
                return compute(module, do_power_iteration)

        return computed

    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                hook.compute_weight = exempt(hook.compute_weight)  # type: ignore[method-assign]
    return network


def _vgg19_features(weights: str) -> nn.Sequential:
    """Load the layers of VGG19 up to the deepest one that is used, with torchvision's weights or those of a file."""
    mend_torchvision()
    from torchvision.models import VGG19_Weights, vgg19

    deepest = max(index for index, _ in PERCEPTUAL_LAYERS.values())
    # On "meta" nothing takes memory; the unused classifier would take 500 MB.
    with torch.device("meta"):
        features: nn.Sequential = vgg19(weights=None).features[: deepest + 1]
    if weights == "vgg19":
        try:
            found = torch.hub.load_state_dict_from_url(
                VGG19_Weights.IMAGENET1K_V1.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (URLError, *LOAD_ERRORS) as error:
            why = " ".join(str(error).split())[:120]
            reason = f"vgg19, whose weights are not here and cannot be downloaded ({why})"
            raise UsageError("--perceptual", reason, "give a local vgg19-dcbb9e9d.pth, or --perceptual off") from None
    else:
        found = read_weights(Path(weights))
    own = {name.removeprefix("features."): value.float() for name, value in found.items()}
    try:
        features.load_state_dict({name: own[name] for name in features.state_dict()}, assign=True)
    except (KeyError, RuntimeError):
        raise UsageError(weights, "holds no weights of VGG19", "give torchvision's vgg19-dcbb9e9d.pth") from None
    return features
