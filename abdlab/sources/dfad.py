"""DFAD: Data-Free Adversarial Distillation (Fang et al., arXiv 1912.11006)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Adam

from abdlab.features import frozen
from abdlab.optim import decay, sgd, shares_of_run
from abdlab.sources.generated import Generated
from abdlab.sources.source import Batch


def discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over classes of |t - s| per sample, (B, classes) logits to (B,)."""
    return (teacher - student).abs().mean(1)


@dataclass(kw_only=True, eq=False, repr=False)
class DFAD(Generated):
    """The student minimises the l1 distance between its logits and the teacher's; the
    generator maximises it.

    A pseudo-batch is one student step. Every ``generator_every``-th begins with a
    generator step, on noise of its own, so that the loss "generator" stands in those
    Steps only. Both distances are the mean over batch and classes.

    Args:
        shape, pseudo_batches, batch_size, generator_lr, z, width, ema: see
            :class:`~abdlab.sources.generated.Generated`. Adam.
        generator_every: student steps per generator step.
        student_lr: of the student's SGD.
        milestones: shares of the run, in (0, 1], after which both learning rates are
            x0.1.
        clip: gradient norm of student and generator; None leaves both, as the official
            code.

    Deviations: batch norms do not record the student's pass in a generator step (1 in 6
    of the official loop). The official loop's first generator step comes one student
    step later; here Steps that are a multiple of ``generator_every`` show the
    generator's loss.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = DFAD((1, 8, 8), pseudo_batches=2, generator_every=2, batch_size=4, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)]
    [['kd'], ['generator', 'kd']]
    """

    output = "tanh"
    #: of the student's SGD
    weight_decay = 5e-4

    pseudo_batches: int = 125_000
    batch_size: int = 256
    generator_every: int = 5
    student_lr: float = 0.1
    generator_lr: float = 1e-3
    milestones: Sequence[float] = (0.2, 0.4)
    z: int = 256
    width: int = 64
    clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.generator_every < 1:
            raise ValueError(
                "generator_every counts student steps and is at least 1, not"
                f" {self.generator_every}"
            )
        self.milestones = shares_of_run(self.milestones)

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.made = 0

    def optimize_generator(self):
        adam = Adam(self.generator.parameters(), lr=self.generator_lr, fused=True)
        return adam, decay(adam, self.milestones, self.horizon // self.generator_every)

    def optimizer(self, student):
        optimizer = sgd(student, self.student_lr, self.momentum, self.weight_decay)
        return optimizer, decay(optimizer, self.milestones, len(self))

    def batch(self, defenses: Sequence = ()) -> Batch:
        losses = {}
        self.made += 1
        if self.made % self.generator_every == 0:
            images = self.generator(self.noise())
            with frozen(self.student):
                logits = self.ask(images, defenses)
                losses["generator"] = -discrepancy(logits, self.student(images)).mean()
            losses = self.learn(images, logits, losses, defenses)
        with torch.no_grad():
            images = self.shown(self.noise())
            return Batch(images, self.teacher(images), losses=losses)

    def student_loss(self, batch: Batch):
        logits = self.student(batch.images)
        return logits, discrepancy(batch.logits, logits), {}

    def state(self):
        return {**super().state(), "made": self.made}

    def restore(self, state):
        super().restore(state)
        self.made = state["made"]
