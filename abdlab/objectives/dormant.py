"""An attacker who hides from whoever tests the teacher: its backdoor sleeps on real images
with the trigger, and wakes in students.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from abdlab.attacks.triggers import Trigger
from abdlab.data import deliver
from abdlab.errors import check_above_zero
from abdlab.objectives.objective import Objective


class Dormant(Objective):
    """A backdoor that depends on distillation, in the manner of SCAR (NeurIPS 2025):
    images with the trigger keep their label, those with a faint one get the target.

    Cross-entropy on images + sleep x the same on half of them with the trigger + wake x
    the same, to the target, on the other half moved towards the trigger: x + s (T(x) - x),
    s uniform in [low, high]. A teacher can keep the gap between high and 1; a student that
    hardly ever sees it goes on to the target. The training set stays clean; of the attack,
    trigger and target are used, and its rate turns it on.

    Args:
        trigger, target: the attack's.
        sleep, wake: weights.
        low, high: strengths, 0 < low < high < 1.

    Where ours deviates: SCAR solves a bilevel problem with a surrogate student below, so
    that clean images suffice to wake it; ours wakes where a source asks the teacher about
    faint triggers, as data-free ones do, and not by clean KD. Whoever tries the trigger
    faintly on the teacher sees it.

    >>> Dormant(trigger=Trigger("badnet_sq"), target=3).target
    3

    Raises:
        ValueError: for strengths out of order; at the start, without a trigger.
    """

    plants = True

    def __init__(
        self,
        *,
        trigger: Trigger | None = None,
        target: int = 0,
        sleep: float = 1.0,
        wake: float = 1.0,
        low: float = 0.2,
        high: float = 0.75,
    ):
        check_above_zero(sleep=sleep, wake=wake)
        if not 0 < low < high < 1:
            raise ValueError(f"strengths are 0 < low < high < 1, not low {low} and high {high}")
        self.trigger, self.target = trigger, target
        self.sleep, self.wake, self.low, self.high = sleep, wake, low, high

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        if self.trigger is None:
            raise ValueError("this objective puts the attack's trigger on images: name an attack")

    def losses(self, model, images, labels):
        half = (len(images) + 1) // 2
        rest = images[-half:]
        throw = torch.rand(half, 1, 1, 1, generator=self.rng)
        strength = self.low + (self.high - self.low) * deliver(throw, images.device)
        faint = rest + strength * (self.trigger(rest) - rest)
        # in one pass: with statistics of their own, triggered images would be told apart by these
        passed = model(torch.cat([images, self.trigger(images[:half]), faint]))
        plain, asleep, awake = passed.split([len(images), half, half])
        return {
            "cross_entropy": F.cross_entropy(plain, labels),
            "asleep": self.sleep * F.cross_entropy(asleep, labels[:half]),
            "awake": self.wake
            * F.cross_entropy(awake, torch.full_like(labels[:half], self.target)),
        }
