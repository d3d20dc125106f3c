"""Values that change between pseudo-batches: plans made beforehand, and live tuning.

A defense names the attributes that may change in ``tunable``, and keeps each one's plan with
:func:`planned`. The loop calls :func:`follow` before each pseudo-batch; a widget calls
:func:`tune` while a run goes on.

>>> from abdlab import ShufflingVaccine
>>> vaccine = ShufflingVaccine(alpha=[[0, 0.1], [50, 0.02]])
>>> follow(vaccine, 0), vaccine.alpha
([], 0.1)
>>> follow(vaccine, 50)
['sv: alpha 0.1 -> 0.02 from pseudo-batch 50 on']
>>> tune(vaccine, alpha=0.5)
>>> follow(vaccine, 60), plans(vaccine)["alpha"]
(['sv: alpha 0.02 -> 0.5 from pseudo-batch 60 on'], [(0, 0.1), (50, 0.02), (60, 0.5)])
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

from abdlab.errors import check_keys

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


def planned(defense: Any, name: str, plan: Plan) -> float:
    """Keep the plan of a defense's tunable attribute, to be followed; returns the value
    that it begins with.

    Raises:
        ValueError: for a plan that does not begin at 0 and go up.
    """
    steps = steps_of(plan)
    starts = [step[0] if len(step) == 2 else None for step in steps]
    rises = None not in starts and all(a < b for a, b in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or not rises:
        raise ValueError(
            f"{name} is a number, or a plan [[0, number], [pseudo-batch, number], ...] that goes"
            f" up, not {plan!r}"
        )
    defense._plans = {**plans(defense), name: steps}
    return steps[0][1]


def tunable(defense: Any) -> tuple[str, ...]:
    """The attributes of a defense, or of its class, that may change between pseudo-batches."""
    return tuple(getattr(defense, "tunable", ()))


def plans(defense: Any) -> dict[str, list[tuple[int, float]]]:
    """What the tunable attributes were and will be: name -> (from that pseudo-batch on,
    value), in that order.
    """
    return getattr(defense, "_plans", {})


def tune(defense: Any, **values: float) -> None:
    """Change tunable attributes from the next pseudo-batch on; its Step reports that as
    an event. Any thread may call it.

    Raises:
        ValueError: for an attribute that is not tunable, with a "did you mean".
    """
    check_keys(f"tunable setting of {defense.name}", values, tunable(defense))
    _asked(defense).extend(values.items())


def follow(defense: Any, index: int) -> list[str]:
    """Give the tunable attributes their values for pseudo-batch ``index``; returns what
    changes there, as sentences.
    """
    asked, events, waiting = {}, [], _asked(defense)
    while waiting:
        name, value = waiting.popleft()
        asked[name] = value
    for name, value in asked.items():
        if value != getattr(defense, name):  # what was asked last holds for the rest of the run
            known = plans(defense).get(name, [(0, getattr(defense, name))])
            past = [step for step in known if step[0] < index]
            defense._plans = {**plans(defense), name: [*past, (index, value)]}
    for name, steps in plans(defense).items():
        if len(steps) == 1 and name not in asked:
            continue  # an attribute without a plan stays a plain one
        was = [value for since, value in steps if since < index] or [getattr(defense, name)]
        value = [value for since, value in steps if since <= index][-1]
        if value != was[-1]:
            change = f"{name} {was[-1]:g} -> {value:g} from pseudo-batch {index} on"
            events.append(f"{defense.name}: {change}")
        setattr(defense, name, value)
    return events


def _asked(defense: Any) -> deque:
    """Changes that were asked for; a deque, so that one thread can ask while another one
    trains.
    """
    return defense.__dict__.setdefault("_tuned", deque())
