"""The training of a finetune or of a twin, top to bottom: load, warm up, step, save.

The saved state holds all that a run needs to go on, and the patches of a step depend only on the seed and the step. On
a CPU, a run that is killed at any moment and started again ends with the same weights to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from desra_core.errors import UsageError
from desra_core.files import read_document, storage_errors, write_json
from desra_core.gpu import lacks_memory
from desra_core.networks.checkpoints import load_checkpoint, save_torch
from desra_core.settings.models import Training, Twinning
from desra_core.training import networks
from desra_core.training.patches import Batch, check_frozen, draw_batch, open_frozen
from desra_core.training.plan import RunFolder, settle_precision
from desra_core.training.twin import draw_degraded, open_crops

BETAS = (0.9, 0.99)
SAVE_SECONDS = 60.0
PROGRESS_SECONDS = 1.0

_PICTURES = 4  # patches in a picture of the board
# The log has the means of the losses over this many steps.
_LOG_EVERY = 10
# Batches of held-out photos by which a twin is compared at each checkpoint.
_HELD_OUT_STEPS = 8
# Early stop: a checkpoint is better when its mean pixel loss is lower than the best one's by this share.
_IMPROVEMENT = 0.01
# With a larger mean absolute error, of values in 0..1, the results have diverged from the pseudo-GT.
_DIVERGED = 0.2

# ``iteration``, ``warmed``: steps done. ``sums``, ``since``: sums of losses since the last row of the log (``losses``)
# and since the last checkpoint. ``best``: the least mean pixel loss. ``worse``: the latest checkpoints that were no
# better.
State = dict[str, Any]
Losses = dict[str, float]


def finetune(
    run: RunFolder, gan_model: Path, training: Training, device: str, threads: int, twinning: Twinning | None = None
) -> int:
    """Train a model on the frozen images of a run, from its last saved state on: a finetune, or an MSE twin.

    Args:
        run: The folder of the run, with its document and its images.
        gan_model: The parent.
        training: The settings.
        device: ``cpu`` or a CUDA device.
        threads: CPU threads of a new run. A run that goes on keeps its own number: the weights' last bits depend on it.
        twinning: The settings of a twin: its photos are degraded on the fly, its learning rate falls as a cosine, and
            its checkpoints are compared by held-out photos. None for a finetune.

    Returns:
        The iterations done: fewer than those asked for where the loss no longer fell.

    Raises:
        UsageError: A model or a saved state cannot be used, a batch needs more memory than there is, or the losses are
            not finite or diverge: the error names the last good model.
        TransientError: The disk is full or failed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.locked())
        stack.enter_context(_memory_explained(training))
        trainer = Trainer(run, gan_model, training, device, threads)
        state = trainer.state
        torch.set_num_threads(state["threads"])
        draw = _drawing(run.data, training, trainer.generator.scale, twinning)
        batch = stack.enter_context(batches(draw, device, ahead=device.startswith("cuda")))
        board = Board(run.tensorboard, state["iteration"])
        while state["warmed"] < trainer.warmup:
            trainer.warm_up(batch(1, state["warmed"]))
            state["warmed"] += 1
            trainer.save_now_and_then()

        while state["iteration"] < training.iterations and state["worse"] < training.patience:
            if twinning:
                trainer.set_learning_rate(state["iteration"] / training.iterations)
            losses = trainer.step(batch(0, state["iteration"]))
            state["iteration"] += 1
            _log(state, losses, board)
            checkpoint = state["iteration"] % training.checkpoint_every == 0
            checkpoint = checkpoint or state["iteration"] == training.iterations
            if checkpoint:
                board.pictures(*trainer.enlarge(batch(2, 0)), state["iteration"])
                if twinning:  # the photos of single steps differ too much to tell
                    held_out = (trainer.enlarge(batch(3, step), ema=True) for step in range(_HELD_OUT_STEPS))
                    errors = [(sr - sharp).abs().mean().item() for _, sr, sharp in held_out]
                    state["since"] = {"pixel": sum(errors), "steps": len(errors)}
                trainer.save_model(state["since"]["pixel"] / state["since"]["steps"])
                compare_with_best(state)
            trainer.save_now_and_then(checkpoint=checkpoint)
        trainer.write_progress()
        return int(state["iteration"])


