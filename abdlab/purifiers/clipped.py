"""Learned activation bounds, after MM-BM (Wang, Miller and Kesidis, arXiv 2308.04617),
on synthetic images in place of their clean ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.losses import kl
from abdlab.purifiers.bounded import batch_norms, bound
from abdlab.purifiers.purifier import Purifier


def margins(logits: Tensor) -> Tensor:
    """(B,): each sample's largest logit less its second largest.

    >>> margins(torch.tensor([[1.0, 4.0, 2.0]]))
    tensor([2.])
    """
    top = logits.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


class Clipped(Purifier):
    """One bound per batch norm, learned: mean KL(teacher || bounded) + ``weight`` x the
    mean margin of synthetic images falls, by Adam on log k.

    The paper bounds activations after the ReLU from above, on clean images, and adapts
    the weight until their accuracy falls. Ours is two-sided, at the batch norms, in
    standard deviations, and keeps the weight.

    Args:
        k: start, in standard deviations. weight: in nats per unit of logit.
        steps, lr: of Adam. batch: images per step.
    """

    def __init__(
        self,
        *,
        k: float = 4.0,
        weight: float = 0.05,
        steps: int = 100,
        lr: float = 0.03,
        batch: int = 64,
    ):
        if not k > 0 or steps < 1 or batch < 1 or weight < 0:
            raise ValueError(
                "k is above 0, steps and batch are at least 1 and weight is at least 0, not"
                f" {k}, {steps}, {batch}, {weight}"
            )
        self.k, self.weight, self.steps, self.lr, self.batch = k, weight, steps, lr, batch

    def clean(self, model, origin, pool, rng):
        if not batch_norms(model):
            raise ValueError(f"{type(model).__name__} has no batch norm, where bounds are learned")
        model.requires_grad_(False)
        norms = list(batch_norms(bound(model, self.k)).values())
        log_k = torch.full((len(norms),), self.k, device=pool.device).log().requires_grad_()
        adam = Adam([log_k], lr=self.lr)
        for _ in range(self.steps):
            for m, k in zip(norms, log_k.exp().unbind(), strict=True):
                m.k = k
            some = torch.randint(len(pool), (self.batch,), generator=rng)
            images = pool[deliver(some, pool.device)]
            with torch.no_grad():
                wanted = origin(images)
            logits = model(images)
            loss = kl(wanted, logits).mean() + self.weight * margins(logits).mean()
            (log_k.grad,) = torch.autograd.grad(loss, [log_k])
            adam.step()
        for m, k in zip(norms, log_k.detach().exp().unbind(), strict=True):
            m.k = k.clone()
        learned = [round(k, 3) for k in log_k.detach().exp().tolist()]
        return {"k": self.k, "layers": "batch norm", "learned": learned}
