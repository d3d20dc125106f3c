"""FastDFKD (Fang et al., "Up to 100x Faster Data-free Knowledge Distillation", AAAI
2022, arXiv 2112.06253): a meta generator from which every new batch is a few steps
away.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.checkpoint import load_optimizer
from abdlab.data import deliver
from abdlab.models import memory_format, seeded
from abdlab.sources.generator import Generator
from abdlab.sources.lasting import Lasting
from abdlab.sources.source import take_step


class _Clone(nn.Module):
    """A round's copy of the meta generator, and the noise that is trained with it."""

    def __init__(self, generator: nn.Module, z: Tensor):
        super().__init__()
        self.generator, self.z = generator, nn.Parameter(z)

    def forward(self) -> Tensor:
        return self.generator(self.z)


class FastDFKD(Lasting):
    """Each round adapts a clone of a meta generator, and its noise, in a few steps; the
    best batch joins a pool from which the student learns.

    The gradients of those steps, summed, move the meta generator by one Adam step of
    ``generator_lr`` x ``synthesis_steps`` (first-order MAML, the paper's "FM"). What is
    minimised: see :class:`~abdlab.sources.lasting.Lasting`.

    >>> source = FastDFKD((3, 32, 32), rounds=4, warmup=1, kd_steps=50)
    >>> len(source)  # student steps
    200

    Args:
        shape: (channels, height, width) of the images.
        rounds: with student steps. warmup: rounds before them.
        synthesis_steps, generator_lr: of the clone's Adam; the paper has 2 at 5e-3, 5
            at 3e-3, 10 at 2e-3. The noise has .015 with up to 2 steps, else .01.
        kd_steps: student steps per round. batch_size: images per round, and per student
            step. The pool keeps all: (rounds + warmup) x batch_size images of 8 bits.
        lr: the student's SGD, cosine to 0 by step.
        batch_norm, one_hot, adversarial: weights.
        temperature: of T^2 x KL(T || S), mean over the batch.
        width: of the generator, see :class:`~abdlab.sources.generator.Generator`.
        shift, flip: of views, as the data set allows.

    Deviations from the official code: torch's own initialisation; no reset of first
    layers at round 120; the student's rate ends at 0, not 2e-4.
    """

    #: noise dimensions
    z = 256

    def __init__(
        self,
        shape: Sequence[int],
        *,
        rounds: int = 200,
        warmup: int = 20,
        synthesis_steps: int = 2,
        kd_steps: int = 400,
        batch_size: int = 256,
        lr: float = 0.2,
        generator_lr: float = 5e-3,
        batch_norm: float = 10.0,
        one_hot: float = 0.4,
        adversarial: float = 1.1,
        temperature: float = 20.0,
        width: int = 64,
        shift: int = 4,
        flip: bool = True,
    ):
        super().__init__(
            shape,
            rounds=rounds,
            warmup=warmup,
            synthesis_steps=synthesis_steps,
            kd_steps=kd_steps,
            batch_size=batch_size,
            lr=lr,
            generator_lr=generator_lr,
            batch_norm=batch_norm,
            one_hot=one_hot,
            adversarial=adversarial,
            temperature=temperature,
            width=width,
            shift=shift,
            flip=flip,
        )

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
