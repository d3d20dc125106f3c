"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019, arXiv
1904.01186). The teacher stands in for a GAN's fixed discriminator.

Deviations. The paper's text has weights of 1, 5 and .1, its MNIST settings, divides the
entropy by the number of classes and the l1 norm by nothing. The official code, and this
one, take log10 without that division, and the mean over the features. Batch norms
inside the generator have torch's eps (the official ones .8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Adam

from abdlab.features import full, last_linear, module_at, record
from abdlab.optim import decay, sgd
from abdlab.sources.generated import Generated
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


@dataclass(kw_only=True, eq=False, repr=False)
class DAFL(Generated):
    """Trains a generator whose images look to the teacher like its training data, and
    the student on the same images.

    The generator minimises ``one_hot`` x cross-entropy of the teacher's logits with its
    own predictions - ``activation`` x mean |penultimate features| - ``balance`` x
    entropy of the batch's mean prediction, in decimal digits. It does not see the
    student, which learns KL(T || S), summed over classes.

    Args:
        shape, pseudo_batches, batch_size, generator_lr, z, width, ema: see
            :class:`~abdlab.sources.generated.Generated`. Adam, constant.
        student_lr: of the student's SGD, x0.1 after each of :attr:`milestones`.
        one_hot, activation, balance: weights of the three terms.
        layer: name of the teacher's layer whose input is the penultimate features;
            None: its last nn.Linear.

    The defaults are the official CIFAR-10 command. Deviations stand at the top of the
    file.

    Raises:
        ValueError: on :meth:`start`, when ``activation`` is on and the teacher has no
            such layer.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = DAFL((1, 8, 8), pseudo_batches=2, batch_size=4, z=5, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)][-1]
    ['activation', 'balance', 'kd', 'one_hot']
    """

    output = "tanh"
    #: of the student's SGD
    weight_decay = 5e-4
    #: shares of the run, in (0, 1]
    milestones = (0.4, 0.8)

    pseudo_batches: int = 240_000
    batch_size: int = 1024
    student_lr: float = 0.1
    generator_lr: float = 0.02
    z: int = 1000
    width: int = 64
    one_hot: float = 0.05
    activation: float = 0.01
    balance: float = 5.0
    layer: str | None = None

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
