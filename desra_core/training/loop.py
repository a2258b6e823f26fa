"""The finetune, top to bottom: what is loaded, what moves, what is saved.

All that a run needs to go on is in ``state``; the patches of a step depend on the seed and the step alone. A run that
is killed at any moment and started again ends, on a CPU, with the very same weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from desra_core.errors import UsageError
from desra_core.gpu import lacks_memory
from desra_core.settings.models import Training
from desra_core.third_party import mend_basicsr
from desra_core.training.board import Board
from desra_core.training.generator import Generator, load_generator
from desra_core.training.losses import PerceptualLoss, keep_loss, load_discriminator, pixel_loss
from desra_core.training.patches import draw_batch, open_frozen
from desra_core.training.plan import settle_precision
from desra_core.training.run_folder import RunFolder, load_state, read_json, save_torch, write_json

mend_basicsr()

from basicsr.losses.gan_loss import GANLoss  # noqa: E402

BETAS = (0.9, 0.99)

# Losses are told as means of so many steps.
_LOG_EVERY = 10
_SAVE_SECONDS = 60.0
_TELL_SECONDS = 1.0
# Early stop: a checkpoint is no better unless its mean pixel loss is this much below that of the best one so far.
_IMPROVEMENT = 0.01
# A mean absolute error above this, of a range of 1, is no image any more.
_DIVERGED = 0.2

State = dict[str, Any]
Losses = dict[str, float]


class Ended(NamedTuple):
    """How a finetune ended: the iterations done, and whether it stopped because the loss had stopped falling."""

    iteration: int
    early: bool


def finetune(run: RunFolder, gan_model: Path, training: Training, device: str, threads: int) -> Ended:
    """Finetune a model on the frozen images of a run, from where the run was left.

    Parameters
    ----------
    run
        Its folder, with its document and its images.
    gan_model
        The parent.
    training
        How.
    device
        ``cpu`` or a CUDA device.
    threads
        CPU threads of a run that starts; one that goes on keeps to its number, on which the last bits depend.

    Raises
    ------
    UsageError
        A model or a saved state cannot be used, a batch needs more memory than there is, or the losses are not finite
        or diverge: the last good model is named.
    TransientError
        The disk is full or failed.
    """
    with run.locked(), _memory_told(training):
        torch.manual_seed(training.seed)
        nets = _load(gan_model, training, device, settle_precision(run, training, device))
        state = load_state(run.state)
        if state is None:
            state = {"iteration": 0, "warmed": 0, "threads": threads, "sums": {}, "since": {}, "losses": [],
                     "best": None, "worse": 0}  # fmt: skip
        else:
            _restore(nets, state)
            if state["iteration"]:  # with more iterations, or fewer, nothing is warmed up again
                nets = nets._replace(warmup=state["warmed"])
        torch.set_num_threads(state["threads"])
        pairs = open_frozen(run.data)

        def batch(purpose: int, step: int) -> list[torch.Tensor]:
            arrays = draw_batch(
                pairs,
                size=training.batch,
                patch=training.patch,
                mask_share=training.mask_share,
                scale=nets.generator.scale,
                seed=(training.seed, purpose, step),
            )
            return [torch.from_numpy(array).to(device, memory_format=torch.channels_last) for array in arrays]

        saved = told = time.monotonic()
        board = Board(run.tensorboard, state["iteration"])
        while state["warmed"] < nets.warmup:
            _warm_up(nets, batch(1, state["warmed"]), training)
            state["warmed"] += 1
            told = _tell(run, state, nets, training, told)
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = _save_state(run, nets, state)

        while state["iteration"] < training.iterations and state["worse"] < training.patience:
            losses = _step(nets, batch(0, state["iteration"]), training, run)
            state["iteration"] += 1
            _account(state, losses, board)
            checkpoint = state["iteration"] % training.checkpoint_every == 0
            checkpoint = checkpoint or state["iteration"] == training.iterations
            if checkpoint:
                _show(nets, batch(2, 0), board, state, run)
                _compare_with_best(state)
                _save_model(run, nets, state)
            if checkpoint or time.monotonic() - saved > _SAVE_SECONDS:
                saved = _save_state(run, nets, state)
            told = _tell(run, state, nets, training, told)
        _tell(run, state, nets, training, 0.0)
        return Ended(state["iteration"], early=state["iteration"] < training.iterations)


class _Nets(NamedTuple):
    """All that moves, or judges what moves. Without a GAN loss there is no discriminator."""

    generator: Generator
    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module | None
    optimizer_d: torch.optim.Optimizer | None
    warmup: int
    perceptual: nn.Module | None
    scaler: torch.amp.GradScaler
    amp: torch.dtype
    device: str


def _load(gan_model: Path, training: Training, device: str, precision: str) -> _Nets:
    generator = load_generator(gan_model)
    network = _placed(generator.network, device)
    discriminator = optimizer_d = None
    if training.gan_weight:
        discriminator = load_discriminator(training.discriminator, training.discriminator_features).train()
        discriminator = _placed(discriminator, device)
        optimizer_d = torch.optim.Adam(discriminator.parameters(), training.learning_rate, BETAS)
    perceptual = None if training.perceptual == "off" else PerceptualLoss(training.perceptual).to(device)
    if precision == "float16" and not device.startswith("cuda"):
        raise UsageError("--amp", "is float16, whose losses are scaled on a GPU only",
                         "go on with it on a GPU, or name another --output and use bfloat16 or float32")  # fmt: skip
    return _Nets(
        generator=generator,
        network=network,
        ema=copy.deepcopy(network).requires_grad_(False),
        optimizer=torch.optim.Adam(network.parameters(), training.learning_rate, BETAS),
        discriminator=discriminator,
        optimizer_d=optimizer_d,
        warmup=training.warmup_steps,
        perceptual=perceptual,
        scaler=torch.amp.GradScaler(device.partition(":")[0], enabled=precision == "float16"),
        amp=getattr(torch, precision),
        device=device,
    )


@contextlib.contextmanager
def _memory_told(training: Training) -> Iterator[None]:
    """Say of a lack of memory what would mend it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        parts, batch = training.accumulate, training.batch
        told = " ".join(str(error).split())[:200] or type(error).__name__
        each = f"{batch // parts} patches of {training.patch} px at a time need more memory than there is ({told})"
        more = next((count for count in range(parts + 1, batch + 1) if batch % count == 0), None)
        remedy = "begin another run with a smaller --patch" + ("" if batch == 1 else " or --batch")
        if more:
            remedy = f"raise --accumulate to {more}, with which the run goes on, or {remedy}"
        raise UsageError("--batch", each, remedy) from None