def _drawing(data: Path, training: Training, scale: int, twinning: Twinning | None) -> Callable[[int, int], Batch]:
    """Open the frozen images of a run; return a function that draws a batch for a purpose and a step.

    The purposes are 0 for steps, 1 for the warm-up, 2 for pictures, and 3 for the held-out loss of a twin.
    """
    check_frozen(data)
    if twinning:
        pools = [open_crops(data, pool) for pool in ("training", "held_out")]
        return lambda purpose, step: draw_degraded(
            *pools[purpose >= 2], twinning, scale, (training.seed, purpose, step)
        )
    pairs = open_frozen(data)
    return lambda purpose, step: draw_batch(pairs, training, scale, (training.seed, purpose, step))


@contextlib.contextmanager
def batches(
    draw: Callable[[int, int], Batch], device: str, *, ahead: bool
) -> Iterator[Callable[[int, int], list[torch.Tensor]]]:
    """Give a function that draws a batch onto the device, for a purpose and a step as `_drawing` has them.

    With ``ahead``, the batch of the next step is drawn before it is asked for.
    """
    on_gpu = device.startswith("cuda")
    coming: dict[tuple[int, int], Future[list[torch.Tensor]]] = {}

    def tensors(purpose: int, step: int) -> list[torch.Tensor]:
        drawn = [torch.from_numpy(array) for array in draw(purpose, step)]
        return [tensor.pin_memory() for tensor in drawn] if on_gpu else drawn

    thread = ThreadPoolExecutor(1)  # for all batches, because the degradation seeds generators of the process

    def batch(purpose: int, step: int) -> list[torch.Tensor]:
        found = coming.pop((purpose, step), None) or thread.submit(tensors, purpose, step)
        if ahead and purpose < 2:
            for unwanted in coming.values():
                unwanted.cancel()
            coming.clear()
            coming[purpose, step + 1] = thread.submit(tensors, purpose, step + 1)
        place: dict[str, Any] = {"memory_format": torch.channels_last, "non_blocking": on_gpu}
        return [tensor.to(device, **place) for tensor in found.result()]

    try:
        yield batch
    finally:
        thread.shutdown(cancel_futures=True)


