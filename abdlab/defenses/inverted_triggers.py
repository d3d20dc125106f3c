"""Triggers inverted as in Neural Cleanse (Wang et al., S&P 2019): what trigger
unlearning teaches the student to ignore.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode
from abdlab.sources.source import Batch


def stamped(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - mask) x images + mask x pattern, (B, C, H, W): a trigger as Neural Cleanse
    writes it.

    Args:
        mask: (B or 1, 1, H, W) in [0, 1]. pattern: (B or 1, C, H, W), pixels in [0, 1].
    """
    return (1 - mask) * images + mask * pattern


def trigger_objective(logits: Tensor, target: int, mask: Tensor, penalty: float) -> Tensor:
    """Mean cross-entropy of the stamped images' ``logits`` with ``target`` + penalty x
    the sum of the mask; a scalar.
    """
    return (
        F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))
        + penalty * mask.sum()
    )


def inverted_trigger(
    model: nn.Module,
    images: Tensor,
    target: int,
    mask: Tensor,
    pattern: Tensor,
    steps: int,
    lr: float,
    penalty: float,
    region: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, float]:
    """The smallest trigger that turns all images into ``target``, by Adam on
    :func:`trigger_objective` (Neural Cleanse).

    Args:
        model: whose answer it shall change; its weights take no gradient.
        images: (B, C, H, W).
        mask, pattern: start, (1, 1, H, W) and (1, C, H, W), before the sigmoid that
            keeps both in [0, 1].
        steps, lr: of Adam, lr before the sigmoid. penalty: nats per pixel of the mask.
        region: (1, 1, H, W) of 0 and 1: where the mask may be; by default anywhere.

    Returns:
        (mask, pattern, the last step's objective), detached, the first two in [0, 1].
    """
    mask, pattern = (x.clone().requires_grad_() for x in (mask, pattern))
    adam = Adam([mask, pattern], lr=lr)
    for _ in range(steps):
        m = mask.sigmoid() * region
        loss = trigger_objective(model(stamped(images, m, pattern.sigmoid())), target, m, penalty)
        mask.grad, pattern.grad = torch.autograd.grad(loss, [mask, pattern])
        adam.step()
    return mask.detach().sigmoid() * region, pattern.detach().sigmoid(), loss.item()


