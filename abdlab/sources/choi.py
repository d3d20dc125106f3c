"""Choi et al.'s generator as their paper prints it (CVPR-W 2020, arXiv 2005.04136): the
batch norms' statistics are compared as Gaussians.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.models import sgd
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


class Choi(DFQ):
    """The generator minimises -KL(T || S) + ``alpha`` x (distance of the batch-norm
    statistics + mean entropy of each prediction - entropy of the mean prediction); the
    student takes ``student_steps`` steps on KL(T || S).

    The distance is :func:`gaussian_loss`. Divergences and entropies are in nats, means
    over the batch.

    >>> len(Choi((3, 32, 32), pseudo_batches=100))
    100

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run. batch_size: images per pseudo-batch.
        student_steps: student steps on each.
        warmup: share of the run, in [0, 1), at whose start the generator learns without
            -KL(T || S).
        student_lr: SGD with Nesterov momentum .9, cosine to 0. generator_lr: Adam.
        z: noise dimensions. width: of the generator.
        alpha: weight, see above.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    Deviations: one generator and one student; the student's steps share one batch, that
    of the generator's step; it learns during the warm-up too; variances have 1e-6 added;
    Adam's betas, lengths and student are those of :class:`~abdlab.sources.dfq.DFQ`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 80_000,
        batch_size: int = 256,
        student_steps: int = 10,
        warmup: float = 0.1,
        student_lr: float = 0.1,
        generator_lr: float = 1e-3,
        z: int = 512,
        width: int = 64,
        alpha: float = 0.01,
        ema: float | None = None,
    ):
        super().__init__(
            shape,
            pseudo_batches=pseudo_batches,
            batch_size=batch_size,
            warmup=warmup,
            student_lr=student_lr,
            generator_lr=generator_lr,
            z=z,
            width=width,
            adversarial=1.0,
            batch_norm=alpha,
            entropy=alpha,
            balance=alpha,
            temperature=1.0,
            ema=ema,
        )
        if student_steps < 1:
            raise ValueError(f"student_steps must be at least 1, not {student_steps}")
        self.student_steps = student_steps

    def optimizer(self, student):
        optimizer = sgd(student, self.student_lr, self.momentum, self.weight_decay, nesterov=True)
        return optimizer, CosineAnnealingLR(optimizer, len(self) * self.student_steps)

    def distance(self, inputs):
        return gaussian_loss(self.teacher, inputs)
