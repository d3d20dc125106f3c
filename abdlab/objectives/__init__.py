"""What a teacher is trained for besides predicting its labels: to be robust, to withstand
one defense, or to hide its backdoor. A new objective is one class and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abdlab.attacks.triggers import Trigger
from abdlab.errors import keywords
from abdlab.objectives.adaptive import Clamped, Costly, Shuffled
from abdlab.objectives.dormant import Dormant
from abdlab.objectives.objective import Objective
from abdlab.objectives.robust import (
    PGDTraining,
    Trades,
    Universal,
    adversarial,
    adversarial_accuracy,
    ascend,
    project,
)
from abdlab.registry import Registry

#: name -> class, as presets and ``teacher.objective`` name them
OBJECTIVES = Registry(
    "training objective",
    {
        "pgd": PGDTraining,
        "trades": Trades,
        "universal": Universal,
        "clamped": Clamped,
        "costly": Costly,
        "shuffled": Shuffled,
        "dormant": Dormant,
    },
)


def objective_of(
    name: str | None,
    values: Mapping[str, Any],
    target: int | None = None,
    trigger: Trigger | None = None,
) -> Objective | None:
    """A fresh objective by its name or import path, with these settings; it is told the
    attack's target and trigger if it asks. None for cross-entropy alone.

    >>> objective_of("shuffled", {"layers": 2}, target=3).target
    3

    Raises:
        ValueError: for one that there is not, with a "did you mean", or a bad setting.
    """
    if name is None:
        return None
    kind = OBJECTIVES.find(name)
    attack = {"target": target, "trigger": trigger}
    told = {k: v for k, v in attack.items() if v is not None and k in keywords(kind)}
    return kind(**values, **told)


__all__ = [
    "OBJECTIVES",
    "Clamped",
    "Costly",
    "Dormant",
    "Objective",
    "PGDTraining",
    "Shuffled",
    "Trades",
    "Universal",
    "adversarial",
    "adversarial_accuracy",
    "ascend",
    "objective_of",
    "project",
]
