"""DHBE (Yan et al., AsiaCCS 2023): a network is taught its own answers, and to
keep them under patches that a small generator makes to change them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.losses import kl
from abdlab.purifiers.purifier import Purifier


def place(images: Tensor, patches: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images (B, C, H, W), each with its patch (B, C, h, w) whose upper left pixel is
    at (rows, columns), (B,) each. Gradients reach the patches.

    >>> place(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1), torch.tensor([1]), torch.tensor([0]))
    tensor([[[[0., 0.],
              [1., 0.]]]])
    """
    (height, width), (high, wide) = images.shape[2:], patches.shape[2:]
    down = torch.arange(height, device=images.device) - rows[:, None]
    across = torch.arange(width, device=images.device) - columns[:, None]
    inside = ((down >= 0) & (down < high))[:, :, None] & ((across >= 0) & (across < wide))[:, None]
    at = down.clamp(0, high - 1)[:, :, None] * wide + across.clamp(0, wide - 1)[:, None]
    moved = patches.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return torch.where(inside[:, None], moved.view_as(images), images)


class DHBE(Purifier):
    """On synthetic images, mean KL(teacher || copy) + ``weight`` x mean KL(teacher || copy
    under a patch) falls, by Adam; the patches' generator raises the latter.

    The paper trains a fresh student, on images of a generator of their own, and starts
    the second term from the copy's answers. Ours starts from the teacher's weights, on
    the pool that all purifiers share, and takes the teacher's.

    Args:
        patch: pixels a side, at random places; at most the image's.
        steps, batch: of both networks; images per step.
        lr, generator_lr: of Adam.
        weight: of the second term.
    """

    codes = 64  #: numbers that a patch is made from

    def __init__(
        self,
        *,
        patch: int = 5,
        steps: int = 120,
        batch: int = 48,
        lr: float = 3e-4,
        generator_lr: float = 1e-3,
        weight: float = 1.0,
    ):
        if min(patch, steps, batch) < 1 or weight < 0:
            raise ValueError(
                "patch, steps and batch are at least 1 and weight is at least 0, not"
                f" {patch}, {steps}, {batch}, {weight}"
            )
        self.patch, self.steps, self.batch = patch, steps, batch
        self.lr, self.generator_lr, self.weight = lr, generator_lr, weight

    def clean(self, model, origin, pool, rng):
        _, channels, height, width = pool.shape
        size = min(self.patch, height, width)
        maker = _maker(self.codes, channels, size, rng).to(pool.device)
        adam = Adam(model.parameters(), lr=self.lr)
        raising = Adam(maker.parameters(), lr=self.generator_lr)

        def draw(high: int, count: int) -> Tensor:
            return deliver(torch.randint(high, (count,), generator=rng), pool.device)

        for _ in range(self.steps):
            images = pool[draw(len(pool), self.batch)]
            codes = deliver(torch.randn(self.batch, self.codes, generator=rng), pool.device)
            rows, columns = draw(height - size + 1, self.batch), draw(width - size + 1, self.batch)
            with torch.no_grad():
                wanted = origin(images)
            patched = place(images, maker(codes), rows, columns)
            gained = kl(wanted, model(patched)).mean()
            slopes = torch.autograd.grad(-gained, [*maker.parameters()])
            for value, slope in zip(maker.parameters(), slopes, strict=True):
                value.grad = slope
            raising.step()
            patched = patched.detach()
            out = model(torch.cat([images, patched]))
            kept, changed = out.split(self.batch)
            loss = kl(wanted, kept).mean() + self.weight * kl(wanted, changed).mean()
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        return {"patch": size, "steps": self.steps}


def _maker(codes: int, channels: int, size: int, rng: torch.Generator) -> nn.Module:
    """Codes (B, codes) to patches (B, channels, size, size) in [0, 1]."""
    net = nn.Sequential(
        nn.Linear(codes, 128),
        nn.ReLU(),
        nn.Linear(128, channels * size * size),
        nn.Sigmoid(),
        nn.Unflatten(1, (channels, size, size)),
    )
    with torch.no_grad():
        for layer in (net[0], net[2]):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=rng)
            layer.bias.zero_()
    return net
