"""DFAD: Data-Free Adversarial Distillation (Fang et al., arXiv 1912.11006)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Adam

from abdlab.features import frozen
from abdlab.models import sgd
from abdlab.sources.generated import Generated, decay, shares_of_run
from abdlab.sources.source import Batch


def discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over classes of |t - s| per sample, (B, classes) logits to (B,)."""
    return (teacher - student).abs().mean(1)


class DFAD(Generated):
    """The student minimises the l1 distance between its logits and the teacher's; the
    generator maximises it.

    ``generator_every`` student steps, each on fresh noise, alternate with one generator
    step, on fresh noise too. A pseudo-batch here *is* one student step, and every
    ``generator_every``-th of them begins with a generator step: so the loss "generator"
    is in every so many Steps only. Both distances are the mean over batch and classes.

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run in student steps (official code: 500 epochs of
            50 x 5).
        batch_size: images per student step and per generator step.
        generator_every: student steps per generator step.
        student_lr, momentum, weight_decay: of the student's SGD.
        generator_lr: Adam.
        milestones: shares of the run, in (0, 1], after which both learning rates are
            x0.1.
        z: noise dimensions. width: of the generator.
        clip: gradient norm of student and generator; None leaves both, as the official
            code.
        mean, std: per channel, of the normalisation that the images are emitted in; by
            default the teacher's own.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    Deviations: the student's batch-norm statistics do not record the generator step's
    pass (the official loop lets them, so that 1 pass in 6 sees images that the student
    does not train on). The official loop's first generator step comes one student step
    later: here a history of every so many Steps, a multiple of ``generator_every``,
    shows the generator.
    """

    output = "tanh"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 125_000,
        batch_size: int = 256,
        generator_every: int = 5,
        student_lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        generator_lr: float = 1e-3,
        milestones: Sequence[float] = (0.2, 0.4),
        z: int = 256,
        width: int = 64,
        clip: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        ema: float | None = None,
    ):
        super().__init__(
            shape,
            pseudo_batches=pseudo_batches,
            batch_size=batch_size,
            generator_lr=generator_lr,
            z=z,
            width=width,
            clip=clip,
            mean=mean,
            std=std,
            ema=ema,
        )
        if generator_every < 1:
            raise ValueError(
                f"generator_every counts student steps and is at least 1, not {generator_every}"
            )
        self.generator_every, self.milestones = generator_every, shares_of_run(milestones)
        self.student_lr, self.momentum, self.weight_decay = student_lr, momentum, weight_decay

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
