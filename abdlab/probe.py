"""One look at networks before a run: do they answer with logits that fit together, and do
their modules draw random numbers?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from abdlab.features import frozen, mode
from abdlab.models import GLOBAL_RANDOMNESS


def classes_of(model: nn.Module, images: Tensor, who: str) -> int:
    """How many classes a network tells apart, from one pass on images (N, C, H, W).

    >>> from abdlab.models import build
    >>> classes_of(build("wrn-10-1", width=4), torch.zeros(2, 3, 8, 8), "the teacher")
    10

    Raises:
        ValueError: for an answer that is no (N, classes) tensor with 2 or more classes.
    """
    with torch.no_grad(), mode(model, training=False):
        answer = model(images)
    if not isinstance(answer, Tensor):
        kind = type(answer).__name__
        raise ValueError(
            f"{who} answers {len(images)} images with a {kind}, not with one tensor (N, classes):"
            " wrap it in a module that returns its logits"
        )
    shape = tuple(answer.shape)
    if answer.ndim != 2 or shape[0] != len(images) or shape[1] < 2:
        raise ValueError(
            f"{who} answers {len(images)} images with a tensor {shape}, but logits are (N, classes)"
            " with 2 classes or more"
        )
    return shape[1]


def check_pair(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    """Raise ValueError unless both answer images (N, C, H, W) with as many classes."""
    theirs = classes_of(teacher, images, "the teacher")
    own = classes_of(student, images, "the student")
    if theirs != own:
        raise ValueError(
            f"the teacher tells {theirs} classes apart and the student {own}: give both as many"
        )


def draws(model: nn.Module, images: Tensor) -> bool:
    """Whether a network's modules draw random numbers in a training pass: two passes on
    the same images (N, C, H, W) that differ, or a dropout layer that may have let both by.

    Its statistics stay as they are.
    """
    if any(getattr(m, "p", 0) and "drop" in type(m).__name__.lower() for m in model.modules()):
        return True
    with torch.no_grad(), mode(model, training=True), frozen(model), GLOBAL_RANDOMNESS:
        before = _states(images.device)
        one, other = model(images), model(images)
        _set(images.device, before)
    return not torch.allclose(one, other, rtol=1e-2, atol=1e-3 * one.abs().max().item())


class ModuleRandomness:
    """The random numbers that modules draw in a run: a state of the run's own, in place of
    torch's global one.
    """

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        with GLOBAL_RANDOMNESS:
            outside = _states(device)
            torch.manual_seed(seed)
            self.states = _states(device)
            _set(device, outside)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the block modules draw from this state; the global one comes back. Runs
        that draw take turns: torch has one global generator.
        """
        with GLOBAL_RANDOMNESS:
            outside = _states(self.device)
            _set(self.device, self.states)
            try:
                yield
            finally:
                self.states = _states(self.device)
                _set(self.device, outside)


def _states(device: torch.device) -> list[Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu(), device)
