"""Images that a purifier works on: made from the network itself, once per teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode
from abdlab.sources.deepinversion import DeepInversion
from abdlab.sources.objectives import NORMS, total_variation


def synthetic_pool(
    model: nn.Module,
    shape: Sequence[int],
    *,
    images: int = 384,
    steps: int = 40,
    classes: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """Images (images, C, H, W) in [0, 1] that the model takes for its training data, of
    all classes: those of :class:`~abdlab.sources.deepinversion.DeepInversion`.

    A model without batch norm has no statistics to match: its images minimise
    cross-entropy with random classes and total variation alone.

    Args:
        model: in eval mode inside; never changed. shape: (C, H, W).
        images: how many, a multiple of 64 or rounded up to one. steps: of Adam each.
        classes: what they are made to be, equally often; None: all, at random.
    """
    device, rounds = torch.device(device), -(-images // 64)
    with mode(model, training=False), frozen(model):
        if any(isinstance(m, NORMS) and m.running_mean is not None for m in model.modules()):
            source = DeepInversion(
                shape,
                rounds=rounds,
                synthesis_steps=steps,
                kd_steps=1,
                synthesis_batch=64,
                batch_size=64,
                shift=0,
                flip=False,
            )
            source.jitter = 1 if min(shape[1:]) < 24 else 2
            if classes is not None:
                wanted = deliver(_in_turn(classes), device)
                source.targets = lambda: wanted
            source.start(model, model, device, seed)
            for _ in range(rounds):
                source._round(())
            return source.pool[:images].float() / 255
        rng = torch.Generator().manual_seed(seed)
        made = [_smooth_images(model, shape, steps, classes, device, rng) for _ in range(rounds)]
    return torch.cat(made)[:images]


def _in_turn(classes: Sequence[int]) -> Tensor:
    """(64,) of these classes, equally often."""
    return torch.tensor(list(classes)).repeat(-(-64 // len(classes)))[:64]


def _smooth_images(model, shape, steps, classes, device, rng) -> Tensor:
    """64 images of random classes, or of these, without statistics to match."""
    values = deliver(torch.randn(64, *shape, generator=rng), device).requires_grad_()
    with torch.no_grad():
        count = model(values.sigmoid()[:2]).shape[1]
    targets = torch.randint(count, (64,), generator=rng)
    targets = deliver(targets if classes is None else _in_turn(classes), device)
    adam = Adam([values], lr=0.1)
    for _ in range(steps):
        down, right = torch.randint(-1, 2, (2,), generator=rng).tolist()
        images = values.sigmoid()
        logits = model(images.roll((down, right), dims=(2, 3)))
        loss = F.cross_entropy(logits, targets) + 1e-3 * total_variation(images)
        (values.grad,) = torch.autograd.grad(loss, [values])
        adam.step()
    return values.detach().sigmoid()
