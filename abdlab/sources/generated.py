"""What the online sources share: a generator that learns while the student does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from abdlab.data import deliver
from abdlab.features import frozen
from abdlab.models import memory_format, normalization, seeded
from abdlab.optim import load_optimizer, take_step
from abdlab.sources.generator import Generator
from abdlab.sources.source import Source, image_shape


@dataclass(kw_only=True, eq=False, repr=False)
class Generated(Source):
    """Base class of sources whose generator learns while the student does.

    A subclass says what its generator minimises and how the student learns, and
    declares its paper's defaults. Its ``batch`` draws :meth:`noise`, runs generator and
    teacher, and hands its own loss terms to :meth:`learn`.

    Images are emitted in the units of the teacher's own
    :class:`~abdlab.models.Normalize` layer, or of .5 and .25, and mapped back to
    pixels; a generator that ends in a sigmoid emits pixels.

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run.
        batch_size: images per pseudo-batch.
        generator_lr: of the optimiser that :meth:`optimize_generator` makes.
        z: noise dimensions. width: of the generator, see
            :class:`~abdlab.sources.generator.Generator`.
        ema: in [0, 1): the student and :meth:`synthesize` see images of a moving
            average of the generator's weights, which keeps that share of itself in
            every step; None shows the generator's own.

    ``clip``, a constant of the class, bounds the gradient norms of student and
    generator.

    Raises:
        ValueError: for sizes below 1, and for a batch too small for batch norm.

    >>> from abdlab import DFAD
    >>> source = DFAD((1, 8, 8), pseudo_batches=7)
    >>> len(source), source.batch_size
    (7, 256)
    """

    captures = True
    #: what stands at the generator's end, see
    #: :class:`~abdlab.sources.generator.Generator`
    output = "batchnorm"
    #: numbers that the generator takes besides the noise, as :meth:`noise` appends them
    conditions = 0
    #: of a student's SGD, where the source has one
    momentum = 0.9

    shape: Sequence[int] = field(kw_only=False)
    pseudo_batches: int
    batch_size: int
    generator_lr: float
    z: int
    width: int
    ema: float | None = None

    def __post_init__(self):
        self.shape = image_shape(self.shape)
        if min(self.pseudo_batches, self.z, self.width) < 1 or self.batch_size < 2:
            raise ValueError(
                "pseudo_batches, z and width must be at least 1, batch_size at least 2 (for batch"
                " norm)"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is a share in [0, 1), or None for no average, not {self.ema}")

    def __len__(self) -> int:
        return self.pseudo_batches

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        mean, std = normalization(teacher, self.shape[0])
        with seeded(seed):
            self.generator = Generator(
                self.shape, self.z + self.conditions, self.width, mean, std, self.output
            )
        self.generator.to(device, memory_format=memory_format(student)).train()
        #: what the student sees images of: the generator, or its moving average
        self.shown = self.generator
        if self.ema is not None:
            self.shown = copy.deepcopy(self.generator).requires_grad_(False)
        self.generator_optimizer, self.generator_schedule = self.optimize_generator()

    def optimize_generator(self) -> tuple[Optimizer, LRScheduler | None]:
        """The generator's optimiser and its schedule, which steps once per generator
        step: Adam, cosine to 0 over the run.
        """
        adam = Adam(self.generator.parameters(), lr=self.generator_lr, fused=True)
        return adam, CosineAnnealingLR(adam, self.horizon)

    def noise(self, rng: torch.Generator | None = None) -> Tensor:
        """The next pseudo-batch's noise (batch_size, z), on the device; of the run's
        own random numbers, unless others are given.
        """
        return deliver(torch.randn(self.batch_size, self.z, generator=rng or self.rng), self.device)

    def ask(self, images: Tensor, defenses: Sequence[Any]) -> Tensor:
        """The teacher's logits (B, classes) on images that are then handed to
        :meth:`learn`, from a pass that a defense shares if one does.
        """
        for defense in defenses:
            if (logits := defense.teacher_logits(images)) is not None:
                return logits
        return self.teacher(images)

    def learn(
        self, images: Tensor, logits: Tensor, losses: dict[str, Tensor], defenses: Sequence[Any]
    ) -> dict[str, Tensor]:
        """One step of the generator on the sum of ``losses`` and of each defense's
        ``synthesis_term``.

        Args:
            images: (B, C, H, W), attached to the generator. logits: the teacher's on
                them, attached.
            losses: the source's own terms by name, scalars, weights included.

        Returns:
            all terms, detached. Where their gradient is not finite no step was taken,
            and ``norms`` say so.
        """
        losses = self.improve(images, logits, losses, defenses)
        self.advance()
        return losses

    def improve(
        self, images: Tensor, logits: Tensor, losses: dict[str, Tensor], defenses: Sequence[Any]
    ) -> dict[str, Tensor]:
        """:meth:`learn` without the schedule's step, which is the host's: what a CUDA
        graph can hold of it.

        While a defense holds generators (:attr:`~abdlab.defenses.Defense.holds`) there
        is no step, and no norm to check.
        """
        if any(defense.holds() for defense in defenses):
            self.norms = {}
            return {name: value.detach() for name, value in losses.items()}
        for defense in defenses:
            term = defense.synthesis_term(images, logits)
            if term is not None:
                losses[f"{defense.name}_synthesis"] = term
        self.generator_optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        self.norms["+".join(losses)] = take_step(
            [self.generator_optimizer], self.generator, self.clip
        )
        self._follow()
        return {name: value.detach() for name, value in losses.items()}

    def seen(self, noise: Tensor, images: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(images, teacher's logits) for the student, detached: those that the generator
        has just learnt from, or new ones of its moving average.
        """
        if self.shown is self.generator:
            return images.detach(), logits.detach()
        with torch.no_grad():
            images = self.shown(noise)
            return images, self.teacher(images)

    @torch.no_grad()
    def _follow(self) -> None:
        """The moving average's step after the generator's."""
        if self.shown is not self.generator:
            pairs = zip(self.shown.parameters(), self.generator.parameters(), strict=True)
            for average, now in pairs:
                average.lerp_(now, 1 - self.ema)

    def advance(self) -> None:
        """The step of the generator's schedule that follows each of :meth:`improve`."""
        if self.generator_schedule is not None:
            self.generator_schedule.step()

    @torch.no_grad()
    def synthesize(self, n: int, seed: int = 0) -> Tensor:
        """``n`` images (n, C, H, W) of the generator as it is, in batches of the size
        that it was trained with.

        Leaves the run's own random numbers and the generator's statistics alone.
        """
        rng, count = torch.Generator().manual_seed(seed), -(-n // self.batch_size)
        with frozen(self.shown):
            return torch.cat([self.shown(self.noise(rng)) for _ in range(count)])[:n]

    def state(self):
        average = {} if self.shown is self.generator else {"average": self.shown.state_dict()}
        return {
            **super().state(),
            **average,
            "generator": self.generator.state_dict(),
            "optimizer": self.generator_optimizer.state_dict(),
            "schedule": self.generator_schedule and self.generator_schedule.state_dict(),
        }

    def restore(self, state):
        super().restore(state)
        self.generator.load_state_dict(state["generator"])
        if self.shown is not self.generator:
            self.shown.load_state_dict(state["average"])
        load_optimizer(self.generator_optimizer, state["optimizer"])
        if self.generator_schedule is not None:
            self.generator_schedule.load_state_dict(state["schedule"])
