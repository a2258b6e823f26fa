"""The settings of a finetune."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from desra_core.settings.models import Training


def test_defaults_are_the_authors() -> None:
    training = Training()
    assert training.preset == "paper"
    assert (training.learning_rate, training.patch, training.ema, training.iterations) == (1e-4, 256, 0.999, 1000)
    assert (training.pixel, training.pixel_weight, training.perceptual_weight, training.gan_weight) == ("l1", 1, 1, 0.1)
    assert (training.mask_weight, training.keep_weight, training.perceptual) == (1, 0, "vgg19")


def test_a_preset_changes_defaults_and_nothing_that_is_given() -> None:
    cpu = Training(preset="cpu")
    assert (cpu.patch, cpu.batch, cpu.perceptual) == (96, 8, "off")
    given = Training(preset="cpu", patch=64, perceptual="vgg19", batch=2)
    assert (given.patch, given.batch, given.perceptual) == (64, 2, "vgg19")
    assert given.discriminator_features == cpu.discriminator_features == 16
    assert Training(preset="paper") == Training()


@pytest.mark.parametrize(("changes", "steps"), [
    ({}, 200), ({"iterations": 20}, 200), ({"preset": "cpu"}, 200), ({"preset": "cpu", "iterations": 20}, 4),
    ({"preset": "cpu", "iterations": 1}, 0), ({"preset": "cpu", "iterations": 5000}, 200),
    ({"preset": "cpu", "iterations": 20, "warmup": 50}, 50), ({"preset": "cpu", "gan_weight": 0}, 0),
    ({"preset": "cpu", "discriminator": "d.pth"}, 0), ({"discriminator": "d.pth"}, 0),
], ids=str)  # fmt: skip
def test_few_iterations_on_a_cpu_are_not_preceded_by_many(changes: dict[str, Any], steps: int) -> None:
    assert Training(**changes).warmup_steps == steps


def test_settings_come_back_from_json() -> None:
    for training in (Training(), Training(preset="cpu", patch=64, discriminator="d.pth")):  # type: ignore[arg-type]
        assert Training.model_validate_json(training.model_dump_json()) == training


@pytest.mark.parametrize("changes", [
    {"preset": "gpu"}, {"patch": 31}, {"batch": 0}, {"batch": 12, "accumulate": 5}, {"preset": "cpu", "accumulate": 3},
    {"mask_share": 1.1}, {"learning_rate": 0}, {"mask_weight": 0}, {"ema": 1}, {"discriminator_features": 3},
    {"pixel": "l3"}, {"amp": "int8"}, {"checkpoint_every": 0}, {"patience": 0}, {"seed": -1}, {"iteration": 5},
    {"gan_weight": -0.1},
], ids=str)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Training(**changes)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 6, 12])
def test_a_batch_in_equal_parts(accumulate: int) -> None:
    assert Training(accumulate=accumulate).accumulate == accumulate


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Training().patch = 3  # type: ignore[misc]