class Trainer:
    """Hold networks, optimisers, AMP state and counters (``state``) of a run, restored from its saved state or new.

    The discriminator is None where ``gan_weight`` is 0. Raises as `finetune`.
    """

    def __init__(self, run: RunFolder, gan_model: Path, training: Training, device: str, threads: int) -> None:
        precision = settle_precision(run, training, device)
        if precision == "float16" and not device.startswith("cuda"):
            remedy = "go on with it on a GPU, or name another --output and use bfloat16 or float32"
            raise UsageError("--amp", "is float16, whose losses are scaled on a GPU only", remedy)
        torch.manual_seed(training.seed)
        self._run, self._training, self._device = run, training, device
        self._amp: torch.dtype = getattr(torch, precision)
        self.generator = networks.load_generator(gan_model)
        # Convolutions are fastest in this memory format.
        place: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
        self._network = self.generator.network.to(**place)
        self._ema = copy.deepcopy(self._network).requires_grad_(False)
        self._fused = fused = device.startswith("cuda")
        self._optimizer = torch.optim.Adam(self._network.parameters(), training.learning_rate, BETAS, fused=fused)
        self._discriminator: nn.Module | None = None
        self._optimizer_d: torch.optim.Optimizer | None = None
        if training.gan_weight:
            discriminator = networks.load_discriminator(training.discriminator, training.discriminator_features)
            self._discriminator = discriminator.train().to(**place)
            self._optimizer_d = torch.optim.Adam(
                self._discriminator.parameters(), training.learning_rate, BETAS, fused=fused
            )
        self._perceptual: nn.Module | None = None
        if training.perceptual != "off":
            self._perceptual = networks.PerceptualLoss(training.perceptual).to(**place)
        self._scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=precision == "float16")
        self.state = self._resumed() or {"iteration": 0, "warmed": 0, "threads": threads, "sums": {}, "since": {},
                                         "losses": [], "best": None, "worse": 0}  # fmt: skip
        # A run whose iterations have begun is not warmed up again, whatever the settings are now.
        self.warmup: int = self.state["warmed"] if self.state["iteration"] else training.warmup_steps
        self._saved = self._written = time.monotonic()

    def step(self, batch: list[torch.Tensor]) -> Losses:
        """Make a step of the generator, then of the discriminator; returns the losses before the step."""
        training, losses = self._training, _Losses(self._training.accumulate)
        parts, results = self._parts(batch), []
        self._optimizer.zero_grad()
        for lr, pseudo_gt, mask in parts:
            with self._autocast():
                sr = self._network(lr)
            sr = sr.float()
            loss = training.pixel_weight * losses.add("pixel", networks.pixel_loss(sr, pseudo_gt, mask, training))
            if training.keep_weight:
                loss = loss + training.keep_weight * losses.add("keep", networks.keep_loss(sr, pseudo_gt, mask))
            if self._perceptual is not None:
                with self._autocast():
                    distance = self._perceptual(sr, pseudo_gt)
                loss = loss + training.perceptual_weight * losses.add("perceptual", distance)
            if self._discriminator is not None:
                self._discriminator.requires_grad_(False)
                with self._autocast():
                    logits = self._discriminator(sr)
                loss = loss + training.gan_weight * losses.add("gan", networks.gan_loss(logits.float(), real=True))
            losses.add("error", (sr - pseudo_gt).detach().abs().mean())
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            results.append(sr.detach())
        self._check(losses.worst())
        self._scaler.step(self._optimizer)
        if self._discriminator is not None:
            pairs = [(pseudo_gt, sr) for (_, pseudo_gt, _), sr in zip(parts, results, strict=True)]
            self._move_discriminator(pairs, losses)
        self._scaler.update()
        with torch.no_grad():
            averages, weights = ([*net.parameters()] for net in (self._ema, self._network))
            torch._foreach_lerp_(averages, weights, 1 - training.ema)  # type: ignore[arg-type]
        return {name: value for name, value in losses.means().items() if name != "error"}

    def set_learning_rate(self, share: float) -> None:
        """Lower the learning rate of the generator as a cosine; ``share`` is that of the steps done, 0..1."""
        self._optimizer.param_groups[0]["lr"] = self._training.learning_rate * (1 + math.cos(math.pi * share)) / 2

    def warm_up(self, batch: list[torch.Tensor]) -> None:
        """Make a step of the discriminator alone: a new discriminator cannot guide the generator yet."""
        with torch.no_grad(), self._autocast():
            pairs = [(pseudo_gt, self._network(lr).float()) for lr, pseudo_gt, _ in self._parts(batch)]
        self._move_discriminator(pairs, _Losses(self._training.accumulate))
        self._scaler.update()

    def enlarge(
        self, batch: list[torch.Tensor], *, ema: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return LR patches, the network's results and the pseudo-GT (raises `UsageError` where they diverge)."""
        lr, pseudo_gt, _ = batch
        network = self._ema if ema else self._network
        network.eval()
        with torch.no_grad(), self._autocast():
            sr = network(lr).float()
        network.train()
        self._check({"error": (sr - pseudo_gt).abs().mean().item()})
        return lr, sr, pseudo_gt

    def save_model(self, mean_loss: float) -> None:
        """Save raw and averaged weights as the usual training tools do, and beside them a JSON file of their origin."""
        path = self._run.model(self.state["iteration"])
        document = read_document(self._run.document)
        write_json(path.with_suffix(".json"), document | {"iteration": self.state["iteration"], "loss": mean_loss})
        if self._discriminator is not None:
            save_torch(path.with_suffix(".discriminator.pth"), {"params": self._discriminator.state_dict()})
        weights = {"params": self._network, "params_ema": self._ema}
        save_torch(path, {name: self.generator.checkpoint_weights(net.state_dict()) for name, net in weights.items()})

    def save_now_and_then(self, *, checkpoint: bool = False) -> None:
        """Save all that a killed run needs to go on, at a checkpoint and every minute; write progress.json."""
        if checkpoint or time.monotonic() - self._saved > SAVE_SECONDS:
            random = {"rng": torch.get_rng_state()}
            if self._device.startswith("cuda"):
                random["cuda_rng"] = torch.cuda.get_rng_state(self._device)
            moving = {name: part.state_dict() for name, part in self._with_state().items()}
            save_torch(self._run.state, self.state | random | moving)
            write_json(self._run.losses, {"losses": self.state["losses"]})
            self._saved = time.monotonic()
        if time.monotonic() - self._written > PROGRESS_SECONDS:
            self.write_progress()

    def write_progress(self) -> None:
        """Write progress.json."""
        state = self.state
        write_json(self._run.progress, {"iteration": state["iteration"], "iterations": self._training.iterations,
                                        "warmed": state["warmed"], "warmup": self.warmup, "worse": state["worse"],
                                        "losses": state["losses"][-1] if state["losses"] else {}})  # fmt: skip
        self._written = time.monotonic()

    def _resumed(self) -> State | None:
        """Restore what `save_now_and_then` saved; returns the counters, None where nothing is saved."""
        if not self._run.state.exists():
            return None
        try:
            state: State = load_checkpoint(self._run.state, "start this training again")
            for name, part in self._with_state().items():
                saved = state.pop(name)
                for group in saved.get("param_groups", ()):  # the state may come from another device or version
                    group["fused"] = self._fused
                part.load_state_dict(saved)
            torch.set_rng_state(state.pop("rng"))
        except (UsageError, AttributeError, LookupError, TypeError, ValueError):
            raise UsageError(self._run.state, "is damaged", "delete it to start this training again") from None
        cuda_rng = state.pop("cuda_rng", None)
        if cuda_rng is not None and self._device.startswith("cuda"):
            torch.cuda.set_rng_state(cuda_rng, self._device)
        return state

    def _with_state(self) -> dict[str, Any]:
        """Collect all parts that have a state dict."""
        parts = {"generator": self._network, "ema": self._ema, "optimizer": self._optimizer, "scaler": self._scaler,
                 "discriminator": self._discriminator, "optimizer_d": self._optimizer_d}  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def _move_discriminator(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], losses: _Losses) -> None:
        """Make a step of the discriminator: it learns to call pseudo-GT real, and results fake."""
        assert self._discriminator is not None
        assert self._optimizer_d is not None
        self._discriminator.requires_grad_(True)
        self._optimizer_d.zero_grad()
        for pair in pairs:
            for name, image, real in (("real", pair[0], True), ("fake", pair[1], False)):
                with self._autocast():
                    logits = self._discriminator(image)
                loss = losses.add(f"discriminator_{name}", networks.gan_loss(logits.float(), real=real))
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer_d)

    def _parts(self, batch: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Split a batch into the parts that are computed one after the other: LR, pseudo-GT and mask each."""
        return list(zip(*(tensor.chunk(self._training.accumulate) for tensor in batch), strict=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.partition(":")[0], self._amp, enabled=self._amp != torch.float32)

    def _check(self, losses: Losses) -> None:
        """Raise `UsageError` before a step that would spoil the weights, and before spoilt weights are saved.

        The loss ``error`` is the mean absolute error of the results.
        """
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not bad and losses["error"] <= _DIVERGED:
            return
        models = self._run.models()
        reason = f"the mean absolute error has grown to {losses['error']:.3g}"
        if bad:
            reason = f"the {bad[0].replace('error', 'pixel')} loss is not finite"
        good = f"the last good model is {models[-1]}" if models else "no model had been saved"
        raise UsageError(self._run.root, reason, f"{good}; start another run with a lower --learning-rate")


class _Losses:
    """Collect the losses of the parts of a batch, and read them all at once, because a GPU is waited for each time."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Add the loss of a part; returns its share in the loss of the whole batch, to go backward from."""
        self._values.setdefault(name, []).append(value.detach())
        return value / self._parts

    def means(self) -> Losses:
        """Read the means over the parts."""
        return {name: sum(value / self._parts for value in values) for name, values in self._read().items()}

    def worst(self) -> Losses:
        """Read the largest losses of a part; where one is not finite, that one."""
        return {
            name: max(values, key=lambda value: (not math.isfinite(value), value))
            for name, values in self._read().items()
        }

    def _read(self) -> dict[str, list[float]]:
        numbers = iter(torch.stack([value for values in self._values.values() for value in values]).tolist())
        return {name: [next(numbers) for _ in values] for name, values in self._values.items()}


def compare_with_best(state: State) -> None:
    """Count the latest checkpoints in a row that are no better than the best checkpoint before them."""
    mean = state["since"]["pixel"] / state["since"]["steps"]
    state["since"] = {}
    if state["best"] is None or mean < (1 - _IMPROVEMENT) * state["best"]:
        state["best"], state["worse"] = mean, 0
    else:
        state["worse"] += 1


def _log(state: State, losses: Losses, board: Board) -> None:
    """Add up the losses; every `_LOG_EVERY` steps their means become a row of the log."""
    for name, value in losses.items():
        state["sums"][name] = state["sums"].get(name, 0.0) + value
    since = state["since"]
    since["steps"], since["pixel"] = since.get("steps", 0) + 1, since.get("pixel", 0.0) + losses["pixel"]
    if state["iteration"] % _LOG_EVERY == 0:
        row = {name: total / _LOG_EVERY for name, total in state["sums"].items()}
        state["losses"].append({"iteration": state["iteration"]} | row)
        state["sums"] = {}
        board.scalars(row, state["iteration"])


@contextlib.contextmanager
def _memory_explained(training: Training) -> Iterator[None]:
    """Turn a lack of memory into an error that names the flags to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        parts, batch = training.accumulate, training.batch
        why = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"{batch // parts} patches of {training.patch} px at a time need more memory than there is ({why})"
        more = next((count for count in range(parts + 1, batch + 1) if batch % count == 0), None)
        remedy = "begin another run with a smaller --patch" + ("" if batch == 1 else " or --batch")
        if more:
            remedy = f"raise --accumulate to {more}, with which the run goes on, or {remedy}"
        raise UsageError("--batch", reason, remedy) from None


class Board:
    """Write a TensorBoard event file of a run; TensorBoard then drops events of older files beyond ``iteration``.

    When the disk is full, the thread of torch's own writer dies and loses events. All methods of this class raise
    `TransientError` then.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        # TensorBoard reads the files of a run in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time_ns():020d}"
        self._add(0, file_version="brain.Event:2")
        self._add(iteration + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, losses: dict[str, float], iteration: int) -> None:
        """Add the means of some losses."""
        from torch.utils.tensorboard import summary

        for name, value in losses.items():
            self._add(iteration, summary=summary.scalar(f"loss/{name}", value))  # type: ignore[no-untyped-call]

    def pictures(self, lr: torch.Tensor, sr: torch.Tensor, pseudo_gt: torch.Tensor, iteration: int) -> None:
        """Add rows of LR, result and pseudo-GT, ``(N, 3, h, w)`` or ``(N, 3, H, W)`` in 0..1."""
        from torch.utils.tensorboard import summary

        enlarged = torch.nn.functional.interpolate(lr, size=pseudo_gt.shape[-2:], mode="nearest")
        rows = torch.cat([enlarged, sr.clamp(0, 1), pseudo_gt], dim=3)[:_PICTURES]
        panel = torch.cat(list(rows), dim=1).cpu()
        picture = summary.image("lr, result, pseudo-GT", panel, dataformats="CHW")  # type: ignore[no-untyped-call]
        self._add(iteration, summary=picture)

    def _add(self, iteration: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        event = Event(wall_time=time.time(), step=iteration, **content)
        with storage_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())
