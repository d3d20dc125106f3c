"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019, arXiv
1904.01186).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Adam

from abdlab.evaluate import kl
from abdlab.features import full, last_linear, module_at, record
from abdlab.models import sgd
from abdlab.sources.generated import Generated, decay, shares_of_run
from abdlab.sources.objectives import class_balance, one_hot
from abdlab.sources.source import Batch

#: what a teacher without nn.Linear is told
NO_LINEAR = (
    "whose input could be the penultimate features: name the layer that reads them with layer=, or"
    " set activation=0"
)


def activation_loss(features: Tensor) -> Tensor:
    """-mean |f| over batch and features (B, ...); a scalar, lowest where the features
    answer strongly.
    """
    return -full(features).abs().mean()


class DAFL(Generated):
    """The teacher stands in for a GAN's fixed discriminator: the generator seeks images
    that look to it like real ones.

    Per pseudo-batch the generator minimises ``one_hot`` x cross-entropy of the
    teacher's logits with its own predictions
    - ``activation`` x mean |penultimate features| - ``balance`` x entropy of the
      batch's mean prediction, in decimal
    digits. The student learns KL(T || S), summed over classes, mean over the batch, on
    the very same images: generator and teacher run once, and the generator does not see
    the student.

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run (official code: 2,000 epochs of 120).
        batch_size: images per pseudo-batch.
        student_lr, momentum, weight_decay: of the student's SGD.
        milestones: shares of the run, in (0, 1], after which the student's learning
            rate is x0.1.
        generator_lr: Adam, constant.
        z: noise dimensions. width: of the generator.
        one_hot, activation, balance: weights of the three terms.
        layer: name of the teacher's layer whose input is the penultimate features; by
            default its last nn.Linear.
        clip: gradient norm of student and generator; None leaves both, as the official
            code.
        mean, std: per channel, of the normalisation that the images are emitted in; by
            default the teacher's own.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    The defaults are the official repository's CIFAR-10 command; the paper's text has 1,
    5 and .1 for the three weights, its MNIST settings. Deviations: the paper divides
    the entropy by the number of classes and the l1 norm by nothing; the official code,
    and this one, take log10 without that division, and the mean over the features.
    Batch norms inside the generator have torch's eps (the official ones .8).

    Raises:
        ValueError: on :meth:`start`, when ``activation`` is on and the teacher has no
            nn.Linear, or no layer of that name.
    """

    output = "tanh"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 240_000,
        batch_size: int = 1024,
        student_lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        milestones: Sequence[float] = (0.4, 0.8),
        generator_lr: float = 0.02,
        z: int = 1000,
        width: int = 64,
        one_hot: float = 0.05,
        activation: float = 0.01,
        balance: float = 5.0,
        layer: str | None = None,
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
        self.student_lr, self.momentum, self.weight_decay = student_lr, momentum, weight_decay
        self.milestones = shares_of_run(milestones)
        self.one_hot, self.activation, self.balance, self.layer = (
            one_hot,
            activation,
            balance,
            layer,
        )

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.read_by: list[str] = []
        if self.activation:
            name = last_linear(teacher, NO_LINEAR) if self.layer is None else self.layer
            module_at(teacher, name)  # raises when there is none
            self.read_by = [name]

    def optimize_generator(self):
        return Adam(self.generator.parameters(), lr=self.generator_lr, fused=True), None

    def optimizer(self, student):
        optimizer = sgd(student, self.student_lr, self.momentum, self.weight_decay)
        return optimizer, decay(optimizer, self.milestones, len(self))

    def batch(self, defenses: Sequence = ()) -> Batch:
        noise = self.noise()
        images = self.generator(noise)
        with record(self.teacher, self.read_by, inputs=True) as features:
            logits = self.teacher(images)
        losses = {
            "one_hot": self.one_hot * one_hot(logits),
            "balance": self.balance / math.log(10) * class_balance(logits),
        }
        if self.read_by:
            losses["activation"] = self.activation * activation_loss(features[self.read_by[0]])
        losses = self.learn(images, logits, losses, defenses)
        return Batch(*self.seen(noise, images, logits), losses=losses)

    def student_loss(self, batch: Batch):
        logits = self.student(batch.images)
        return logits, kl(batch.logits, logits), {}
