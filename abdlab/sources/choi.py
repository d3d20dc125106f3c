"""Choi et al.'s generator as their paper prints it (CVPR-W 2020, arXiv 2005.04136): the
batch norms' statistics are compared as Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.optim import sgd
from abdlab.sources.dfq import DFQ
from abdlab.sources.lasting import statistics


def gaussian_divergence(mean: Tensor, variance: Tensor, to_mean: Tensor, to_variance: Tensor):
    """KL(N(mean, variance) || N(to_mean, to_variance)) in nats, elementwise.

    >>> import torch
    >>> one = torch.ones(1)
    >>> gaussian_divergence(one, one, 0 * one, one)  # one std apart
    tensor([0.5000])
    """
    ratio = (variance + 1e-6) / (to_variance + 1e-6)  # a dead channel has no variance
    return (mean - to_mean).square() / (2 * (to_variance + 1e-6)) + (ratio - 1 - ratio.log()) / 2


def gaussian_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """:func:`gaussian_divergence` of what entered each batch norm from its running
    statistics, summed over channels and layers; a scalar.

    Args:
        inputs: what :func:`~abdlab.sources.objectives.norm_inputs` recorded.
    """
    total = 0
    for name, (mean, variance) in statistics(inputs).items():
        norm = model.get_submodule(name)
        total = (
            total + gaussian_divergence(mean, variance, norm.running_mean, norm.running_var).sum()
        )
    return total


@dataclass(kw_only=True, eq=False, repr=False)
class Choi(DFQ):
    """The generator minimises -KL(T || S) + ``alpha`` x (distance of the batch-norm
    statistics + mean entropy of each prediction - entropy of the mean prediction); the
    student takes ``student_steps`` steps on KL(T || S).

    The distance is :func:`gaussian_loss`. Divergences and entropies are in nats, means
    over the batch.

    Args:
        shape, pseudo_batches, batch_size, warmup, student_lr, generator_lr, z, width,
            ema: see :class:`~abdlab.sources.dfq.DFQ`.
        student_steps: on each pseudo-batch.
        alpha: weight, see above.

    Deviations: one generator and one student; the student's steps share one batch, that
    of the generator's step; it learns during the warm-up too; variances have 1e-6 added;
    Adam's betas, lengths and student are those of :class:`~abdlab.sources.dfq.DFQ`.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = Choi((1, 8, 8), pseudo_batches=2, batch_size=4, z=5, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)][-1]
    ['adversarial', 'balance', 'batch_norm', 'entropy', 'kd']
    """

    adversarial: ClassVar[float] = 1.0
    temperature: ClassVar[float] = 1.0
    #: ``alpha``, each
    batch_norm: float = field(init=False)
    entropy: float = field(init=False)
    balance: float = field(init=False)

    student_steps: int = 10
    z: int = 512
    alpha: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.student_steps < 1:
            raise ValueError(f"student_steps must be at least 1, not {self.student_steps}")
        self.batch_norm = self.entropy = self.balance = self.alpha

    def optimizer(self, student):
        optimizer = sgd(student, self.student_lr, self.momentum, self.weight_decay, nesterov=True)
        return optimizer, CosineAnnealingLR(optimizer, len(self) * self.student_steps)

    def distance(self, inputs):
        return gaussian_loss(self.teacher, inputs)