class InvertedTriggers:
    """The triggers that the target class was inverted into, the latest ``size`` of
    them; and the place that they take.

    Args:
        target: the class; None takes the one that the teacher is
            turned into most cheaply.
        size: how many are kept.
        lr, penalty, init_std: of :func:`inverted_trigger` and its Gaussian start.
        natural: a new stamp is kept only while its objective is at most this factor of
            the cheapest other class's on the teacher. None keeps all.
        margin: pixels around the teacher's own stamps, beyond which those of the victim
            may not lie. None lets them lie anywhere.
        rng: draws the starts, which image carries which stamp, and what images are
            covered with.
    """

    def __init__(
        self,
        target: int | None,
        size: int,
        lr: float,
        penalty: float,
        init_std: float,
        natural: float | None,
        margin: int | None,
        rng: torch.Generator,
    ):
        self.target, self.size, self.lr, self.penalty, self.init_std = (
            target,
            size,
            lr,
            penalty,
            init_std,
        )
        self.natural, self.margin, self.rng = natural, margin, rng
        self.costs: list[
            float
        ] = []  # of each class, the objective that the teacher's stamp reached
        self.masks = self.patterns = torch.zeros(0)  # (stamps, 1, H, W) and (stamps, C, H, W)
        self.place = torch.zeros(
            0
        )  # (1, 1, H, W) booleans: where the teacher's stamps of the target are
        self.relabelled = 0

    def __len__(self) -> int:
        return len(self.masks)

    def begin(
        self,
        teacher: nn.Module,
        victim: nn.Module,
        images: Tensor,
        classes: int,
        steps: int,
        cover: bool,
    ) -> None:
        """Find the target, fill the bank with stamps of the ``victim``, and, to
        ``cover``, the place of the teacher's.
        """
        if self.target is None or self.natural is not None:
            self.costs = [
                self._invert(teacher, images, label, steps)[2] for label in range(classes)
            ]
        if self.target is None:
            self.target = min(range(classes), key=self.costs.__getitem__)
        if self.margin is not None:
            self._find_place(teacher, images, steps)
        found = [
            self._invert(victim, images, self.target, steps, self.region)[:2]
            for _ in range(self.size)
        ]
        self.masks, self.patterns = (torch.cat(parts) for parts in zip(*found, strict=True))
        if cover and self.margin is None:
            self._find_place(teacher, images, steps)

    def renew(self, victim: nn.Module, images: Tensor, steps: int) -> None:
        """One more stamp, from a start of its own; the oldest goes. A stamp that is
        dearer than ``natural`` is not taken.
        """
        mask, pattern, cost = self._invert(victim, images, self.target, steps, self.region)
        others = [other for label, other in enumerate(self.costs) if label != self.target]
        if self.natural is None or cost <= self.natural * min(others):
            self.masks = torch.cat([self.masks, mask])[-self.size :]
            self.patterns = torch.cat([self.patterns, pattern])[-self.size :]

    @property
    def region(self) -> Tensor | float:
        """Where the victim's stamps may lie: :attr:`place` with its margin, (1, 1, H,
        W), or 1 for anywhere.
        """
        if self.margin is None:
            return 1.0
        return F.max_pool2d(self.place.float(), 2 * self.margin + 1, stride=1, padding=self.margin)

    def on(self, images: Tensor) -> Tensor:
        """The images (B, C, H, W), each with one of the stamps."""
        which = deliver(
            torch.randint(len(self.masks), (len(images),), generator=self.rng), images.device
        )
        return stamped(images, self.masks[which], self.patterns[which])

    @torch.no_grad()
    def relabel(self, teacher: nn.Module, batch: Batch) -> None:
        """Give the images of ``batch`` that are the target only for what lies at
        :attr:`place` the logits without it.

        Each image that the teacher calls the target is covered at the place with the
        same pixels of another image, one that is not; where the teacher then calls it
        something else, these logits replace its own in the batch.
        """
        called = batch.logits.argmax(1) == self.target
        suspects, donors = called.nonzero().flatten(), (~called).nonzero().flatten()
        if len(suspects) == 0 or len(donors) == 0:
            return
        drawn = donors[
            deliver(torch.randint(len(donors), (len(suspects),), generator=self.rng), donors.device)
        ]
        covered = teacher(torch.where(self.place, batch.images[drawn], batch.images[suspects]))
        triggered = covered.argmax(1) != self.target
        self.relabelled += int(triggered.sum())
        batch.logits = batch.logits.index_copy(0, suspects[triggered], covered[triggered])

    def state(self) -> dict:
        names = ("target", "costs", "masks", "patterns", "place", "relabelled")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict, device: torch.device) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)

    def report(self) -> dict:
        """Plain values: the target and what each class cost, the stamps' areas in
        pixels, how many images were relabelled.
        """
        areas = [round(area, 1) for area in self.masks.sum((1, 2, 3)).tolist()] if len(self) else []
        costs = [round(cost, 3) for cost in self.costs]
        return {
            "target": self.target,
            "costs": costs,
            "trigger_pixels": areas,
            "relabelled": self.relabelled,
        }

    def _find_place(self, teacher: nn.Module, images: Tensor, steps: int) -> None:
        masks = [self._invert(teacher, images, self.target, steps)[0] for _ in range(self.size)]
        self.place = torch.cat(masks).amax(0, keepdim=True) > 0.5

    def _invert(
        self,
        victim: nn.Module,
        images: Tensor,
        target: int,
        steps: int,
        region: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor, float]:
        shapes = (1, 1, *images.shape[2:]), (1, *images.shape[1:])
        start = [
            self.init_std * deliver(torch.randn(shape, generator=self.rng), images.device)
            for shape in shapes
        ]
        with (
            mode(victim, False),
            frozen(victim),
        ):  # as it is used: with batch statistics one stamp on all hides itself
            return inverted_trigger(
                victim, images, target, *start, steps, self.lr, self.penalty, region
            )
