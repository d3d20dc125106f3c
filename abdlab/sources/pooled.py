"""What CMI and DeepInversion share: images are made in rounds and join a pool, and the
student learns from the pool.

A round's first pseudo-batch takes many times as long as the others, and a run can be
stopped and saved between pseudo-batches only. An image of the pool takes channels x
height x width bytes, on the device and in every checkpoint (51,200 of 3x32x32: 157 MB),
and a little over twice that while a batch joins. ``shift`` and ``flip`` say what leaves
a label true in this kind of image (a mirrored digit is none), not what any image shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.data import augment, deliver
from abdlab.features import mode
from abdlab.optim import sgd, take_step
from abdlab.sources.objectives import batch_norm_loss, norm_inputs, one_hot
from abdlab.sources.source import Batch, Source, image_shape


def latest(old: Tensor, new: Tensor, limit: int) -> Tensor:
    """The last ``limit`` rows of both, in a tensor that holds nothing else."""
    return torch.cat([old[max(0, len(old) + len(new) - limit) :], new[-limit:]])


@dataclass(kw_only=True, eq=False, repr=False)
class Pooled(Source):
    """Base class of sources that make images in rounds and teach from all of them.

    A round makes one batch in ``synthesis_steps`` steps and keeps it as it was when its
    loss was lowest. Then follow ``kd_steps`` student steps on batches of the pool, each
    a pseudo-batch. **The first one of a round runs the synthesis before it.** The
    losses of the kept batch stand in every Step of the round. The pool holds at most
    ``pool`` images as 8-bit bytes; when full, the oldest make room.

    Subclasses define :meth:`begin` and :meth:`terms`.

    Args:
        shape: (channels, height, width).
        rounds, synthesis_steps, kd_steps: see above.
        synthesis_batch, batch_size: images made per round; images per student step.
        pool: None keeps all. Once started, the images themselves.
        lr: SGD, cosine to 0 by step.
        temperature: T of the KD loss T^2 x KL(T || S), summed over classes.
        batch_norm, one_hot: weights of the batch-norm statistics loss and of the
            cross-entropy with random targets.
        shift, flip: random moves, in pixels, and mirroring of what networks see.

    Raises:
        ValueError: for impossible settings; on :meth:`start`, for a teacher without
            batch norms that have running statistics.

    >>> from abdlab import CMI
    >>> len(CMI((1, 8, 8), rounds=3, kd_steps=5))
    15
    """

    captures = True
    #: of the student's SGD
    momentum, weight_decay = 0.9, 1e-4

    shape: Sequence[int] = field(kw_only=False)
    rounds: int
    synthesis_steps: int
    kd_steps: int
    synthesis_batch: int
    batch_size: int
    pool: int | None = None
    lr: float
    temperature: float
    batch_norm: float
    one_hot: float
    shift: int
    flip: bool

    def __post_init__(self):
        self.shape = image_shape(self.shape)
        if (
            min(self.rounds, self.synthesis_steps, self.kd_steps) < 1
            or min(self.synthesis_batch, self.batch_size) < 2
        ):
            raise ValueError(
                "rounds, synthesis_steps and kd_steps must be at least 1, synthesis_batch and"
                " batch_size at least 2 (for batch norm)"
            )
        if self.pool is not None and self.pool < self.synthesis_batch:
            raise ValueError(
                f"pool must hold at least one round's {self.synthesis_batch} images, not"
                f" {self.pool} (None keeps all)"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        # the setting; ``pool`` is the images once there are some
        self.pool_size = self.rounds * self.synthesis_batch if self.pool is None else self.pool

    def __len__(self) -> int:
        return self.rounds * self.kd_steps

    def begin(self) -> tuple[nn.Module, list[Optimizer]]:
        """A new round's maker, called without arguments for images (synthesis_batch, C,
        H, W), and what trains it.

        The maker holds all that these optimisers train, so that one look at its
        gradients finds what is not finite.
        """
        raise NotImplementedError

    def terms(
        self, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """(what the teacher was shown, its logits, the weighed loss terms, what
        :meth:`remember` gets if this batch is kept).
        """
        raise NotImplementedError

    def remember(self, memory: Tensor | None) -> None:
        """Learn at the end of a round what the kept batch's :meth:`terms` handed on."""

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        with torch.no_grad(), mode(teacher, training=False), norm_inputs(teacher) as inputs:
            self.classes = teacher(torch.zeros(2, *self.shape, device=device)).shape[1]
        self.channels = {name: x.shape[1] for name, x in inputs.items()}
        self.pool = torch.empty(0, *self.shape, dtype=torch.uint8, device=device)
        self.order, self.position, self.made = torch.empty(0, dtype=torch.long), 0, 0
        self.losses: dict[str, Tensor] = {}

    def optimizer(self, student):
        optimizer = sgd(student, self.lr, self.momentum, self.weight_decay)
        return optimizer, CosineAnnealingLR(optimizer, len(self))

    def batch(self, defenses: Sequence = ()) -> Batch:
        if self.made % self.kd_steps == 0:
            self._round(defenses)
        self.made += 1
        images = augment(self._sample(), self.shift, self.flip, self.rng)
        images = self.phases.hold("augmented", images)
        logits = self.phases.run(("teacher", images.shape), lambda: self._answer(images))
        return Batch(images, logits, losses=dict(self.losses))

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Tensor:
        return self.teacher(images)

    def synthesize(self, n: int, seed: int = 0) -> Tensor:
        """``n`` images (n, C, H, W) of the pool in random order, none twice before all
        were there once.

        Leaves the run's own random numbers alone. Raises ValueError before the first
        round, when the pool is empty.
        """
        if not len(self.pool):
            raise ValueError(f"the pool of {self.name} is empty: it fills with the first round")
        rng, times = torch.Generator().manual_seed(seed), -(-n // len(self.pool))
        chosen = torch.cat([torch.randperm(len(self.pool), generator=rng) for _ in range(times)])[
            :n
        ]
        return self.pool[deliver(chosen, self.device)] / 255

    def inversion(
        self, view: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(teacher's logits, what entered its batch norms, the terms "batch_norm" and
        "one_hot") on ``view`` (B, C, H, W).
        """
        with norm_inputs(self.teacher) as inputs:
            logits = self.teacher(view)
        losses = {
            "batch_norm": self.batch_norm * self.distance(inputs),
            "one_hot": self.one_hot * one_hot(logits, targets),
        }
        return logits, inputs, losses

    def distance(self, inputs: dict[str, Tensor]) -> Tensor:
        """How far the images' statistics, in what entered the teacher's batch norms, are
        from the remembered ones; a scalar.
        """
        return batch_norm_loss(self.teacher, inputs)

    def targets(self) -> Tensor:
        """The new round's classes (synthesis_batch,), at random, on the device."""
        return deliver(
            torch.randint(self.classes, (self.synthesis_batch,), generator=self.rng), self.device
        )

    def gather(self, maker: nn.Module) -> None:
        """Learn from the gradients that each synthesis step leaves on its maker."""

    def _round(self, defenses: Sequence) -> None:
        maker, optimizers = self.begin()
        targets = self.targets()
        best, norm = None, torch.zeros((), device=self.device)
        for _ in range(self.synthesis_steps):
            images = maker()
            view, logits, losses, memory = self.terms(images, targets)
            for defense in defenses:
                term = defense.synthesis_term(view, logits)
                if term is not None:
                    losses[f"{defense.name}_synthesis"] = term
            total = sum(losses.values())
            now = [total.detach(), images.detach(), *(value.detach() for value in losses.values())]
            now += [memory] if memory is not None else []
            # the host does not wait to learn whether this batch is better
            best = (
                now
                if best is None
                else [torch.where(total < best[0], *pair) for pair in zip(now, best, strict=True)]
            )
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = norm + take_step(optimizers, maker, None)
            self.gather(maker)
        self.norms["+".join(losses)] = norm
        self.losses = dict(zip(losses, best[2:], strict=False))
        self.pool = latest(
            self.pool, best[1].clamp(0, 1).mul(255).round().to(torch.uint8), self.pool_size
        )
        self.remember(best[2 + len(losses)] if memory is not None else None)
        self._shuffle()

    def _shuffle(self) -> None:
        self.order, self.position = torch.randperm(len(self.pool), generator=self.rng), 0

    def _sample(self) -> Tensor:
        size = min(self.batch_size, len(self.pool))
        if self.position + size > len(self.order):
            self._shuffle()
        chosen = deliver(self.order[self.position : self.position + size], self.device)
        self.position += size
        return self.pool[chosen] / 255

    def state(self):
        return {
            **super().state(),
            "pool": self.pool,
            "order": self.order,
            "position": self.position,
            "made": self.made,
            "losses": self.losses,
        }

    def restore(self, state):
        super().restore(state)
        self.pool, self.order = state["pool"].to(self.device), state["order"].cpu()
        self.position, self.made, self.losses = (
            state["position"],
            state["made"],
            dict(state["losses"]),
        )
