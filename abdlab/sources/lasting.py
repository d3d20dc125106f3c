"""What FastDFKD and NAYER share: a generator that outlives the round, a warm-up, and
statistics that are compared over rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Lasting(Pooled):
    """Base class: a :class:`~abdlab.sources.pooled.Pooled` whose images minimise
    ``batch_norm`` x distance to the teacher's batch-norm statistics + ``one_hot`` x
    cross-entropy with random targets - ``adversarial`` x mean KL(T || S) where both
    predict the same class, on randomly shifted and mirrored views.

    The first pseudo-batch makes ``warmup`` rounds before its own. They have no
    adversarial term, because the student has learnt nothing yet.

    The statistics compared are a moving average over rounds (:attr:`momentum_bn` of
    it is the past), so that no single batch must look like the whole training set.

    While a defense holds generators (:attr:`~abdlab.defenses.Defense.holds`) no round
    is made: the student goes on with the pool as it is.
    """

    #: the student's SGD
    momentum, weight_decay = 0.9, 1e-4
    #: the past's share in the statistics that are compared; 0 compares each batch
    momentum_bn = 0.9

    def __init__(
        self,
        shape: Sequence[int],
        *,
        rounds: int,
        warmup: int,
        synthesis_steps: int,
        kd_steps: int,
        batch_size: int,
        lr: float,
        generator_lr: float,
        batch_norm: float,
        one_hot: float,
        adversarial: float,
        temperature: float,
        width: int,
        shift: int,
        flip: bool,
    ):
        if warmup < 0:
            raise ValueError(f"warmup is a number of rounds, at least 0, not {warmup}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        super().__init__(
            shape,
            rounds=rounds,
            synthesis_steps=synthesis_steps,
            kd_steps=kd_steps,
            synthesis_batch=batch_size,
            batch_size=batch_size,
            pool=max(1, rounds + warmup) * batch_size,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            temperature=temperature,
            batch_norm=batch_norm,
            one_hot=one_hot,
            shift=shift,
            flip=flip,
        )
        self.warmup, self.generator_lr, self.adversarial = warmup, generator_lr, adversarial
        self.width = width

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
        if len(self.pool) and any(defense.holds for defense in defenses):
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
