"""What every way of optimising a trigger works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Bench:
    """What every method works on.

    Attributes:
        model: clean, in eval mode, frozen.
        images: (N, C, H, W) in [0, 1], of other classes than the target.
        every: all of the attacker's images, those of the target among them; they may lie
            on another device.
        target: the class that a model shall predict where the trigger is.
        generator: draws starting points and mini-batches, on the CPU.
    """

    model: nn.Module
    images: Tensor
    every: Tensor
    target: int
    generator: torch.Generator

    def draw(self, n: int = 64, own: bool = False) -> Tensor:
        """A random mini-batch of the images; with ``own``, of every one."""
        images = self.every if own else self.images
        rows = torch.randint(len(images), (n,), generator=self.generator)
        return images[rows.to(images.device)].to(self.images.device)

    def missed(self, logits: Tensor) -> Tensor:
        """Cross-entropy of these logits (N, classes) to the target: a mean over images."""
        target = torch.full((len(logits),), self.target, device=logits.device)
        return F.cross_entropy(logits, target)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) on the images' device, the same on every device."""
        return torch.rand(shape, generator=self.generator).to(self.images)

    def normal(self, *shape: int) -> Tensor:
        """Gaussian numbers on the images' device, the same on every device."""
        return torch.randn(shape, generator=self.generator).to(self.images)
