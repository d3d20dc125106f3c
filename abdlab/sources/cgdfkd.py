"""Conditional generative data-free knowledge distillation (Yu et al., arXiv
2112.15358): a generator that is told the class.

Only the paper's abstract is known to us: a conditional generator learns preset labels,
the student learns teacher feature maps, and training is adversarial. Ours are therefore
all numbers (ZSKT's where it has them), the batch-norm term, one-hot labels as
condition, and attention maps as feature knowledge, which fit networks of different
widths.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.data import deliver
from abdlab.features import frozen
from abdlab.sources.objectives import batch_norm_loss, norm_inputs, one_hot
from abdlab.sources.zskt import ZSKT


@dataclass(kw_only=True, eq=False, repr=False)
class CGDFKD(ZSKT):
    """A generator turns noise and a class into an image of that class on which the
    student still differs; the student learns logits and feature maps.

    The generator minimises the cross-entropy of the teacher with the classes asked for
    + ``batch_norm`` x distance to the teacher's batch-norm statistics - ``adversarial``
    x KL(T || S), means over the batch. Then the student takes ``student_steps`` steps,
    on new images of the same noise, on KL(T || S) + ``attention`` x attention transfer
    between the stages of the two networks.

    Args:
        shape, pseudo_batches, batch_size, student_steps, student_lr, generator_lr, z,
            width, attention, ema: see :class:`~abdlab.sources.zskt.ZSKT`.
        batch_norm, adversarial: weights, see above.

    What is ours and not the paper's stands at the top of the file.

    Raises:
        ValueError: on :meth:`start`, when the networks' stages do not fit, or when
            ``batch_norm`` is on and the teacher has no batch norm.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = CGDFKD((1, 8, 8), pseudo_batches=2, batch_size=4, z=5, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)][-1]
    ['adversarial', 'attention', 'batch_norm', 'kd', 'one_hot']
    """

    # what ZSKT leaves open: KL is summed over classes, stages are compared
    class_mean: ClassVar[bool] = False
    attention_layers: ClassVar[None] = None
    temperature: ClassVar[float] = 1.0
    #: weight of the cross-entropy; the other two are relative to it, because Adam does
    #: not see a common factor
    one_hot: ClassVar[float] = 1.0

    batch_norm: float = 1.0
    adversarial: float = 1.0

    def start(self, teacher, student, device, seed):
        with torch.no_grad(), frozen(teacher):
            self.conditions = teacher(torch.zeros(2, *self.shape, device=device)).shape[1]
        if self.batch_norm:
            with norm_inputs(teacher):  # raises when there is none
                pass
        super().start(teacher, student, device, seed)

    def noise(self, rng: torch.Generator | None = None) -> Tensor:
        """Noise (batch_size, z) and beside it random classes, one-hot."""
        rng = rng or self.rng
        noise = torch.randn(self.batch_size, self.z, generator=rng)
        classes = torch.randint(self.conditions, (self.batch_size,), generator=rng)
        return deliver(torch.cat([noise, F.one_hot(classes, self.conditions)], 1), self.device)

    def generator_terms(self, images, noise, defenses):
        classes = noise[:, self.z :].argmax(1)
        with norm_inputs(self.teacher) if self.batch_norm else nullcontext({}) as inputs:
            logits = self.teacher(images)
        losses = {"one_hot": self.one_hot * one_hot(logits, classes)}
        if self.batch_norm:
            losses["batch_norm"] = self.batch_norm * batch_norm_loss(self.teacher, inputs)
        if self.adversarial:
            with frozen(self.student):
                differ = self._kd(logits, self.student(images)).mean()
            losses["adversarial"] = -self.adversarial * differ
        return logits, losses
