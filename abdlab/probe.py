"""One look at networks before a run: do they answer with logits that fit together, and do
their modules draw random numbers?
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from abdlab.features import frozen, mode

#: modules draw from torch's one global generator, so that runs that draw take turns
_DRAWING = threading.Lock()


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
    """Whether a network's modules draw random numbers in a training pass (dropout).

    Neither its statistics nor torch's global generators change.
    """
    with _DRAWING, torch.random.fork_rng(_accelerators(images.device)):
        before = _states(images.device)
        with torch.no_grad(), mode(model, training=True), frozen(model):
            model(images)
        after = _states(images.device)
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class ModuleRandomness:
    """The random numbers that modules draw in a run: a state of the run's own, in place of
    torch's global one.
    """

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        with _DRAWING, torch.random.fork_rng(_accelerators(device)):
            torch.manual_seed(seed)
            self.states = _states(device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the block modules draw from this state; the global one comes back."""
        with _DRAWING:
            outside = _states(self.device)
            _set(self.device, self.states)
            try:
                yield
            finally:
                self.states = _states(self.device)
                _set(self.device, outside)


def _accelerators(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _states(device: torch.device) -> list[Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].cpu(), device)
