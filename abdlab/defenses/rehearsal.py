"""Rehearsal (ours): from the first step, the student also learns from images of every class
that are inverted from its teacher.

A teacher that unlearnt a trigger still knows the target class, but a source may show too
little of it: on digits, ZSKT's students of an unlearnt teacher recognise none of the target's
own images, while every other class is above 90 %. Images that are inverted class by class
have what is missing. They are those of DeepInversion (Yin et al., CVPR 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from abdlab.data import deliver
from abdlab.defenses.defense import Defense
from abdlab.defenses.plans import Plan, planned
from abdlab.losses import kl
from abdlab.purifiers.pool import synthetic_pool


def balanced(classes: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Indices (count,) of images of these predicted classes (N,), each class as likely as
    any other that is there.

    >>> found = balanced(torch.tensor([0, 0, 0, 5]), 1000, torch.Generator().manual_seed(0))
    >>> 450 < int((found == 3).sum()) < 550
    True
    """
    there = classes.unique()
    rows = [(classes == c).nonzero().flatten() for c in there]
    which = torch.randint(len(there), (count,), generator=rng)
    at = torch.rand(count, generator=rng)
    picked = [rows[w][int(a * len(rows[w]))] for w, a in zip(which.tolist(), at, strict=True)]
    return torch.stack(picked)


class Rehearsal(Defense):
    """KL(T(x) || S(x)) besides the source's own loss, x synthetic images of the teacher, all
    classes alike; mean over the batch, times ``weight``.

    With a purified teacher, the images are of the purified one: they show its target class
    without the trigger. The first pseudo-batch makes them (8 seconds on digits); a
    checkpoint keeps them.

    Args:
        weight: of the term; may be a plan.
        images: how many are made, C x H x W bytes each.
        batch: of them per student step.

    Raises:
        ValueError: for fewer than 1 image, or a batch below 2 (for batch norm).

    >>> Rehearsal(weight=0.5).report()
    {'classes': []}
    """

    tunable = ("weight",)

    def __init__(self, *, weight: Plan = 1.0, images: int = 384, batch: int = 32):
        if images < 1 or batch < 2:
            raise ValueError(
                f"images are at least 1 and batch at least 2, not {images} and {batch}"
            )
        self.weight, self.images, self.batch = planned(self, "weight", weight), images, batch
        self.pool = self.classes = None

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.pool = self.classes = None

    def observe(self, batch):
        if self.pool is not None:
            return
        shape, seed = batch.images.shape[1:], int(torch.randint(2**31, (), generator=self.rng))
        made = synthetic_pool(
            self.teacher, shape, images=self.images, device=self.device, seed=seed
        )
        self.pool = made.clamp(0, 1).mul(255).round().to(torch.uint8)
        with torch.no_grad():
            parts = [self.teacher(part / 255).argmax(1) for part in self.pool.split(256)]
        self.classes = torch.cat(parts).cpu()

    def student_term(self, batch, logits):
        chosen = deliver(balanced(self.classes, self.batch, self.rng), self.device)
        images = self.pool[chosen] / 255
        with torch.no_grad():
            answers = self.teacher(images)
        return self.weight * kl(answers, self.student(images)).mean()

    def state(self):
        made = self.pool is not None
        kept = {"pool": self.pool, "classes": self.classes} if made else {}
        return {**super().state(), **kept}

    def restore(self, state):
        super().restore(state)
        if "pool" in state:
            self.pool, self.classes = state["pool"].to(self.device), state["classes"].cpu()

    def report(self):
        found = [] if self.classes is None else self.classes.bincount().tolist()
        return {"classes": found}
