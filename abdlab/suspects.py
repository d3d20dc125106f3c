"""Which classes may be a backdoor's target: two tests of a network, without data, whose
word counts together.

What a trigger towards a class costs (:mod:`abdlab.inversion`) and by how far a class can
win (MM-BD) are wrong about different clean networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode
from abdlab.inversion import outlier_index

#: A class is suspicious when :func:`suspicion` exceeds this: half way between the first
#: and the second of 20 clean digits teachers (1.65 and 1.26), so that one of them is
#: accused; the targets of eight poisoned ones had 2.05 or more
#: (:mod:`abdlab.studies.calibrate`).
THRESHOLD = 1.46

#: Classes that hide each other: the gap above them in one family of triggers, as a
#: logarithm. Of the same clean teachers the largest was .82.
GAP = 0.9


def largest_margins(
    model: nn.Module,
    shape: Sequence[int],
    classes: int,
    *,
    starts: int = 8,
    steps: int = 60,
    lr: float = 0.05,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The largest margin (logit of the class - largest other logit) that each class
    reaches on any image in [0, 1], (classes,).

    MM-BD (Wang et al., S&P 2024, eq. 1): a backdoor lets its target win by far more than
    any natural class. All classes and starts are one batch. Where ours deviates: Adam
    on clamped pixels instead of SGD, and 8 starts instead of 30.

    Args:
        shape: (C, H, W). starts: uniform random images of each class.
        steps, lr: of Adam, in pixel units.

    >>> from abdlab.models import build
    >>> largest_margins(build("wrn-10-1", width=2), (3, 8, 8), 10, starts=2, steps=2).shape
    torch.Size([10])
    """
    rng = torch.Generator().manual_seed(seed)
    wanted = deliver(torch.arange(classes).repeat_interleave(starts), torch.device(device))
    images = deliver(torch.rand(len(wanted), *shape, generator=rng), wanted.device)
    adam = Adam([images], lr=lr)
    best = torch.full((len(wanted),), -float("inf"), device=wanted.device)
    with mode(model, training=False), frozen(model):
        for step in range(steps + 1):
            images.requires_grad_()
            found = margins_of(model(images), wanted)
            best = torch.maximum(best, found.detach())
            if step < steps:
                (images.grad,) = torch.autograd.grad(-found.sum(), [images])
                images.requires_grad_(False)
                adam.step()
                images.clamp_(0, 1)
    return best.view(classes, starts).amax(1).cpu()


def margins_of(logits: Tensor, wanted: Tensor) -> Tensor:
    """(B,): each row's logit of its wanted class less the largest of the others.

    >>> margins_of(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([2]))
    tensor([-2.])
    """
    own = logits.gather(1, wanted[:, None]).squeeze(1)
    others = logits.scatter(1, wanted[:, None], -float("inf"))
    return own - others.amax(1)


def gamma_scores(margins: Tensor) -> Tensor:
    """How unlikely each class's margin is among the others', (classes,): -log10 of p.

    MM-BD's test: a Gamma distribution is fitted to the margins of the other classes
    (maximum likelihood, location 0), and p is the chance that the largest of as many
    draws as there are classes exceeds this one. The paper tests the largest margin
    alone; p = .05 is a score of 1.3. Margins below 1e-3 count as that.

    >>> scores = gamma_scores(torch.tensor([5.0, 6.0, 5.5, 6.5, 30.0]))
    >>> int(scores.argmax()), bool(scores[4] > 1.3), bool(scores[:4].amax() < 1.3)
    (4, True, True)
    """
    values = margins.double().clamp_min(1e-3)
    found = []
    for c in range(len(values)):
        shape, scale = fit_gamma(torch.cat([values[:c], values[c + 1 :]]))
        tail = torch.special.gammaincc(shape, values[c] / scale).clamp(1e-300, 1 - 1e-16)
        p = -torch.expm1(len(values) * torch.log1p(-tail))
        found.append(-torch.log10(p.clamp_min(1e-300)))
    return torch.stack(found).float()


def fit_gamma(values: Tensor) -> tuple[Tensor, Tensor]:
    """(shape, scale) of the Gamma distribution that makes these numbers above 0 most
    likely, by Newton's method on log k - digamma(k) = log(mean) - mean(log).
    """
    gap = (values.mean().log() - values.log().mean()).clamp_min(1e-9)
    k = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(20):
        slope = 1 / k - torch.special.polygamma(1, k)
        k = (k - (k.log() - torch.special.digamma(k) - gap) / slope).clamp_min(1e-6)
    return k, values.mean() / k


def suspicion(table: Tensor, margins: Tensor) -> Tensor:
    """How suspicious each class is by both tests, (classes,): the
    :func:`~abdlab.inversion.outlier_index` + half the decades of MM-BD's score.

    Args:
        table: (classes, families) costs. margins: (classes,), of :func:`largest_margins`.
    """
    return joint(outlier_index(table), gamma_scores(margins))


def joint(index: Tensor, scores: Tensor) -> Tensor:
    """The sum of :func:`suspicion`; scores below .1 count as that.

    >>> joint(torch.tensor([1.0, -2.0]), torch.tensor([10.0, 0.0]))
    tensor([ 1.5000, -2.5000])
    """
    return index + 0.5 * scores.clamp_min(0.1).log10()


def suspects(
    table: Tensor, margins: Tensor, threshold: float = THRESHOLD, at_most: int = 2
) -> list[int]:
    """The classes whose :func:`suspicion` exceeds ``threshold``, worst first; and pairs
    of classes, up to ``at_most`` together, that hide each other.

    In one family, m > 1 classes are suspects together when log(cheapest cost of the
    rest / their dearest) exceeds :data:`GAP`: among many gaps, a larger one is no wonder.
    At least half of the classes are left for comparison.
    """
    found = {c for c, value in enumerate(suspicion(table, margins)) if value > threshold}
    logs, order = table.clamp_min(1e-6).log().sort(dim=0)
    for m in range(2, min(at_most, len(table) // 2) + 1):
        for family in range(table.shape[1]):
            if logs[m, family] - logs[m - 1, family] > GAP:
                found.update(order[:m, family].tolist())
    cheapest = (table / table.median(0).values).amin(1)
    return sorted(found, key=lambda c: float(cheapest[c]))
