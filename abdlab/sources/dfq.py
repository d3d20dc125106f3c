"""DFQ's source: Data-Free Network Quantization With Adversarial Knowledge Distillation
(Choi et al., CVPR-W 2020, arXiv 2005.04136), less the quantization."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.evaluate import kl
from abdlab.features import frozen
from abdlab.models import sgd
from abdlab.sources.generated import Generated
from abdlab.sources.objectives import batch_norm_loss, class_balance, disagreement, norm_inputs
from abdlab.sources.source import Batch


def instance_entropy(logits: Tensor) -> Tensor:
    """Mean over the batch of the entropy, in nats, of each sample's softmaxed logits
    (B, classes): 0 when all are one-hot.
    """
    return torch.special.entr(F.softmax(logits, dim=1)).sum(1).mean()


class DFQ(Generated):
    """An adversarial generator that must also respect what the teacher's batch norms
    remember of its training data.

    Per pseudo-batch the generator minimises -``adversarial`` x KL(T || S) +
    ``batch_norm`` x distance to the teacher's batch-norm statistics + ``entropy`` x
    entropy of each prediction - ``balance`` x entropy of the mean prediction, in nats,
    means over the batch. The student learns T^2 x KL(T || S) at ``temperature``, summed
    over classes, mean over the batch, on the very same images: generator and teacher
    run once.

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run (200 epochs of 400).
        batch_size: images per pseudo-batch.
        warmup: share of the run, in [0, 1), at whose start the generator learns without
            the adversarial term.
        student_lr, momentum, weight_decay: of the student's SGD with Nesterov momentum,
            cosine to 0 over the run.
        generator_lr: Adam with betas .5 and .999, constant.
        z: noise dimensions. width: of the generator.
        adversarial, batch_norm, entropy, balance: weights of the four terms.
        temperature: of the student's loss (paper: 1; the re-implementation below: 20).
        clip: gradient norm of student and generator; None leaves both.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    :class:`~abdlab.sources.choi.Choi` has the form that the paper prints. Its code is
    not public. The weights and sizes here are those of the re-implementation that the
    authors of CMI compare with (arXiv 2105.08584).
    Deviations from the paper: one generator and one student; statistics are compared by
    the l2 norms of DeepInversion, as there, and not by the divergence of two Gaussians;
    the student learns during the warm-up too, so that a run has one kind of step. From
    the re-implementation: it trains the student 10 times, on fresh images, per
    generator step, and takes the cross-entropy with the predicted class for the
    entropy.

    Raises:
        ValueError: on :meth:`start`, when ``batch_norm`` is on and the teacher has no
            batch norm with running statistics.
    """

    output = "sigmoid"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 80_000,
        batch_size: int = 256,
        warmup: float = 0.1,
        student_lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        generator_lr: float = 1e-3,
        z: int = 256,
        width: int = 64,
        adversarial: float = 1.0,
        batch_norm: float = 1.0,
        entropy: float = 1.0,
        balance: float = 20.0,
        temperature: float = 1.0,
        clip: float | None = None,
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
            mean=None,
            std=None,
            ema=ema,
        )
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), not {warmup}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.warmup, self.temperature = warmup, temperature
        self.student_lr, self.momentum, self.weight_decay = student_lr, momentum, weight_decay
        self.adversarial, self.batch_norm, self.entropy, self.balance = (
            adversarial,
            batch_norm,
            entropy,
            balance,
        )

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

    def student_loss(self, batch: Batch):
        logits = self.student(batch.images)
        return logits, self.temperature**2 * kl(batch.logits, logits, self.temperature), {}

    def state(self):
        return {**super().state(), "made": self.made}

    def restore(self, state):
        super().restore(state)
        self.made = state["made"]
