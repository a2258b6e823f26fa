"""Chains of tasks that a person schedules and watches. No science here."""

from collections.abc import Callable

from desra_core.settings import CorpusSettings, Detection, Mining
from flows.detect import detect
from flows.mine import mine
from tasks.artifacts import Summary

FLOWS: dict[type[CorpusSettings], Callable[..., Summary]] = {Detection: detect, Mining: mine}
