"""What the makers of synthetic images minimise: one short function per term, each a
scalar, to be weighed and added.

Terms that compare batch-norm statistics read the inputs of those layers, which
:func:`norm_inputs` records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abdlab.features import record
from abdlab.losses import kl

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def norm_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what enters each batch norm with running statistics, by the layer's name,
    in forward passes inside the block.

    Hooks are gone afterwards, also after an error. Raises ValueError when the model has
    no such layer: sources that match statistics cannot work then.
    """
    norms = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, NORMS) and m.running_mean is not None
    }
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch norm with running statistics: choose a source"
            " that needs none"
        )
    with record(model, list(norms), inputs=True) as inputs:
        yield inputs


def batch_norm_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Sum over batch norms of ||mean - running mean||_2 + ||variance - running
    variance||_2 (DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795, eq. 4; the
    variance is the biased one, as in its code).

    Args:
        inputs: what :func:`norm_inputs` recorded in one pass over the batch.
    """
    total = 0
    for name, x in inputs.items():
        module = model.get_submodule(name)
        over = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x.float(), dim=over, correction=0)
        total = total + (mean - module.running_mean).norm() + (variance - module.running_var).norm()
    return total


def one_hot(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the teacher's logits (B, classes) with ``targets`` (B,), by
    default its own predictions.
    """
    return F.cross_entropy(logits, logits.argmax(1) if targets is None else targets)


def class_balance(logits: Tensor) -> Tensor:
    """sum_c p_c log p_c of the batch's mean prediction p, in nats: lowest,
    -log(classes), when all classes are as frequent.
    """
    mean = F.softmax(logits, dim=1).mean(0)
    return torch.special.entr(mean).sum().neg()


def disagreement(teacher: Tensor, student: Tensor, agreeing_only: bool = False) -> Tensor:
    """-mean KL(T || S): minimised where the student still differs.

    Args:
        agreeing_only: count the samples on which both predict the same class, the
            others as 0 (CMI).
    """
    per_sample = kl(teacher, student)
    if agreeing_only:
        per_sample = per_sample * (teacher.argmax(1) == student.argmax(1))
    return -per_sample.mean()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the l2 norms of the differences between neighbours in four directions,
    over the whole batch (DeepInversion's code): right, down and both diagonals."""
    down, right = images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]
    diagonal = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    other = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    return down.norm() + right.norm() + diagonal.norm() + other.norm()
