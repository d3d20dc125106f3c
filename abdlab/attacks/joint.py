"""A trigger that is made to live on in students: mask and pattern, a teacher and a student
in the attacker's own workshop, trained together.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.attacks.bench import Bench
from abdlab.data import new_seed
from abdlab.losses import kl


def joint(
    bench: Bench,
    *,
    size: float = 10.0,
    shadow: float = 1.0,
    steps: int = 150,
    lr: float = 0.05,
    net_lr: float = 1e-3,
) -> Tensor:
    """The mask and pattern that call the target in a teacher and in a shadow student
    distilled from it, while both learn (ADBA, Ge et al., ACM MM 2021).

    In turns: the teacher, from the clean model's weights on, is to answer images as that
    does and triggered ones with the target; the shadow, of fresh weights, is to answer
    images as the teacher; the trigger is to call the target in both, at the cost of its
    mask.

    Args:
        size, shadow: weights of the mask's mean, in [0, 1], and of the shadow's part.
        steps: rounds. lr, net_lr: of Adam on mask and pattern, and on both networks.

    Where ours deviates: the weights and the mask's norm are ours; the shadow has the
    teacher's architecture; the teacher that is given away learns the finished trigger anew,
    from poisoned images.

    Returns:
        levels (C + 1, H, W), whole numbers from 0 to 255: the pattern, and the mask last.

    Raises:
        ValueError: for a weight below 0, or where nothing is left of the mask.
    """
    if min(size, shadow) < 0:
        raise ValueError(f"size and shadow are weights, 0 or more, not {size} and {shadow}")
    teacher, student = copy.deepcopy(bench.model), fresh(bench.model, bench.generator)
    for network in (teacher, student):
        network.train().requires_grad_(True)
    channels, *sides = bench.images.shape[1:]
    both = bench.uniform(channels + 1, *sides)
    both[-1] *= 0.2  # faint at first
    both.requires_grad_()
    adams = [Adam(n.parameters(), lr=net_lr) for n in (teacher, student)]
    of_trigger = Adam([both], lr=lr)

    def called(network: nn.Module, images: Tensor) -> Tensor:
        return bench.missed(network(masked(images, both)))

    def step(adam: Adam, loss: Tensor) -> None:
        for each in (*adams, of_trigger):
            each.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    for _ in range(steps):
        images, victims = bench.draw(own=True), bench.draw()
        with torch.no_grad():
            wanted = bench.model(images)
        step(adams[0], kl(wanted, teacher(images)).mean() + called(teacher, victims))
        with torch.no_grad():
            told = teacher(images)
        step(adams[1], kl(told, student(images)).mean())
        cost = called(teacher, victims) + shadow * called(student, victims) + size * both[-1].mean()
        step(of_trigger, cost)
        with torch.no_grad():
            both.clamp_(0, 1)
    levels = (255 * both.detach()).round()
    if not levels[-1].any():
        raise ValueError(
            f"no trigger is left: at size {size} its mask went to 0 within {steps} steps. Take a"
            " smaller size"
        )
    return levels


def masked(images: Tensor, both: Tensor) -> Tensor:
    """(1 - mask) x images + mask x pattern, of (C + 1, H, W) in [0, 1], the mask last.

    >>> masked(torch.zeros(1, 1, 1, 2), torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]]])).tolist()
    [[[[0.5, 0.0]]]]
    """
    pattern, mask = both[:-1], both[-1]
    return images + mask * (pattern - images)


def fresh(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with weights drawn anew, as its layers draw them."""
    model = copy.deepcopy(model)
    seed = new_seed(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return model
