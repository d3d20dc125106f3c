"""A teacher is cleaned before it teaches. A new purifier is one file and one line here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from abdlab.checkpoint import load_model, read_card, save_model
from abdlab.errors import CheckpointError
from abdlab.models import build
from abdlab.probe import classes_of
from abdlab.purifiers.bounded import Bounded, BoundedBatchNorm, beyond, bound, rebuild
from abdlab.purifiers.clipped import Clipped
from abdlab.purifiers.clp import CLP
from abdlab.purifiers.dhbe import DHBE
from abdlab.purifiers.pool import rough_pool, synthetic_pool
from abdlab.purifiers.purifier import Purifier
from abdlab.purifiers.unlearn import Unlearn
from abdlab.registry import Registry

#: name -> class, as presets and labels name them
PURIFIERS = Registry(
    "purifier",
    {"bounded": Bounded, "unlearn": Unlearn, "clp": CLP, "clipped": Clipped, "dhbe": DHBE},
)


def purify(
    teacher: nn.Module,
    purifiers: Sequence[str | Purifier],
    shape: Sequence[int],
    *,
    pool: Tensor | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> nn.Module:
    """A copy of the teacher that went through these purifiers in order; the teacher
    stays as it is. Its ``purified`` attribute says what each did.

    Args:
        teacher: maps images (N, C, H, W) in [0, 1] to logits.
        purifiers: names from :data:`PURIFIERS`, with their defaults, or made ones.
        shape: (C, H, W). pool: synthetic images of the teacher, if there are some.
        tell: called with the name of each purifier, its number from 1, and their count.

    >>> from abdlab.models import build
    >>> teacher = build("wrn-10-1", channels=1, width=2)
    >>> purify(teacher, [Bounded(k=2.0), CLP()], (1, 8, 8), pool=torch.rand(4, 1, 8, 8)).purified
    [{'name': 'bounded', 'k': 2.0, 'layers': 'batch norm'}, {'name': 'clp', 'u': 3.0, 'pruned': 0}]

    Raises:
        ValueError: for an unknown name, with a "did you mean".
    """
    steps = [PURIFIERS.find(p)() if isinstance(p, str) else p for p in purifiers]
    if pool is None and any(step.needs_pool(teacher) for step in steps):
        own = copy.deepcopy(teacher).to(device)
        classes_of(own, torch.zeros(2, *shape, device=device), "the teacher")
        pool = synthetic_pool(own, shape, device=device, seed=seed)
    model = teacher
    for number, step in enumerate(steps, start=1):
        tell(step.name, number, len(steps))
        model = step.purify(model, shape, pool=pool, origin=teacher, device=device, seed=seed)
    return model


def save_purified(path: str | Path, model: nn.Module, card: dict | None = None) -> Path:
    """Write a purified model with what was done to it on its card, for
    :func:`load_purified`.
    """
    return save_model(path, model, {**(card or {}), "purified": list(model.purified)})


def load_purified(
    path: str | Path, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """What :func:`save_purified` wrote, bounds included.

    Args:
        model: a plain network of the same architecture, into which the bounds are put;
            None builds what the card names.

    Raises:
        CheckpointError: for a file without such a card.
    """
    card = read_card(path)
    if "purified" not in card or (model is None and "model" not in card):
        raise CheckpointError(
            f"{path} holds no purified model that says its architecture: pass model= for the"
            " latter, and use load_model for plain weights"
        )
    model = rebuild(build(**card["model"]) if model is None else model, card["purified"])
    model = load_model(path, model, device).requires_grad_(False)
    model.purified = card["purified"]
    return model


__all__ = [
    "CLP",
    "DHBE",
    "PURIFIERS",
    "Bounded",
    "BoundedBatchNorm",
    "Clipped",
    "Purifier",
    "Unlearn",
    "beyond",
    "bound",
    "load_purified",
    "purify",
    "rebuild",
    "rough_pool",
    "save_purified",
    "synthetic_pool",
]
