"""Robust training: against perturbations of single images (PGD, TRADES), and against one
perturbation of all images.

Perturbations are in [0, 1] units of the images, bounded in every value (l-infinity).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abdlab.data import deliver
from abdlab.errors import check_above_zero
from abdlab.features import frozen, mode
from abdlab.losses import kl
from abdlab.objectives.objective import Objective


def project(moved: Tensor, images: Tensor, eps: float) -> Tensor:
    """The nearest images to ``moved`` that lie in [0, 1] and differ from ``images`` by at
    most ``eps`` in every value.

    >>> project(torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.0]), 0.25)
    tensor([0.7500, 0.2000])
    """
    return (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)


def ascend(
    loss: Callable[[Tensor], Tensor], start: Tensor, images: Tensor, eps: float, steps: int
) -> Tensor:
    """Projected gradient ascent: ``steps`` signs of the gradient, each 2.5 x eps / steps
    long (Madry et al., ICLR 2018, arXiv 1706.06083; the step is section 5's).

    Args:
        loss: images -> a scalar that is a *sum* over images, so that each one's gradient
            is its own.
        start: (N, C, H, W), where it begins.

    >>> ascend(lambda x: -x.sum(), torch.tensor([0.5]), torch.tensor([0.5]), eps=0.1, steps=2)
    tensor([0.4000])
    """
    moved = start.detach()
    for _ in range(steps):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(loss(moved), moved)
        moved = project(moved.detach() + 2.5 * eps / steps * slope.sign(), images, eps)
    return moved.detach()


def adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    rng: torch.Generator,
) -> Tensor:
    """Images within ``eps`` on which the model's cross-entropy is large: PGD from a
    uniform start. The model is put in eval mode for the while, and stays as it is.

    >>> from abdlab.models import build
    >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    >>> rng = torch.Generator().manual_seed(0)
    >>> hard = adversarial(build("wrn-10-1", width=2), images, labels, eps=0.1, steps=2, rng=rng)
    >>> bool((hard - images).abs().max() <= 0.1 + 1e-6)
    True
    """
    noise = deliver(2 * eps * torch.rand(images.shape, generator=rng) - eps, images.device)
    with mode(model, training=False), frozen(model):

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), labels, reduction="sum")

        return ascend(loss, project(images + noise, images, eps), images, eps, steps)


def adversarial_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    seed: int = 0,
    batch: int = 500,
) -> float:
    """Share of the images, in [0, 1], that keep their right answer under PGD of ``eps``.

    It is an upper bound: a stronger attack may do more. Not to be mistaken for the
    accuracy on *triggered* images, which :class:`abdlab.evaluate.Details` has.
    """
    rng, right = torch.Generator().manual_seed(seed), 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        hard = adversarial(model, x, y, eps=eps, steps=steps, rng=rng)
        with torch.no_grad(), mode(model, training=False):
            right += (model(hard).argmax(1) == y).sum().item()
    return right / len(images)


class PGDTraining(Objective):
    """Cross-entropy on adversarial images instead of the images (Madry et al., ICLR 2018,
    arXiv 1706.06083).

    Args:
        eps: largest change of a value; the paper's for photographs. Digits of 16x16 take
            .1.
        steps: of PGD per mini-batch.

    Where ours deviates: images are attacked with the running statistics of the model's
    batch norms, not with those of the mini-batch.

    >>> PGDTraining(eps=0.1, steps=2).steps
    2
    """

    def __init__(self, *, eps: float = 8 / 255, steps: int = 7):
        check_above_zero(eps=eps, steps=steps)
        self.eps, self.steps = eps, steps

    def losses(self, model, images, labels):
        hard = adversarial(model, images, labels, eps=self.eps, steps=self.steps, rng=self.rng)
        return {"adversarial": F.cross_entropy(model(hard), labels)}


class Trades(Objective):
    """Cross-entropy on images + beta x mean KL(answer to them || answer to adversarial
    ones) (TRADES, Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5 with KL).

    The adversarial images maximise that KL, from Gaussian noise of .001 around the
    images.

    Args:
        eps, steps: as for :class:`PGDTraining`.
        beta: of the KL, in nats; the paper's 1 / lambda.

    >>> Trades(beta=1.0).beta
    1.0
    """

    def __init__(self, *, eps: float = 8 / 255, steps: int = 7, beta: float = 6.0):
        check_above_zero(eps=eps, steps=steps)
        if beta < 0:
            raise ValueError(f"beta is at least 0, not {beta}")
        self.eps, self.steps, self.beta = eps, steps, beta

    def losses(self, model, images, labels):
        noise = deliver(1e-3 * torch.randn(images.shape, generator=self.rng), images.device)
        with mode(model, training=False), frozen(model):
            with torch.no_grad():
                answers = model(images)

            def loss(x: Tensor) -> Tensor:
                return kl(answers, model(x)).sum()

            hard = ascend(loss, images + noise, images, self.eps, self.steps)
        logits = model(images)
        apart = kl(logits, model(hard)).mean()
        return {"cross_entropy": F.cross_entropy(logits, labels), "trades": self.beta * apart}


class Universal(Objective):
    """Cross-entropy on images + the same with one perturbation of all images, which climbs
    while the model trains (Shafahi et al., AAAI 2020, arXiv 1811.11304, algorithm 3).

    Against defenses that unlearn universal perturbations: what they find then says less
    of the trigger.

    Args:
        eps: largest change of a value.
        lr: of the perturbation's sign step, one per mini-batch; None takes eps / 4.

    Where ours deviates: the paper trains on perturbed images alone and caps the loss
    that climbs.

    >>> Universal(eps=0.2).lr
    0.05
    """

    def __init__(self, *, eps: float = 0.2, lr: float | None = None):
        self.eps, self.lr = eps, eps / 4 if lr is None else lr
        check_above_zero(eps=eps, lr=self.lr)

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        device = next(model.parameters()).device
        self.delta = torch.zeros(images.shape[1:], device=device, dtype=images.dtype)

    def losses(self, model, images, labels):
        delta = self.delta.requires_grad_()
        plain = F.cross_entropy(model(images), labels)
        # perturbed images are no user's: they leave no statistics
        with frozen(model, weights=False):
            perturbed = F.cross_entropy(model((images + delta).clamp(0, 1)), labels)
        (slope,) = torch.autograd.grad(perturbed, delta, retain_graph=True)
        self.delta = (delta.detach() + self.lr * slope.sign()).clamp(-self.eps, self.eps)
        return {"cross_entropy": plain, "universal": perturbed}
