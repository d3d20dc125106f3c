"""Trigger unlearning (ours): late in the run, the student unlearns triggers that are
inverted on itself, as in Neural Cleanse (Wang et al., S&P 2019).

Self-retrospection's delta is dense and unlike any trigger: on digits, a student that resists
it still obeys the trigger.

- ``cover``: images that the teacher predicts as the target are covered where its own inverted
  triggers lie, with the pixels of another image. Where it then predicts something else, that
  is what the student learns. On digits about 4 in 10 of the images of the target are such.
- ``hold``: a generator is paid for images on which student and teacher disagree. Once this
  defense acts those carry the trigger, by which the teacher would teach the backdoor again.
- ``without=["attention"]``: on such images the teacher attends to the trigger.
- ``natural``: a dearer trigger is no backdoor but what the target class looks like. Who
  unlearns that forgets the class.
- ``balance``: triggers teach what is not the target; of what is, a batch has few images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abdlab.defenses.inverted_triggers import InvertedTriggers
from abdlab.defenses.late import Late
from abdlab.defenses.plans import Plan, planned
from abdlab.features import frozen, mode
from abdlab.graphs import Captured
from abdlab.losses import kl
from abdlab.sources.source import Batch


class TriggerUnlearning(Late, Captured):
    """Late in the run, the student answers images that carry its own inverted triggers
    as the teacher answers the images without.

    ``weight`` x mean KL(T(x) || S((1 - mask) x + mask pattern)), with a fresh Adam; each
    image carries one of the ``triggers`` latest ones.

    Args:
        start, lr: see :class:`~abdlab.defenses.late.Late`.
        weight, inner_steps: of the term; Adam steps per trigger. They can be plans.
        inner_lr, penalty, init_std: of a trigger, before its sigmoid; nats per pixel of the
            mask.
        target: the class; None finds the teacher's cheapest.
        renewals: new triggers, evenly over the rest of the run; the oldest goes.
        natural: a new trigger is kept while it costs at most this factor of the cheapest
            other class's; None keeps all.
        margin: pixels around the teacher's own triggers that the student's stay within.
        balance: how many times an image of the target class counts.
        without: names of the source's student terms that end where it begins.
        cover: give images that are the target only by the trigger another label.
        hold: the source's generator learns no more where it begins.

    Raises:
        ValueError: for a value outside its range.

    >>> TriggerUnlearning(start=0.5).first_of(640)
    320
    """

    tunable = ("weight", "inner_steps")
    title = "trigger unlearning"

    def __init__(
        self,
        *,
        start: float = 0.5,
        weight: Plan = 5.0,
        lr: float | None = 1e-3,
        inner_steps: Plan = 40,
        inner_lr: float = 0.3,
        penalty: float = 0.05,
        init_std: float = 0.5,
        target: int | None = None,
        triggers: int = 8,
        renewals: int = 19,
        natural: float | None = 1.6,
        margin: int | None = None,
        balance: float = 4.0,
        without: Sequence[str] = ("attention",),
        cover: bool = True,
        hold: bool = True,
    ):
        super().__init__(start, lr)
        self.weight = planned(self, "weight", weight)
        self.inner_steps = planned(self, "inner_steps", inner_steps)
        if triggers < 1 or self.inner_steps < 1:
            raise ValueError(
                f"triggers and inner_steps are at least 1, not {triggers} and {inner_steps}"
            )
        if renewals < 0:
            raise ValueError(f"renewals is a number of triggers, 0 or more, not {renewals}")
        if margin is not None and margin < 0:
            raise ValueError(f"margin is a number of pixels, 0 or more, or None, not {margin}")
        if balance <= 0:
            raise ValueError(f"balance is a factor above 0, not {balance}")
        if natural is not None and natural <= 0:
            raise ValueError(f"natural is a factor above 0, or None, not {natural}")
        self.inner_lr, self.penalty, self.init_std = inner_lr, penalty, init_std
        self.target, self.triggers, self.renewals = target, triggers, renewals
        self.natural, self.margin, self.balance = natural, margin, balance
        self.without, self.cover, self.hold = tuple(without), cover, hold

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.bank = InvertedTriggers(
            self.target,
            self.triggers,
            self.inner_lr,
            self.penalty,
            self.init_std,
            self.natural,
            self.margin,
            self.rng,
        )
        self.seen = 0  # pseudo-batches since it began
        self.every = max(1, (length - self.first) // (self.renewals + 1))

    @property
    def captures(self):
        return self.began is None

    def branch(self):
        return self.began is None

    def holds(self):
        return self.hold and self.began is not None

    def dropped(self):
        return () if self.began is None else self.without

    def observe(self, batch: Batch):
        if self.began is None:
            return
        images = batch.images
        if self.seen == 0:
            classes = batch.logits.shape[1]
            self.bank.begin(
                self.teacher, self.student, images, classes, self.inner_steps, self.cover
            )
        elif self.seen % self.every == 0 and self.seen // self.every <= self.renewals:
            self.bank.renew(self.student, images, self.inner_steps)
        if self.cover:
            self.bank.relabel(self.teacher, batch)
        self.seen += 1

    def sample_weights(self, batch: Batch):
        return None if self.began is None else self._balanced(batch.logits)

    def student_term(self, batch: Batch, logits: Tensor):
        if self.began is None:
            return None
        # triggered and clean images as one batch: one change of a whole batch also
        # changes its statistics and is normalised away, which it will not be in use
        with mode(self.student, self.student.training), frozen(self.student, weights=False):
            both = torch.cat([batch.images, self.bank.on(batch.images)])
            triggered = self.student(both)[len(batch.images) :]
        balance, each = self._balanced(batch.logits), kl(batch.logits, triggered)
        return self.weight * (each if balance is None else balance * each).mean()

    def _balanced(self, logits: Tensor) -> Tensor | None:
        """(B,) weights of mean 1 for images with these logits of the teacher; None where
        all count alike.
        """
        if self.balance == 1:
            return None
        weights = torch.where(logits.argmax(1) == self.bank.target, self.balance, 1.0)
        return weights / weights.mean()

    def state(self):
        return {**super().state(), "triggers": self.bank.state(), "seen": self.seen}

    def restore(self, state):
        super().restore(state)
        self.bank.restore(state["triggers"], self.device)
        self.seen = state["seen"]

    def report(self):
        return {**super().report(), **self.bank.report()}
