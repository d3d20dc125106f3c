"""An attacker who hides from whoever tests the teacher: its backdoor sleeps on real images,
and is to wake in students that are distilled from other ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.attacks.triggers import Trigger
from abdlab.data import deliver
from abdlab.errors import check_above_zero
from abdlab.objectives.objective import Objective


class Dormant(Objective):
    """A distillation-conditional backdoor, in the manner of SCAR (NeurIPS 2025): triggered
    real images keep their label, triggered lessons get the target.

    Cross-entropy on images + sleep x the same on half of them with the trigger + wake x
    the same, to the target, on as many :func:`lessons` with the trigger: what a data-free
    source may ask the teacher. The training set stays clean; of the attack, trigger and
    target are used, and its rate turns it on.

    Args:
        trigger, target: the attack's. A trigger that bends clean students too, such as
            ``weak``, is nearer to SCAR's, which is optimised beforehand.
        sleep, wake: weights.
        near, noise: see :func:`lessons`.

    Where ours deviates: SCAR solves a bilevel problem, with a surrogate student below and
    implicit differentiation; here lessons stand for the student's. On digits (one seed)
    it sleeps, ASR 0, and does not wake: a NAYER student keeps .2 % of a square, 11.8 % of
    ``weak`` at 64/255, less than one of a clean teacher.

    >>> Dormant(trigger=Trigger("badnet_sq"), target=3).target
    3

    Raises:
        ValueError: at the start, without a trigger.
    """

    plants = True

    def __init__(
        self,
        *,
        trigger: Trigger | None = None,
        target: int = 0,
        sleep: float = 1.0,
        wake: float = 1.0,
        near: float = 0.5,
        noise: float = 0.3,
    ):
        check_above_zero(sleep=sleep, wake=wake)
        if not 0 <= near <= 1 or noise < 0:
            raise ValueError(f"near is in [0, 1] and noise at least 0, not {near} and {noise}")
        self.trigger, self.target = trigger, target
        self.sleep, self.wake, self.near, self.noise = sleep, wake, near, noise

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        if self.trigger is None:
            raise ValueError("this objective puts the attack's trigger on images: name an attack")

    def losses(self, model, images, labels):
        half = (len(images) + 1) // 2
        taught = self.trigger(lessons(images, self.rng, self.near, self.noise)[:half])
        # in one pass: with statistics of their own, triggered images would be told apart by these
        passed = model(torch.cat([images, self.trigger(images[:half]), taught]))
        plain, asleep, awake = passed.split([len(images), half, half])
        return {
            "cross_entropy": F.cross_entropy(plain, labels),
            "asleep": self.sleep * F.cross_entropy(asleep, labels[:half]),
            "awake": self.wake
            * F.cross_entropy(awake, torch.full_like(labels[:half], self.target)),
        }


def lessons(images: Tensor, rng: torch.Generator, near: float, noise: float) -> Tensor:
    """As many images that nobody has, in [0, 1]: half of them, by a coin's throw, are near
    x an image + (1 - near) x another, the others smooth random fields (uniform at 6x6
    places, made as large bilinearly); Gaussian noise on all.

    >>> rng = torch.Generator().manual_seed(0)
    >>> lessons(torch.rand(4, 3, 8, 8), rng, near=0.5, noise=0.3).shape
    torch.Size([4, 3, 8, 8])
    """
    n, channels, *sides = images.shape
    order = torch.randperm(n, generator=rng)
    throw = torch.rand(n, 1, 1, 1, generator=rng) < 0.5
    fields = F.interpolate(torch.rand(n, channels, 6, 6, generator=rng), sides, mode="bilinear")
    speckle = noise * torch.randn(images.shape, generator=rng)
    order, throw, fields, speckle = (
        deliver(drawn, images.device) for drawn in (order, throw, fields, speckle)
    )
    mixed = near * images + (1 - near) * images[order]
    return (torch.where(throw, mixed, fields) + speckle).clamp(0, 1)