def _placed(module: nn.Module, device: str) -> nn.Module:
    """Move a module to a device, its weights in the memory format in which convolutions are fastest."""
    return module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _step(nets: _Nets, batch: list[torch.Tensor], training: Training, run: RunFolder) -> Losses:
    """Move the generator, then the discriminator; returns the losses before."""
    parts = list(zip(*(tensor.chunk(training.accumulate) for tensor in batch), strict=True))
    adversarial = GANLoss("vanilla")
    results: list[torch.Tensor] = []
    losses: Losses = {}

    def add(name: str, value: torch.Tensor) -> torch.Tensor:
        losses[name] = losses.get(name, 0.0) + value.item() / training.accumulate
        return value / training.accumulate

    nets.optimizer.zero_grad()
    for lr, pseudo_gt, mask in parts:
        with _autocast(nets):
            sr = nets.network(lr)
        sr = sr.float()
        loss = training.pixel_weight * add("pixel", pixel_loss(sr, pseudo_gt, mask, training))
        if training.keep_weight:
            loss = loss + training.keep_weight * add("keep", keep_loss(sr, pseudo_gt, mask))
        if nets.perceptual is not None:
            with _autocast(nets):
                loss = loss + training.perceptual_weight * add("perceptual", nets.perceptual(sr, pseudo_gt))
        if nets.discriminator is not None:
            nets.discriminator.requires_grad_(False)
            with _autocast(nets):
                logits = nets.discriminator(sr)
            loss = loss + training.gan_weight * add("gan", adversarial(logits.float(), True))
        _check(losses, sr, pseudo_gt, run)
        nets.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        results.append(sr.detach())
    nets.scaler.step(nets.optimizer)
    if nets.discriminator is not None:
        _move_discriminator(nets, [(pseudo_gt, sr) for (_, pseudo_gt, _), sr in zip(parts, results, strict=True)], add)
    nets.scaler.update()
    with torch.no_grad():
        for mean, current in zip(nets.ema.parameters(), nets.network.parameters(), strict=True):
            mean.lerp_(current, 1 - training.ema)
    return losses


def _warm_up(nets: _Nets, batch: list[torch.Tensor], training: Training) -> None:
    """Move the discriminator alone: a new one has nothing to say to the generator yet."""
    parts = list(zip(*(tensor.chunk(training.accumulate) for tensor in batch), strict=True))
    with torch.no_grad(), _autocast(nets):
        results = [nets.network(lr).float() for lr, _, _ in parts]
    pairs = [(pseudo_gt, sr) for (_, pseudo_gt, _), sr in zip(parts, results, strict=True)]
    _move_discriminator(nets, pairs, lambda _, value: value / training.accumulate)
    nets.scaler.update()


def _move_discriminator(nets: _Nets, pairs: list[tuple[torch.Tensor, torch.Tensor]], add: Any) -> None:
    """A step of the discriminator: pseudo-GT is real, results are not."""
    assert nets.discriminator is not None
    assert nets.optimizer_d is not None
    adversarial = GANLoss("vanilla")
    nets.discriminator.requires_grad_(True)
    nets.optimizer_d.zero_grad()
    for pair in pairs:
        for name, image, real in (("real", pair[0], True), ("fake", pair[1], False)):
            with _autocast(nets):
                logits = nets.discriminator(image)
            loss = add(f"discriminator_{name}", adversarial(logits.float(), real, is_disc=True))
            nets.scaler.scale(loss).backward()
    nets.scaler.step(nets.optimizer_d)


