"""Chains of tasks that a person schedules and watches; no science here.

The parameters of a flow are JSON, and a plan is not: a caller in the same process hands its plan over beside them.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

from pydantic import BaseModel

Plan = TypeVar("Plan")

_PLANS: ContextVar[tuple[tuple[BaseModel, object], ...]] = ContextVar("plans", default=())


@contextlib.contextmanager
def handing_over(*plans: tuple[BaseModel, object]) -> Iterator[None]:
    """Offer plans to the flows that the block calls with the settings beside each; a plan of None offers nothing."""
    token = _PLANS.set((*_PLANS.get(), *plans))
    try:
        yield
    finally:
        _PLANS.reset(token)


def handed_over(settings: BaseModel, kind: type[Plan]) -> Plan | None:
    """Return the latest plan of this kind that the caller offers for these settings, or None."""
    plans = (plan for given, plan in reversed(_PLANS.get()) if given == settings and isinstance(plan, kind))
    return next(plans, None)
