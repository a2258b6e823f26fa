"""Chains of tasks that a person schedules and watches; no science here.

The parameters of a flow are JSON. A plan is not, so a caller in the same process hands it over beside the parameters.
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
    """Offer plans during the block, each to the flow that is called with the settings beside it; None is no plan."""
    token = _PLANS.set((*_PLANS.get(), *plans))
    try:
        yield
    finally:
        _PLANS.reset(token)


def handed_over(settings: BaseModel, kind: type[Plan]) -> Plan | None:
    """Return the latest plan of this kind that the caller offers for these settings, or None."""
    plans = (plan for given, plan in reversed(_PLANS.get()) if given == settings and isinstance(plan, kind))
    return next(plans, None)
