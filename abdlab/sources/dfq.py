"""DFQ's source: Data-Free Network Quantization With Adversarial Knowledge Distillation
(Choi et al., CVPR-W 2020, arXiv 2005.04136), less the quantization.

The paper's code is not public; :class:`~abdlab.sources.choi.Choi` has the form that the
paper prints. The weights and sizes here are those of the re-implementation that the
authors of CMI compare with (arXiv 2105.08584).

Deviations from the paper: one generator and one student; statistics are compared by the
l2 norms of DeepInversion, as there, and not by the divergence of two Gaussians; the
student learns during the warm-up too, so that a run has one kind of step. From the
re-implementation: it trains the student 10 times, on fresh images, per generator step,
and takes the cross-entropy with the predicted class for the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.features import frozen
from abdlab.optim import sgd
from abdlab.sources.generated import Generated
from abdlab.sources.objectives import batch_norm_loss, class_balance, disagreement, norm_inputs
from abdlab.sources.source import Batch


def instance_entropy(logits: Tensor) -> Tensor:
    """Mean over the batch of the entropy, in nats, of each sample's softmaxed logits
    (B, classes): 0 when all are one-hot.
    """
    return torch.special.entr(F.softmax(logits, dim=1)).sum(1).mean()


@dataclass(kw_only=True, eq=False, repr=False)
class DFQ(Generated):
    """Trains an adversarial generator that must also respect what the teacher's batch
    norms remember, and the student on the same images.

    The generator minimises -``adversarial`` x KL(T || S) + ``batch_norm`` x distance to
    the batch-norm statistics + ``entropy`` x entropy of each prediction - ``balance`` x
    entropy of the mean prediction, in nats, means over the batch. The student learns
    T^2 x KL(T || S) at ``temperature``, summed over classes.

    Args:
        shape, pseudo_batches, batch_size, generator_lr, z, width, ema: see
            :class:`~abdlab.sources.generated.Generated`. Adam, betas .5 and .999,
            constant.
        warmup: share of the run, in [0, 1), at whose start the generator learns without
            the adversarial term.
        student_lr: SGD with Nesterov momentum, cosine to 0 by step.
        adversarial, batch_norm, entropy, balance: weights.
        temperature: paper: 1; the re-implementation: 20.

    Deviations stand at the top of the file.

    Raises:
        ValueError: on :meth:`start`, when ``batch_norm`` is on and the teacher has no
            batch norm with running statistics.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = DFQ((1, 8, 8), pseudo_batches=2, batch_size=4, z=5, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)][-1]
    ['adversarial', 'balance', 'batch_norm', 'entropy', 'kd']
    """

    output = "sigmoid"
    #: of the student's SGD
    weight_decay = 1e-4

    pseudo_batches: int = 80_000
    batch_size: int = 256
    warmup: float = 0.1
    student_lr: float = 0.1
    generator_lr: float = 1e-3
    z: int = 256
    width: int = 64
    adversarial: float = 1.0
    batch_norm: float = 1.0
    entropy: float = 1.0
    balance: float = 20.0
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), not {self.warmup}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.made = 0
        if self.batch_norm:
            with norm_inputs(teacher):  # raises when there is none
                pass

    def optimize_generator(self):
        return Adam(
            self.generator.parameters(), lr=self.generator_lr, betas=(0.5, 0.999), fused=True
        ), None

    def optimizer(self, student):
        optimizer = sgd(student, self.student_lr, self.momentum, self.weight_decay, nesterov=True)
        return optimizer, CosineAnnealingLR(optimizer, len(self))

    def batch(self, defenses: Sequence = ()) -> Batch:
        noise = self.noise()
        images = self.generator(noise)
        with norm_inputs(self.teacher) if self.batch_norm else nullcontext({}) as inputs:
            logits = self.teacher(images)
        losses = {
            "entropy": self.entropy * instance_entropy(logits),
            "balance": self.balance * class_balance(logits),
        }
        if self.batch_norm:
            losses["batch_norm"] = self.batch_norm * self.distance(inputs)
        if self.adversarial and self.made >= round(self.warmup * self.horizon):
            with frozen(self.student):
                losses["adversarial"] = self.adversarial * disagreement(
                    logits, self.student(images)
                )
        losses = self.learn(images, logits, losses, defenses)
        self.made += 1
        return Batch(*self.seen(noise, images, logits), losses=losses)

    def distance(self, inputs: dict[str, Tensor]) -> Tensor:
        """How far the images' statistics, in what entered the teacher's batch norms, are
        from the remembered ones; a scalar.
        """
        return batch_norm_loss(self.teacher, inputs)

    def state(self):
        return {**super().state(), "made": self.made}

    def restore(self, state):
        super().restore(state)
        self.made = state["made"]
