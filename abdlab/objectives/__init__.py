"""What a teacher is trained for besides predicting its labels: to be robust, or to
withstand one defense. A new objective is one class and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abdlab.errors import keywords
from abdlab.objectives.adaptive import Clamped, Costly, Shuffled
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
    },
)


def objective_of(
    name: str | None, values: Mapping[str, Any], target: int | None = None
) -> Objective | None:
    """A fresh objective by its name or import path, with these settings; it is told the
    attack's target if it asks. None for cross-entropy alone.

    >>> objective_of("shuffled", {"layers": 2}, target=3).target
    3

    Raises:
        ValueError: for one that there is not, with a "did you mean", or a bad setting.
    """
    if name is None:
        return None
    kind = OBJECTIVES.find(name)
    asks = target is not None and "target" in keywords(kind)
    return kind(**values, **({"target": target} if asks else {}))


__all__ = [
    "OBJECTIVES",
    "Clamped",
    "Costly",
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
