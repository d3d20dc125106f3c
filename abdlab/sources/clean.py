"""Clean KD: the baseline that sees real, clean data. Its student's ASR is the floor to
compare a defense with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.data import augment, deliver
from abdlab.losses import kl
from abdlab.optim import sgd
from abdlab.sources.source import Batch, Source


@dataclass(kw_only=True, eq=False, repr=False)
class CleanKD(Source):
    """Hinton's distillation (arXiv 1503.02531) on a share of the clean training data,
    as in the ABD paper's baseline.

    Loss: alpha x T^2 x KL(T || S at temperature T, mean over the batch) + (1 - alpha) x
    cross-entropy.

    Args:
        images, labels: the clean training set, (N, C, H, W) in [0, 1] and (N,).
        share: random part of it that is used (paper: .2).
        epochs: passes over that part.
        batch_size, lr, weight_decay: SGD with Nesterov momentum .9, cosine to 0 by
            step.
        temperature, alpha: paper: 6 and .95.
        shift, flip: augmentation, as in the data set's own fields.

    Deviation: the official run normalises with a wrong std and keeps the learning rate
    constant; this baseline is meant to be fair, so it does neither.

    Raises:
        ValueError: for a share outside (0, 1] or an alpha outside [0, 1].

    >>> source = CleanKD(torch.rand(50, 1, 8, 8), torch.zeros(50), epochs=3, batch_size=5)
    >>> len(source)  # 3 passes over 10 of the 50
    6
    """

    captures = True
    #: of the student's SGD
    momentum = 0.9

    images: Tensor = field(kw_only=False)
    labels: Tensor = field(kw_only=False)
    share: float = 0.2
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    temperature: float = 6.0
    alpha: float = 0.95
    shift: int = 0
    flip: bool = False

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share is the used part of the clean data, in (0, 1], not {self.share}"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha weighs distillation against the labels, in [0, 1], not {self.alpha}"
            )
        self.batch_size = min(self.batch_size, max(1, round(self.share * len(self.labels))))

    @classmethod
    def make(cls, data, values, build):
        """The one source that touches real images: the data set's training split.

        Raises:
            ValueError: for a data set without labelled images.
        """
        if len(data.train_labels) == 0:
            raise ValueError(f"clean KD learns from labelled images, and {data.name} has none")
        return cls(data.train_images, data.train_labels, **cls.options(data, values))

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.share * len(self.labels)) // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.pool = torch.randperm(len(self.labels), generator=self.rng)[
            : max(1, round(self.share * len(self.labels)))
        ]
        self.order, self.position = self.pool[:0], self.per_epoch

    def optimizer(self, student):
        optimizer = sgd(student, self.lr, self.momentum, self.weight_decay, nesterov=True)
        return optimizer, CosineAnnealingLR(optimizer, len(self))

    def batch(self, defenses: Sequence = ()) -> Batch:
        if self.position == self.per_epoch:
            self.order, self.position = (
                self.pool[torch.randperm(len(self.pool), generator=self.rng)],
                0,
            )
        chosen = deliver(
            self.order[self.position * self.batch_size : (self.position + 1) * self.batch_size],
            self.labels.device,
        )
        self.position += 1
        images = augment(self.images[chosen], self.shift, self.flip, self.rng).to(self.device)
        with torch.no_grad():
            logits = self.teacher(images)
        return Batch(images, logits, labels=self.labels[chosen].to(self.device), synthesised=False)

    def student_loss(self, batch: Batch):
        logits = self.student(batch.images)
        kd = self.alpha * self.temperature**2 * kl(batch.logits, logits, self.temperature)
        return (
            logits,
            kd,
            {"cross_entropy": (1 - self.alpha) * F.cross_entropy(logits, batch.labels)},
        )

    def state(self):
        return {
            **super().state(),
            "pool": self.pool,
            "order": self.order,
            "position": self.position,
        }

    def restore(self, state):
        super().restore(state)
        self.pool, self.order, self.position = (
            state["pool"].cpu(),
            state["order"].cpu(),
            state["position"],
        )
