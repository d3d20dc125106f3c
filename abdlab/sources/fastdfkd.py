"""FastDFKD (Fang et al., "Up to 100x Faster Data-free Knowledge Distillation", AAAI
2022, arXiv 2112.06253): a meta generator from which every new batch is a few steps
away.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.models import memory_format, seeded
from abdlab.optim import load_optimizer, take_step
from abdlab.sources.generator import Generator
from abdlab.sources.lasting import Lasting


class _Clone(nn.Module):
    """A round's copy of the meta generator, and the noise that is trained with it."""

    def __init__(self, generator: nn.Module, z: Tensor):
        super().__init__()
        self.generator, self.z = generator, nn.Parameter(z)

    def forward(self) -> Tensor:
        return self.generator(self.z)


@dataclass(kw_only=True, eq=False, repr=False)
class FastDFKD(Lasting):
    """Each round adapts a clone of a meta generator, and its noise, in a few steps; the
    best batch joins a pool from which the student learns.

    The gradients of those steps, summed, move the meta generator by one Adam step of
    ``generator_lr`` x ``synthesis_steps`` (first-order MAML, the paper's "FM"). What is
    minimised: see :class:`~abdlab.sources.lasting.Lasting`.

    Args:
        shape, rounds, warmup, kd_steps, batch_size, lr, adversarial, width, shift, flip:
            see :class:`~abdlab.sources.lasting.Lasting`.
        synthesis_steps, generator_lr: of the clone's Adam; the paper has 2 at 5e-3, 5
            at 3e-3, 10 at 2e-3. The noise has .015 with up to 2 steps, else .01.

    Deviations from the official code: torch's own initialisation; no reset of first
    layers at round 120; the student's rate ends at 0, not 2e-4.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> sizes = dict(rounds=1, warmup=1, kd_steps=2, batch_size=4, width=2)
    >>> steps = list(distill(teacher, student, FastDFKD((1, 8, 8), **sizes)))
    >>> sorted(steps[-1].losses)
    ['adversarial', 'batch_norm', 'kd', 'one_hot']
    """

    #: noise dimensions
    z = 256
    one_hot: ClassVar[float] = 0.4

    rounds: int = 200
    warmup: int = 20
    synthesis_steps: int = 2
    kd_steps: int = 400
    batch_size: int = 256
    lr: float = 0.2
    generator_lr: float = 5e-3
    adversarial: float = 1.1
    width: int = 64
    shift: int = 4
    flip: bool = True

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        channels = self.shape[0]
        with seeded(seed):
            self.meta = Generator(
                self.shape, self.z, self.width, [0.0] * channels, [1.0] * channels, "sigmoid"
            )
        self.meta.to(device, memory_format=memory_format(student)).train()
        rate = self.generator_lr * self.synthesis_steps
        self.meta_optimizer = Adam(self.meta.parameters(), lr=rate, betas=(0.5, 0.999), fused=True)

    def begin(self):
        z = deliver(torch.randn(self.synthesis_batch, self.z, generator=self.rng), self.device)
        clone = _Clone(copy.deepcopy(self.meta), z)
        noise_lr = 0.015 if self.synthesis_steps <= 2 else 0.01
        groups = [
            {"params": clone.generator.parameters()},
            {"params": [clone.z], "lr": noise_lr},
        ]
        return clone, [Adam(groups, lr=self.generator_lr, betas=(0.5, 0.999), fused=True)]

    def gather(self, maker):
        pairs = zip(self.meta.parameters(), maker.generator.parameters(), strict=True)
        for ours, theirs in pairs:
            if theirs.grad is not None:
                ours.grad = theirs.grad.clone() if ours.grad is None else ours.grad + theirs.grad

    def remember(self, memory):
        super().remember(memory)
        self.norms["meta"] = take_step([self.meta_optimizer], self.meta, None)
        self.meta_optimizer.zero_grad(set_to_none=True)

    def state(self):
        return {
            **super().state(),
            "meta": self.meta.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
        }

    def restore(self, state):
        super().restore(state)
        self.meta.load_state_dict(state["meta"])
        load_optimizer(self.meta_optimizer, state["meta_optimizer"])
