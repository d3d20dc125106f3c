"""What FastDFKD and NAYER share: a generator that outlives the round, a warm-up, and
statistics that are compared over rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from abdlab.data import random_views
from abdlab.features import frozen, mode
from abdlab.sources.objectives import disagreement
from abdlab.sources.pooled import Pooled

#: name of a batch norm -> (mean, biased variance) per channel of what entered it
Statistics = dict[str, tuple[Tensor, Tensor]]


def statistics(inputs: dict[str, Tensor]) -> Statistics:
    """Mean and biased variance per channel of what entered each batch norm, (B, C,
    ...) by the layer's name.
    """
    found = {}
    for name, x in inputs.items():
        over = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x.float(), dim=over, correction=0)
        found[name] = (mean, variance)
    return found


def average(past: Statistics, now: Statistics, momentum: float) -> Statistics:
    """``momentum`` x past + (1 - momentum) x now; where there is no past, now."""
    return {
        name: tuple(
            momentum * a + (1 - momentum) * b for a, b in zip(past[name], each, strict=True)
        )
        if name in past
        else each
        for name, each in now.items()
    }


def statistics_loss(model: nn.Module, found: Statistics) -> Tensor:
    """Sum over batch norms of ||mean - running mean||_2 + ||variance - running
    variance||_2, as :func:`~abdlab.sources.objectives.batch_norm_loss` has it, of
    statistics that are at hand; a scalar.
    """
    total = 0
    for name, (mean, variance) in found.items():
        norm = model.get_submodule(name)
        total = total + (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
    return total


@dataclass(kw_only=True, eq=False, repr=False)
class Lasting(Pooled):
    """Base class: a :class:`~abdlab.sources.pooled.Pooled` whose images minimise
    ``batch_norm`` x distance to the teacher's batch-norm statistics + ``one_hot`` x
    cross-entropy with random targets - ``adversarial`` x mean KL(T || S) where both
    predict the same class, on randomly shifted and mirrored views.

    The first pseudo-batch makes ``warmup`` rounds before its own. They have no
    adversarial term, because the student has learnt nothing yet.

    The statistics compared are a moving average over rounds (:attr:`momentum_bn` of
    it is the past), so that no single batch must look like the whole training set.
    The pool keeps all: (rounds + warmup) x batch_size images of 8 bits.

    While a defense holds generators (:attr:`~abdlab.defenses.Defense.holds`) no round
    is made: the student goes on with the pool as it is.

    Args:
        shape, rounds, synthesis_steps, kd_steps, lr, shift, flip: see
            :class:`~abdlab.sources.pooled.Pooled`.
        batch_size: images per round, and per student step.
        warmup: see above.
        generator_lr: Adam.
        adversarial: weight.
        width: of the generator, see :class:`~abdlab.sources.generator.Generator`.

    >>> from abdlab.sources import NAYER
    >>> NAYER((1, 8, 8), rounds=5, warmup=2, batch_size=10).pool_size
    70
    """

    #: the past's share in the statistics that are compared; 0 compares each batch
    momentum_bn = 0.9
    #: T of the KD loss T^2 x KL(T || S), of every paper's
    temperature: ClassVar[float] = 20.0
    #: the weight of the distance to the batch-norm statistics, of every paper's
    batch_norm: ClassVar[float] = 10.0
    #: a round's batch is of the size of the student's, and the pool keeps them all
    synthesis_batch: int = field(init=False)
    pool: int | None = field(init=False, default=None)

    warmup: int
    generator_lr: float
    adversarial: float
    width: int

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError(f"warmup is a number of rounds, at least 0, not {self.warmup}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}")
        self.synthesis_batch = self.batch_size
        super().__post_init__()
        self.pool_size = (self.rounds + self.warmup) * self.batch_size

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.rounds_made, self.past, self.now = 0, {}, {}

    def batch(self, defenses: Sequence = ()):
        if self.made == 0:
            for _ in range(self.warmup):
                self._round(defenses)
        return super().batch(defenses)

    def terms(self, images, targets):
        view = random_views(images, self.rng, shift=self.shift, flip=self.flip)
        logits, _, losses = self.inversion(view, targets)
        if self.adversarial and self.rounds_made >= self.warmup:
            with mode(self.student, training=False), frozen(self.student):
                losses["adversarial"] = self.adversarial * disagreement(
                    logits, self.student(view), agreeing_only=True
                )
        return view, logits, losses, None

    def distance(self, inputs):
        self.now = statistics(inputs)
        return statistics_loss(self.teacher, average(self.past, self.now, self.momentum_bn))

    def remember(self, memory):
        now = {name: tuple(x.detach() for x in each) for name, each in self.now.items()}
        self.past, self.now = average(self.past, now, self.momentum_bn), {}

    def _round(self, defenses: Sequence) -> None:
        if len(self.pool) and any(defense.holds() for defense in defenses):
            return
        super()._round(defenses)
        self.rounds_made += 1

    def state(self):
        past = {name: torch.stack(each) for name, each in self.past.items()}
        return {**super().state(), "rounds_made": self.rounds_made, "past": past}

    def restore(self, state):
        super().restore(state)
        self.rounds_made = state["rounds_made"]
        self.past = {n: tuple(x.to(self.device).unbind()) for n, x in state["past"].items()}
