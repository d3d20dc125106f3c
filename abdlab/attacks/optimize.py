"""Triggers and poisoned images that are optimised against a clean model: what an
attacker does before any poisoning.

:func:`optimize` fills in the ``pattern`` of an optimised trigger; :class:`PGD` perturbs
the images of a clean-label attack. The model is only read: it is put in eval mode for
the while, and its weights and statistics stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.attacks.bench import Bench
from abdlab.attacks.joint import joint
from abdlab.attacks.patches import paste
from abdlab.attacks.triggers import Trigger, cosines, pack, trigger_from
from abdlab.data import pick_device
from abdlab.errors import check_keys, did_you_mean, keywords
from abdlab.features import frozen, last_linear, mode, module_at, record
from abdlab.models import place


def trojan(
    bench: Bench,
    *,
    side: int,
    corner: str = "bottom_right",
    margin: int = 0,
    neurons: int = 2,
    steps: int = 150,
    lr: float = 0.05,
) -> Tensor:
    """The patch that excites the chosen neurons most (TrojanNN, Liu et al., NDSS 2018,
    "Trojan trigger generation").

    Gradient ascent, as in the paper, from random pixels and within the patch only.
    Where ours deviates: the neurons are features before the last linear layer, chosen
    by the weights that *leave* them (:func:`strongest`; the paper goes by those that
    enter a layer, which residual networks have no single matrix of), the patch lies on
    real images instead of on an empty one, and the activation is driven as high as it
    goes instead of to a large given value.

    Args:
        side: of the patch in pixels. corner, margin: where it is pasted, as the
            trigger's own parameters say.
        neurons: how many are driven.
        steps, lr: of Adam on the pixels in [0, 1].

    Returns:
        levels (C, side, side), whole numbers from 0 to 255.
    """
    channels = bench.images.shape[1]
    ones = torch.ones(channels, side, side).to(bench.images)
    chosen = strongest(bench.model, bench.images, neurons)

    def loss(patch: Tensor) -> Tensor:
        return -activation(bench.model, paste(bench.draw(), patch, ones, corner, margin), chosen)

    return _quantise(
        _descend(bench.uniform(channels, side, side), loss, lambda p: p.clamp(0, 1), steps, lr)
    )


def l2(
    bench: Bench, *, bound: float = 0.03, neurons: int = 2, steps: int = 150, lr: float = 0.01
) -> Tensor:
    """The additive pattern that excites the chosen neurons most within an l2 ball (Li
    et al., TDSC 2020, arXiv 1909.02742).

    Where ours deviates: the paper adds a multiple of the norm to the loss and lowers it
    step by step, here the pattern is projected onto the ball after each step; it is
    optimised on top of real images instead of alone.

    Args:
        bound: of the pattern's root mean square per value, in [0, 1] units: its l2 norm
            is at most bound x sqrt(C H W), so that one number serves every image size.
        neurons: how many are driven, see :func:`strongest`.
        steps, lr: of Adam on values in [0, 1] units.

    Returns:
        levels (C, H, W), whole numbers from -255 to 255 (rounded towards zero, which
        keeps the bound).
    """
    shape = bench.images.shape[1:]
    radius, chosen = (
        _positive("bound", bound) * math.sqrt(math.prod(shape)),
        strongest(bench.model, bench.images, neurons),
    )

    def loss(change: Tensor) -> Tensor:
        return -activation(bench.model, (bench.draw() + change).clamp(0, 1), chosen)

    def project(change: Tensor) -> Tensor:
        change = change.clamp(-1, 1)
        return change * min(1.0, radius / max(change.norm().item(), 1e-12))

    return (255 * _descend(project(bound * bench.normal(*shape)), loss, project, steps, lr)).trunc()


def l0(
    bench: Bench,
    *,
    share: float = 0.02,
    neurons: int = 2,
    rounds: int = 4,
    steps: int = 150,
    lr: float = 0.05,
) -> Tensor:
    """The few replaced pixels that excite the chosen neurons most (Li et al., TDSC
    2020, arXiv 1909.02742, the l0 variant).

    All pixels are free at first. In each round the values are optimised, and then the
    pixels that matter least are given up, by
    |gradient x (value - mean image)|, until only so many are left, which are optimised
    once more. Where ours deviates: the paper gives up pixels one by one, here their
    number shrinks by the same factor in each
    round; pixels are replaced instead of changed, so that the trigger is the same on
    every image.

    Args:
        share: of the image's pixels that may be replaced, rounded down, at least one.
        neurons: how many are driven, see :func:`strongest`.
        rounds: of giving up pixels.
        steps, lr: of Adam, all rounds together, on values in [0, 1] units.

    Returns:
        levels (C, H, W), whole numbers from 0 to 255, and -1 where the image stays.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is that of the pixels, in (0, 1], not {share}")
    channels, height, width = bench.images.shape[1:]
    pixels, total = max(1, int(share * height * width)), height * width
    chosen, mean = strongest(bench.model, bench.images, neurons), bench.images.mean(0)
    values, mask = (
        bench.uniform(channels, height, width),
        torch.ones(height, width).to(bench.images),
    )

    def loss(values: Tensor) -> Tensor:
        return -activation(bench.model, torch.where(mask > 0, values, bench.draw()), chosen)

    for i in range(1, rounds + 2):
        values = _descend(values, loss, lambda v: v.clamp(0, 1), max(1, steps // (rounds + 1)), lr)
        if i <= rounds:
            left = max(pixels, round(total * (pixels / total) ** (i / rounds)))
            leaf = values.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(leaf), leaf)
            matters = torch.where(mask > 0, (slope * (values - mean)).abs().sum(0), -1.0)
            mask = (
                torch.zeros(total)
                .to(mask)
                .index_fill_(0, matters.flatten().topk(left).indices, 1)
                .view_as(mask)
            )
    return torch.where(mask > 0, _quantise(values), -1)


def low_frequency(
    bench: Bench, *, bound: float = 0.1, cut: int = 4, steps: int = 150, lr: float = 0.01
) -> Tensor:
    """The smooth pattern that makes the clean model predict the target (Zeng et al., ICCV
    2021, arXiv 2104.03413).

    A universal perturbation, like the paper's, that minimises the cross-entropy to the
    target. Where ours deviates: the paper filters each step's pattern with a low-pass
    filter, ours is made of low cosines alone, so that it has nothing above the cut.

    Args:
        bound: largest change of any value, in [0, 1] units.
        cut: number of cosines per axis (1: brightness alone).
        steps, lr: of Adam on the cosines' weights, in [0, 1] units.

    Returns:
        levels (C, cut, cut): the weights in steps of 1/255, see
            :func:`abdlab.attacks.triggers.smooth`.
    """
    _positive("bound", bound)
    channels, height, width = bench.images.shape[1:]
    if not 1 <= cut <= min(height, width):
        raise ValueError(
            f"cut is a number of cosines from 1 to the image's shorter side, {min(height, width)},"
            f" not {cut}"
        )

    def loss(weights: Tensor) -> Tensor:
        return _towards(bench, cosines(weights, height, width))

    def largest(weights: Tensor) -> float:
        return cosines(weights, height, width).abs().max().item()

    def project(weights: Tensor) -> Tensor:
        return weights * min(1.0, bound / max(largest(weights), 1e-12))

    weights = _descend(
        project(0.1 * bound * bench.normal(channels, cut, cut)), loss, project, steps, lr
    )
    levels = (255 * weights).round()
    while largest(levels / 255) > bound:  # rounding may go over the bound by a little
        weights = 0.98 * weights
        levels = (255 * weights).round()
    return levels


def universal(
    bench: Bench, *, bound: float = 8 / 255, steps: int = 150, lr: float = 0.01
) -> Tensor:
    """The one faint change of every image that makes the clean model predict the target
    most (BackWeak, arXiv 2511.12046: a weak universal perturbation).

    It minimises the cross-entropy to the target, and is projected onto the bound after
    each step. How the paper optimises it is not known to us beyond that.

    Args:
        bound: largest change of any value, in [0, 1] units; the paper's is 8/255, which
            black and white digits do not notice (the quick preset has 32/255).
        steps, lr: of Adam on values in [0, 1] units.

    Returns:
        levels (C, H, W), whole numbers from -255 to 255 (rounded towards zero, which
        keeps the bound).
    """
    _positive("bound", bound)
    shape = bench.images.shape[1:]
    found = _descend(
        0.1 * bound * bench.normal(*shape),
        lambda change: _towards(bench, change),
        lambda change: change.clamp(-bound, bound),
        steps,
        lr,
    )
    return (255 * found + 1e-4 * found.sign()).trunc()  # 8/255 is 8 levels in float32 too


def _towards(bench: Bench, change: Tensor) -> Tensor:
    """Cross-entropy to the target of a mini-batch with this change: a mean over images."""
    return bench.missed(bench.model((bench.draw() + change).clamp(0, 1)))


#: trigger -> its method, and what the trigger's name fixes
METHODS: dict[str, tuple[Callable[..., Tensor], dict]] = {
    "trojan_3x3": (trojan, {"side": 3}),
    "trojan_8x8": (trojan, {"side": 8}),
    "l2_inv": (l2, {}),
    "l0_inv": (l0, {}),
    "smooth": (low_frequency, {}),
    "weak": (universal, {}),
    "adba": (joint, {}),
}


def optimize(
    trigger: Trigger | str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    target: int = 0,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    **options,
) -> Trigger:
    """The same trigger with its pattern, optimised against a clean model.

    >>> from abdlab.models import build
    >>> model, images, labels = build("wrn-10-1", width=4), torch.rand(8, 3, 8, 8), torch.arange(8)
    >>> trigger = optimize("l2_inv", model, images, labels, target=0, bound=0.05, steps=2)
    >>> trigger.needs_pattern, bool((trigger(images) - images).abs().mean() <= 0.05)
    (False, True)

    Args:
        trigger: one of :data:`METHODS`, by name or with parameters of its own (the
            corner of a patch).
        model: clean, trained on the attacker's own data; it is left as it was.
        images: (N, C, H, W) in [0, 1]. labels: int64 (N,). Images of the target class
            are left out.
        target: the class that a model shall predict where the trigger is. Only
            ``smooth``, ``weak`` and ``adba`` pull a model towards it; the others excite
            neurons, and it is the poisoned training that ties these to the target.
        seed: of starting points and mini-batches; the same seed on the same machine
            gives the same trigger.
        device: where to compute, "auto" takes the GPU when there is one.
        options: of the trigger's method: :func:`trojan`, :func:`l2`, :func:`l0`,
            :func:`low_frequency`, :func:`universal`, :func:`abdlab.attacks.joint.joint`.

    Raises:
        ValueError: for a trigger that is not optimised (or composed: optimise its
            parts), an unknown option, or a model without a linear layer.
    """
    trigger = trigger_from(trigger)
    if trigger.then:
        raise ValueError(f"{trigger} is composed: optimise its parts one by one and add them up")
    options = options_of(trigger, **options)
    method, fixed = METHODS[trigger.name]
    if method is trojan:
        fixed = {**fixed, **{k: v for k, v in trigger.params.items() if k in ("corner", "margin")}}
    others = labels != target
    if not others.any():
        raise ValueError(
            f"every image is of the target class {target}: the trigger would have nothing to move"
        )
    device = pick_device(device)
    place(model, device)
    with mode(model, training=False), frozen(model):
        rng = torch.Generator().manual_seed(seed)
        bench = Bench(model, images[others].to(device), images, target, rng)
        levels = method(bench, **fixed, **options)
    return Trigger(trigger.name, {**trigger.params, "pattern": pack(levels)})


def options_of(trigger: Trigger, **given) -> dict:
    """Every option of the trigger's method, as given or its default.

    Raises:
        ValueError: for a trigger that is not optimised, or an unknown option, with a
            "did you mean".
    """
    if trigger.name not in METHODS:
        raise ValueError(did_you_mean("optimised trigger", trigger.name, METHODS))
    method, fixed = METHODS[trigger.name]
    free = [k for k in keywords(method) if k not in ("bench", "corner", "margin", *fixed)]
    check_keys(f"option of {trigger.name}", given, free)
    defaults = method.__kwdefaults__
    return {k: given.get(k, defaults[k]) for k in free}


def strongest(model: nn.Module, images: Tensor, neurons: int) -> Tensor:
    """Indices of the features before the last linear layer that are tied most strongly
    to the logits, dead ones left out.

    By the sum over classes of |weight|. A feature that no image excites (a dead
    rectifier) gives no gradient to start from.

    Args:
        images: (N, C, H, W), the first 256 tell dead features from living ones.

    Raises:
        ValueError: when the model has no ``nn.Linear``.
    """
    reader = _reads_neurons(model)
    with torch.no_grad(), record(model, [reader], inputs=True) as seen:
        model(images[:256])
    strength = module_at(model, reader).weight.detach().abs().sum(0)
    alive = seen[reader].flatten(0, -2).abs().amax(0) > 0
    return torch.where(alive, strength, -1.0).topk(min(neurons, len(strength))).indices


def activation(model: nn.Module, images: Tensor, neurons: Tensor) -> Tensor:
    """Mean activation of these features over images and features: a scalar with its
    graph.
    """
    reader = _reads_neurons(model)
    with record(model, [reader], inputs=True) as seen:
        model(images)
    return seen[reader][..., neurons].mean()


@dataclass(frozen=True)
class PGD:
    """Images that a clean model no longer recognises: projected gradient ascent on its
    loss (Madry et al. 2018, arXiv 1706.06083).

    The perturbation of the label-consistent attack (Turner et al. 2019, arXiv
    1912.02771): on target images made hard in this way, a model learns the trigger
    instead of the image.

    Attributes:
        model: clean; left as it was.
        bound: largest change of any value (l-infinity), in [0, 1] units.
        steps: of gradient signs, each 2.5 x bound / steps long.
        seed: of the random start within the bound.

    >>> from abdlab.models import build
    >>> images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    >>> hard = PGD(build("wrn-10-1", width=4), bound=8 / 255, steps=2)(images, labels)
    >>> bool((hard - images).abs().max() <= 8 / 255 + 1e-6)
    True
    """

    model: nn.Module
    bound: float = 16 / 255
    steps: int = 20
    seed: int = 0

    def __call__(self, images: Tensor, labels: Tensor, batch: int = 256) -> Tensor:
        """Perturbed images (N, C, H, W), in [0, 1] and within the bound of the given
        ones; labels (N,) are the true ones.
        """
        _positive("bound", self.bound)
        place(self.model, images.device)
        generator = torch.Generator().manual_seed(self.seed)
        noise = (torch.rand(images.shape, generator=generator).to(images) * 2 - 1) * self.bound
        with mode(self.model, training=False), frozen(self.model):
            parts = zip(images.split(batch), labels.split(batch), noise.split(batch), strict=True)
            return torch.cat([self._ascend(*part) for part in parts])

    def _ascend(self, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        out = (images + noise).clamp(0, 1)
        for _ in range(self.steps):
            out.requires_grad_()
            # the sum keeps each image's gradient independent of the batch
            (slope,) = torch.autograd.grad(
                F.cross_entropy(self.model(out), labels, reduction="sum"), out
            )
            out = out.detach() + 2.5 * self.bound / self.steps * slope.sign()
            out = (images + (out - images).clamp(-self.bound, self.bound)).clamp(0, 1)
        return out


def _descend(
    start: Tensor, loss: Callable, project: Callable[[Tensor], Tensor], steps: int, lr: float
) -> Tensor:
    """Adam on ``loss`` from ``start``, projected after each step."""
    leaf = start.clone().requires_grad_()
    adam = Adam([leaf], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss(leaf).backward()
        adam.step()
        with torch.no_grad():
            leaf.copy_(project(leaf))
    return leaf.detach()


def _reads_neurons(model: nn.Module) -> str:
    """The name of the layer whose inputs are the neurons, (N, D)."""
    return last_linear(model, "whose inputs are the neurons that the trigger excites")


def _quantise(values: Tensor) -> Tensor:
    return (255 * values).round().clamp(0, 255)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")
    return value