def _autocast(nets: _Nets) -> torch.autocast:
    return torch.autocast(nets.device.partition(":")[0], nets.amp, enabled=nets.amp != torch.float32)


def _show(nets: _Nets, batch: list[torch.Tensor], board: Board, state: State, run: RunFolder) -> None:
    """Add what the network now makes of some patches to the board, unless that is no image any more."""
    lr, pseudo_gt, _ = batch
    nets.network.eval()
    with torch.no_grad(), _autocast(nets):
        sr = nets.network(lr).float()
    nets.network.train()
    _check({}, sr, pseudo_gt, run)
    board.pictures(lr, sr, pseudo_gt, state["iteration"])


def _check(losses: Losses, sr: torch.Tensor, pseudo_gt: torch.Tensor, run: RunFolder) -> None:
    """Stop before a step that would spoil the weights, and before spoilt ones are saved as a model."""
    error = (sr - pseudo_gt).detach().abs().mean().item()
    bad = [name for name, value in (losses | {"pixel": error}).items() if not math.isfinite(value)]
    if not bad and error <= _DIVERGED:
        return
    models = run.models()
    reason = f"the {bad[0]} loss is not finite" if bad else f"the mean absolute error has grown to {error:.3g}"
    good = f"the last good model is {models[-1]}" if models else "no model had been saved"
    raise UsageError(run.root, reason, f"{good}; start another run with a lower --learning-rate")


def _account(state: State, losses: Losses, board: Board) -> None:
    """Add up the losses; every so often their means become a row of the log."""
    for name, value in losses.items():
        state["sums"][name] = state["sums"].get(name, 0.0) + value
    since = state["since"]
    since["steps"], since["pixel"] = since.get("steps", 0) + 1, since.get("pixel", 0.0) + losses["pixel"]
    if state["iteration"] % _LOG_EVERY == 0:
        row = {name: total / _LOG_EVERY for name, total in state["sums"].items()}
        state["losses"].append({"iteration": state["iteration"]} | row)
        state["sums"] = {}
        board.scalars(row, state["iteration"])


def _compare_with_best(state: State) -> None:
    """Count the checkpoints in a row that are no better than the best one before."""
    mean = state["since"]["pixel"] / state["since"]["steps"]
    state["since"] = {}
    if state["best"] is None or mean < (1 - _IMPROVEMENT) * state["best"]:
        state["best"], state["worse"] = mean, 0
    else:
        state["worse"] += 1


def _save_model(run: RunFolder, nets: _Nets, state: State) -> None:
    """Save both kinds of weights for the usual tools, with a record of where they come from beside."""
    path = run.model(state["iteration"])
    weights = {"params": nets.network, "params_ema": nets.ema}
    write_json(path.with_suffix(".json"), (read_json(run.document) or {}) | {"iteration": state["iteration"]})
    if nets.discriminator is not None:
        save_torch(path.with_suffix(".discriminator.pth"), {"params": nets.discriminator.state_dict()})
    save_torch(path, {name: nets.generator.checkpoint_weights(net.state_dict()) for name, net in weights.items()})


def _save_state(run: RunFolder, nets: _Nets, state: State) -> float:
    """Save all that it takes to go on; returns when."""
    random = {"rng": torch.get_rng_state()}
    if nets.device.startswith("cuda"):
        random["cuda_rng"] = torch.cuda.get_rng_state(nets.device)
    save_torch(run.state, state | random | {name: part.state_dict() for name, part in _moving(nets).items()})
    write_json(run.losses, state["losses"])
    return time.monotonic()


def _restore(nets: _Nets, state: State) -> None:
    """Put everything back where `_save_state` found it; only what is plain stays in the state."""
    for name, part in _moving(nets).items():
        part.load_state_dict(state.pop(name))
    torch.set_rng_state(state.pop("rng"))
    cuda_rng = state.pop("cuda_rng", None)
    if cuda_rng is not None and nets.device.startswith("cuda"):
        torch.cuda.set_rng_state(cuda_rng, nets.device)


def _moving(nets: _Nets) -> dict[str, Any]:
    """Everything that has a state dict of its own."""
    parts = {"generator": nets.network, "ema": nets.ema, "optimizer": nets.optimizer, "scaler": nets.scaler,
             "discriminator": nets.discriminator, "optimizer_d": nets.optimizer_d}  # fmt: skip
    return {name: part for name, part in parts.items() if part is not None}


def _tell(run: RunFolder, state: State, nets: _Nets, training: Training, told: float) -> float:
    """Write how far the run is, now and then; returns when that was last done."""
    if time.monotonic() - told < _TELL_SECONDS:
        return told
    last = state["losses"][-1] if state["losses"] else {}
    write_json(run.progress, {"iteration": state["iteration"], "iterations": training.iterations,
                              "warmed": state["warmed"], "warmup": nets.warmup, "worse": state["worse"],
                              "losses": last})  # fmt: skip
    return time.monotonic()
