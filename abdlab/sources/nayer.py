"""NAYER (Tran et al., "NAYER: Noisy Layer Data Generation for Efficient and Effective
Data-free Knowledge Distillation", CVPR 2024, arXiv 2310.00258): the noise sits in a
layer, not in the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.models import memory_format, seeded
from abdlab.sources.generator import Generator
from abdlab.sources.lasting import Lasting


def label_codes(classes: int, size: int, rng: torch.Generator) -> Tensor:
    """Random codes of unit length, one per class and orthogonal to each other;
    (classes, max(size, classes)).

    >>> codes = label_codes(3, 8, torch.Generator().manual_seed(0))
    >>> (codes @ codes.T).allclose(torch.eye(3), atol=1e-6)
    True
    """
    return torch.linalg.qr(torch.randn(max(size, classes), classes, generator=rng))[0].T


class _Noisy(nn.Module):
    """One batch's noisy layers, in front of what outlives it: a batch norm of the codes
    and a generator.

    Args:
        weight: (layers, code, embedding); each layer makes one image of every class.
        codes: (layers, classes, code) in the order of the images. batch: images wanted,
            up to layers x classes.
    """

    def __init__(
        self, norm: nn.Module, generator: nn.Module, weight: Tensor, codes: Tensor, batch: int
    ):
        super().__init__()
        self.norm, self.generator, self.batch = norm, generator, batch
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(weight.shape[0], 1, weight.shape[2]))
        self.register_buffer("codes", codes)

    def forward(self) -> Tensor:
        layers, classes, size = self.codes.shape
        codes = self.norm(self.codes.reshape(-1, size)).view(layers, classes, size)
        embedded = torch.baddbmm(self.bias, codes, self.weight)
        return self.generator(embedded.flatten(0, 1)[: self.batch])


@dataclass(kw_only=True, eq=False, repr=False)
class NAYER(Lasting):
    """Each batch draws new noisy layers, from label codes to a generator's input, and
    trains them with the generator; the best images join a pool for the student.

    One noisy layer makes one image of each class, so that a batch has
    batch_size / classes of them, computed together. The generator lasts for
    :attr:`life` rounds and then starts anew. What is minimised: see
    :class:`~abdlab.sources.lasting.Lasting`.

    Args:
        shape, batch_size, lr, adversarial, width, shift, flip: see
            :class:`~abdlab.sources.lasting.Lasting`.
        rounds, kd_steps, warmup: the paper's 100 epochs of 400 student steps make two
            batches each, 20 epochs before them ten each.
        synthesis_steps, generator_lr: of a new Adam for every batch.

    Deviations: fixed random orthogonal codes for the classes, where the paper embeds
    their names with CLIP; torch's own initialisation of the generator; the noisy layers
    emit 256 numbers (the command line of the code: 1,000); student batches of 400 (there
    512); the student's rate ends at 0.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> sizes = dict(rounds=1, warmup=1, synthesis_steps=2, kd_steps=2, batch_size=4)
    >>> steps = list(distill(teacher, student, NAYER((1, 8, 8), **sizes, width=2)))
    >>> sorted(steps[-1].losses)
    ['adversarial', 'batch_norm', 'kd', 'one_hot']
    """

    #: numbers in a label code, and in what a noisy layer makes of it
    code, embedding = 512, 256
    #: rounds after which the generator starts anew: the paper's 10 epochs
    life = 20
    one_hot: ClassVar[float] = 0.5

    rounds: int = 200
    warmup: int = 200
    synthesis_steps: int = 30
    kd_steps: int = 200
    batch_size: int = 400
    lr: float = 0.2
    generator_lr: float = 4e-3
    adversarial: float = 1.33
    width: int = 64
    shift: int = 4
    flip: bool = True

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        codes = label_codes(self.classes, self.code, torch.Generator().manual_seed(seed))
        self.codes = codes.to(device)
        self.layers = -(-self.synthesis_batch // self.classes)
        self._renew(seed)

    def begin(self):
        if self.rounds_made % self.life == 0:
            self._renew(int(torch.randint(2**62, (1,), generator=self.rng)))
        sizes = (self.layers, self.codes.shape[1], self.embedding)
        weight = deliver(torch.randn(sizes, generator=self.rng), self.device)
        # every layer has all classes; of the last one a random rest is used
        order = torch.arange(self.classes).repeat(self.layers, 1)
        order[-1] = torch.randperm(self.classes, generator=self.rng)
        order = deliver(order, self.device)
        self.order_of_classes = order.flatten()[: self.synthesis_batch]
        maker = _Noisy(self.norm, self.core, weight, self.codes[order], self.synthesis_batch)
        return maker.train(), [
            Adam(maker.parameters(), lr=self.generator_lr, betas=(0.5, 0.999), fused=True)
        ]

    def targets(self):
        return self.order_of_classes

    def _renew(self, seed: int) -> None:
        """A generator, and the batch norm before it, from the start."""
        channels = self.shape[0]
        with seeded(seed):
            self.core = Generator(
                self.shape,
                self.embedding,
                self.width,
                [0.0] * channels,
                [1.0] * channels,
                "sigmoid",
            )
            self.norm = nn.BatchNorm1d(self.codes.shape[1])
        self.core.to(self.device, memory_format=memory_format(self.student))
        self.norm.to(self.device)

    def state(self):
        core, norm = self.core.state_dict(), self.norm.state_dict()
        return {**super().state(), "core": core, "norm": norm, "codes": self.codes}

    def restore(self, state):
        super().restore(state)
        self.core.load_state_dict(state["core"])
        self.norm.load_state_dict(state["norm"])
        self.codes = state["codes"].to(self.device)
