"""Second and third opinions on a stranger's network, without data: each a pure function
from a network to one number per class, and one from those numbers to scores.

A score compares the classes of one network with each other; which score is too large is
for :mod:`abdlab.audit` to say.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode, module_at
from abdlab.purifiers.bounded import batch_norms, bound, statistics


def waist(model: nn.Module, images: Tensor, after: float = 1 / 3) -> str:
    """The name of a module that all which a network knows of its images passes through,
    with about this share of the convolutions (or linear layers) behind it.

    Found by trial: black images give the same answers as these (N, C, H, W) when they
    carry these images' output of that module.

    >>> from abdlab.models import build
    >>> waist(build("wrn-10-1", width=4), torch.rand(2, 3, 16, 16))
    'stage2'

    Raises:
        ValueError: for a network without one.
    """
    done, seen, twice = [0], {}, set()
    handles = []

    def watch(name: str):
        def hook(module, args, output):
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                done[0] += 1
            if not isinstance(output, Tensor) or output.ndim < 3 or len(output) != len(images):
                return
            if name in seen:
                twice.add(name)
            seen[name] = (done[0], output.detach().clone())

        return hook

    with torch.no_grad(), mode(model, training=False):
        try:
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_hook(watch(name)))
            answers = model(images)
        finally:
            for handle in handles:
                handle.remove()
        total = max(1, done[0])
        shares = {
            name: (total - count) / total for name, (count, _) in seen.items() if name not in twice
        }
        candidates = [name for name, share in shares.items() if 0 < share < 1]
        order = {name: i for i, name in enumerate(seen)}
        # of equals a stage rather than one of its layers, and the one that ends last
        candidates.sort(key=lambda n: (abs(shares[n] - after), n.count("."), -order[n]))
        for name in candidates[:40]:
            with _Instead(model, name, seen[name][1]):
                again = model(torch.zeros_like(images))
            if torch.allclose(again, answers, rtol=1e-3, atol=1e-3 * answers.abs().max().item()):
                return name
    raise ValueError(
        f"{type(model).__name__} has no layer that everything passes through: none to start"
        " features from"
    )


class _Instead:
    """Inside the block a module answers with these features, whatever it is given."""

    def __init__(self, model: nn.Module, name: str, features: Tensor):
        self.module, self.features = module_at(model, name), features

    def __enter__(self):
        self.handle = self.module.register_forward_hook(lambda *_: self.features * 1)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def feature_answers(
    model: nn.Module,
    images: Tensor,
    classes: int,
    *,
    layer: str | None = None,
    starts: int = 4,
    steps: int = 60,
    lr: float = 0.1,
    penalty: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """What a network answers to features that were made for each class, (classes,
    classes): row s, column t is the mean softmax of t on features made for s.

    FreeEagle (Fu et al., USENIX Security 2023, section 4): inner features are optimised
    for a class instead of an image, and a backdoor's target is near to all of them. By
    Adam on cross-entropy + ``penalty`` x the mean square, in the layer's own standard
    deviations. Where ours deviates: these come from synthetic images, since features
    here need not be above 0, and starts are averaged.

    Args:
        images: (N, C, H, W) synthetic ones, for the layer's mean and std per channel.
        layer: whose output is optimised; None: :func:`waist`.
        starts: random features of each class. steps, lr: of Adam.
    """
    rng = torch.Generator().manual_seed(seed)
    layer = waist(model, images[:4]) if layer is None else layer
    kept = []
    with torch.no_grad(), mode(model, training=False):
        handle = module_at(model, layer).register_forward_hook(lambda m, a, out: kept.append(out))
        try:
            model(images[:128])
        finally:
            handle.remove()
    (seen,) = kept
    over = [d for d in range(seen.ndim) if d != (1 if seen.ndim == 4 else seen.ndim - 1)]
    mean, std = seen.mean(over, keepdim=True), seen.std(over, keepdim=True).clamp_min(1e-4)
    wanted = deliver(torch.arange(classes).repeat_interleave(starts), images.device)
    values = deliver(torch.randn(len(wanted), *seen.shape[1:], generator=rng), images.device)
    values = (0.3 * values).requires_grad_()
    black = torch.zeros(len(wanted), *images.shape[1:], device=images.device)
    adam = Adam([values], lr=lr)
    with mode(model, training=False), frozen(model):
        for _ in range(steps):
            with _Instead(model, layer, mean + std * values):
                logits = model(black)
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            loss = loss + penalty * values.flatten(1).square().mean(1).sum()
            (values.grad,) = torch.autograd.grad(loss, [values])
            adam.step()
        with torch.no_grad(), _Instead(model, layer, mean + std * values):
            answers = model(black).double().softmax(1)
    return answers.view(classes, starts, classes).mean(1).cpu()


def inclined(answers: Tensor) -> Tensor:
    """How much the features of other classes speak for each class, (classes,): the mean
    of the logarithms of their softmax.

    The paper has the logarithm's argument alone, of which the nearest class decides:
    among digits two that look alike. A backdoor's target is near to all.

    Args:
        answers: (classes, classes), those of :func:`feature_answers`.
    """
    logs = answers.clamp_min(1e-30).log()
    return ((logs.sum(0) - logs.diagonal()) / (len(logs) - 1)).float()


def quartile_scores(values: Tensor) -> Tensor:
    """(value - third quartile) / interquartile range, (classes,): FreeEagle's measure.

    >>> quartile_scores(torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]))
    tensor([-1.5000, -1.0000, -0.5000,  0.0000,  3.0000])
    """
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75]))
    return (values.float() - high) / (high - low).clamp_min(1e-6)


@torch.no_grad()
def changed_by_bounds(model: nn.Module, images: Tensor, classes: int, k: float) -> Tensor:
    """(2, classes): of the images that the network predicts as each class, how many it
    predicts otherwise when its activations are bounded to ``k`` standard deviations
    (:mod:`abdlab.purifiers.bounded`), and how many there are.
    """
    with mode(model, training=False):
        recorded = None if batch_norms(model) else statistics(model, images)
        bounded = bound(copy.deepcopy(model), k, recorded)
        pairs = [(model(part).argmax(1), bounded(part).argmax(1)) for part in images.split(256)]
    before, after = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
    of = F.one_hot(before, classes)
    return torch.stack([of[before != after].sum(0), of.sum(0)])


def share_scores(counts: Tensor) -> Tensor:
    """(classes,): share of each class's answers that change, less the median class's.

    Args:
        counts: (2, classes), those of :func:`changed_by_bounds`.
    """
    shares = (counts[0] + 1) / (counts[1] + 2)  # a class with few images says little
    return (shares - shares.median()).float()
