"""Images that a purifier works on: made from the network itself, once per teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode
from abdlab.sources.deepinversion import DeepInversion
from abdlab.sources.objectives import NORMS, total_variation

#: Of the first 64 images so many are to be of the class that they were made for; else
#: twice the steps are taken.
INTENDED = 0.9

#: what a doubling has to add to that share for another one
GAIN = 0.05

#: how many images are made at once
_BATCH = 64


def synthetic_pool(
    model: nn.Module,
    shape: Sequence[int],
    *,
    images: int = 384,
    steps: int = 40,
    doublings: int = 2,
    one_hot: float = 20.0,
    pixel_lr: float = 0.3,
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
        images: how many, a multiple of 64 or rounded up to one.
        steps: of Adam each. doublings: so often the steps are doubled while fewer than
            :data:`INTENDED` of the first 64 images are of the class they were made for.
        one_hot, pixel_lr: weight of the class, and Adam's rate. DeepInversion's own 1 and
            .1 are for 2,000 steps: 40 left 12 % of a digits teacher's images (l2_inv) in
            their classes, and two classes empty.
        classes: what they are made to be, equally often; None: all, at random.
    """
    device, rounds = torch.device(device), -(-images // _BATCH)
    norms = any(isinstance(m, NORMS) and m.running_mean is not None for m in model.modules())
    make = _by_statistics if norms else _smooth
    with mode(model, training=False), frozen(model):
        before = -1.0
        for left in reversed(range(doublings + 1)):
            making = make(model, shape, steps, (one_hot, pixel_lr), classes, device, seed)
            made, wanted = next(making)
            right = (model(made).argmax(1) == wanted).float().mean().item()
            if right >= INTENDED or right < before + GAIN or not left:
                break
            steps, before = 2 * steps, right
        rest = [next(making)[0] for _ in range(rounds - 1)]
    return torch.cat([made, *rest])[:images].detach()


def rough_pool(
    model: nn.Module,
    shape: Sequence[int],
    *,
    images: int = 192,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """Images (images, C, H, W) in [0, 1] that are hardly made: 40 steps with
    DeepInversion's own weights, so that many lie near a border between classes, where a
    change of the network shows first.

    On the finished images of :func:`synthetic_pool` a bound of 2 std costs a digits and a
    CIFAR-10 teacher the same 6 % of its answers, on these 32 and 52 %: of accuracy .4
    and 8.6 points.
    """
    return synthetic_pool(
        model,
        shape,
        images=images,
        doublings=0,
        one_hot=1.0,
        pixel_lr=0.1,
        device=device,
        seed=seed,
    )


def _in_turn(classes: Sequence[int]) -> Tensor:
    """(64,) of these classes, equally often."""
    return torch.tensor(list(classes)).repeat(-(-_BATCH // len(classes)))[:_BATCH]


def _by_statistics(
    model, shape, steps, weights, classes, device, seed
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (images, the classes that they were made for), by DeepInversion."""
    one_hot, pixel_lr = weights
    source = DeepInversion(
        shape,
        rounds=1,
        synthesis_steps=steps,
        kd_steps=1,
        synthesis_batch=_BATCH,
        batch_size=_BATCH,
        one_hot=one_hot,
        pixel_lr=pixel_lr,
        shift=0,
        flip=False,
    )
    source.jitter = 1 if min(shape[1:]) < 24 else 2
    source.start(model, model, device, seed)
    drawn = source.targets
    while True:
        wanted = drawn() if classes is None else deliver(_in_turn(classes), device)
        source.targets = lambda wanted=wanted: wanted
        source._round(())
        yield source.pool[-_BATCH:].float() / 255, wanted


def _smooth(model, shape, steps, weights, classes, device, seed) -> Iterator[tuple[Tensor, Tensor]]:
    """The same without statistics to match."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        values = deliver(torch.randn(_BATCH, *shape, generator=rng), device).requires_grad_()
        with torch.no_grad():
            count = model(values.sigmoid()[:2]).shape[1]
        wanted = torch.randint(count, (_BATCH,), generator=rng)
        wanted = deliver(wanted if classes is None else _in_turn(classes), device)
        adam = Adam([values], lr=0.1)
        for _ in range(steps):
            down, right = torch.randint(-1, 2, (2,), generator=rng).tolist()
            images = values.sigmoid()
            logits = model(images.roll((down, right), dims=(2, 3)))
            loss = F.cross_entropy(logits, wanted) + 1e-3 * total_variation(images)
            (values.grad,) = torch.autograd.grad(loss, [values])
            adam.step()
        yield values.detach().sigmoid(), wanted
