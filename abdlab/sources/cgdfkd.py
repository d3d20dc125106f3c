"""Conditional generative data-free knowledge distillation (Yu et al., arXiv
2112.15358): a generator that is told the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.data import deliver
from abdlab.features import frozen
from abdlab.sources.objectives import batch_norm_loss, norm_inputs, one_hot
from abdlab.sources.zskt import ZSKT


class CGDFKD(ZSKT):
    """A generator turns noise and a class into an image of that class on which the
    student still differs; the student learns logits and feature maps.

    The generator minimises ``one_hot`` x cross-entropy of the teacher with the classes
    asked for + ``batch_norm`` x distance to the teacher's batch-norm statistics -
    ``adversarial`` x KL(T || S), means over the batch. Then the student takes
    ``student_steps`` steps, on new images of the same noise, on KL(T || S) +
    ``attention`` x attention transfer between the stages of the two networks.

    >>> len(CGDFKD((3, 32, 32), pseudo_batches=100))
    100

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches, batch_size, student_steps, student_lr, generator_lr, z, width,
            temperature, attention: as for :class:`~abdlab.sources.zskt.ZSKT`.
        one_hot, batch_norm, adversarial: weights, see above.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    Only the paper's abstract is known to us: a conditional generator learns preset
    labels, the student learns teacher feature maps, and training is adversarial. Ours
    are therefore all numbers (ZSKT's where it has them), the batch-norm term, one-hot
    labels as condition, and attention maps as feature knowledge, which fit networks of
    different widths.

    Raises:
        ValueError: on :meth:`start`, when the networks' stages do not fit, or when
            ``batch_norm`` is on and the teacher has no batch norm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 80_000,
        batch_size: int = 128,
        student_steps: int = 10,
        student_lr: float = 2e-3,
        generator_lr: float = 1e-3,
        z: int = 100,
        width: int = 64,
        temperature: float = 1.0,
        attention: float = 250.0,
        one_hot: float = 1.0,
        batch_norm: float = 1.0,
        adversarial: float = 1.0,
        ema: float | None = None,
    ):
        super().__init__(
            shape,
            pseudo_batches=pseudo_batches,
            batch_size=batch_size,
            student_steps=student_steps,
            student_lr=student_lr,
            generator_lr=generator_lr,
            z=z,
            width=width,
            temperature=temperature,
            class_mean=False,
            attention=attention,
            ema=ema,
        )
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.one_hot, self.batch_norm, self.adversarial = one_hot, batch_norm, adversarial

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
