"""Values that change between pseudo-batches: plans made beforehand, and live tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: a number, or [[0, number], [pseudo-batch, number], ...]: the value from each of these
#: pseudo-batches (0 is the first) on
Plan = float | Sequence[Sequence[float]]


def steps_of(plan: Plan) -> list[tuple]:
    """The steps of a plan, (from that pseudo-batch on, value) each: a plain number has
    one.
    """
    return [tuple(step) for step in plan] if isinstance(plan, Sequence) else [(0, plan)]


def plan_of(steps: Sequence[Sequence[float]]) -> Plan:
    """The plan with these steps, as a config has it: a plain number where there is but
    one.
    """
    return [list(step) for step in steps] if len(steps) > 1 else steps[0][1]


def then(plan: Any, index: int, value: Any) -> Any:
    """A plan that goes as the old one did, and has another value from pseudo-batch
    ``index`` on.
    """
    return plan_of([*until(plan, index), (index, value)])


def until(plan: Any, index: int) -> list[tuple]:
    """The steps of a plan (or of a plain number) before pseudo-batch ``index``."""
    return [step for step in steps_of(plan) if step[0] < index]
