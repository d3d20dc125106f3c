"""One look at networks before a run: do they answer with logits that fit together, and do
their modules draw random numbers?
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from abdlab.features import frozen, mode
from abdlab.models import GLOBAL_RANDOMNESS


def classes_of(model: nn.Module, images: Tensor, who: str) -> int:
    """How many classes a network tells apart, from one pass on images (N, C, H, W).

    From then on the network answers with its logits alone: where it returns a tuple, a
    list or a dict, that is its one entry (N, classes); where it returns probabilities,
    their logarithm. Log-softmax is as good as logits and stays.

    >>> from abdlab.models import build
    >>> classes_of(build("wrn-10-1", width=4), torch.zeros(2, 3, 8, 8), "the teacher")
    10

    Raises:
        ValueError: for an answer in which there is no such tensor with 2 or more
            classes, or more than one.
    """
    with torch.no_grad(), mode(model, training=False):
        try:
            answer = model(images)
        except (RuntimeError, IndexError, TypeError) as error:
            told = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{who} cannot see images {tuple(images.shape[1:])} (channels, height, width):"
                f" {told}"
            ) from error
    count, entry = len(images), None
    if not isinstance(answer, Tensor):
        entries = _entries(answer)
        entry = _Logits(next((k for k, v in entries.items() if _is_logits(v, count)), None))
        fitting = sum(_is_logits(value, count) for value in entries.values())
        if fitting != 1:
            raise ValueError(
                f"{who} answers {count} images with {_told(answer)}, where"
                f" {'no entry is' if not fitting else f'{fitting} entries are'} of the shape (N,"
                " classes): wrap it in a module that returns its logits"
            )
        answer = entry(model, (images,), answer)
    shape = tuple(answer.shape)
    if not _is_logits(answer, count):
        raise ValueError(
            f"{who} answers {count} images with a tensor {shape}, but logits are (N, classes) with"
            " 2 classes or more"
        )
    if entry is not None:
        model.register_forward_hook(entry)
    if bool((answer >= 0).all() and torch.allclose(answer.sum(1), torch.ones_like(answer[:, 0]))):
        model.register_forward_hook(_logarithm)
    return shape[1]


class _Logits:
    """A forward hook that hands one entry of what a network returns on."""

    def __init__(self, key: Hashable):
        self.key = key

    def __call__(self, module: nn.Module, args: tuple, answer: Any) -> Tensor:
        # in training some networks return more than in eval mode, or the tensor alone
        return answer if isinstance(answer, Tensor) else _entries(answer)[self.key]


def _logarithm(module: nn.Module, args: tuple, answer: Tensor) -> Tensor:
    return answer.clamp_min(torch.finfo(answer.dtype).tiny).log()


def _entries(answer: Any) -> dict[Hashable, Any]:
    if isinstance(answer, Mapping):
        return dict(answer)
    return dict(enumerate(answer)) if isinstance(answer, (tuple, list)) else {}


def _is_logits(value: Any, count: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and value.is_floating_point()
        and value.shape[0] == count
        and value.shape[1] > 1
    )


def _told(answer: Any) -> str:
    """What a network returned, as a sentence names it."""
    entries = _entries(answer)
    parts = [
        (f"{key}: " if isinstance(key, str) else "")
        + (f"a tensor {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}")
        for key, v in list(entries.items())[:6]
    ]
    return f"a {type(answer).__name__}" + (f" ({'; '.join(parts)})" if parts else "")


def looks_saturated(model: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> str:
    """What is odd about a network's answers to 64 images of uniform noise in [0, 1], as
    the end of a sentence; empty when nothing is.

    A network that expects another range of pixels (0 to 255, or mean 0 and variance 1)
    gives itself away: its answers hardly depend on the image.

    Args:
        shape: (C, H, W).
    """
    rng = torch.Generator().manual_seed(seed)
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    # each image with a brightness and a contrast of its own
    noise = torch.rand(64, *shape, generator=rng)
    level, contrast = (torch.rand(64, 1, 1, 1, generator=rng) for _ in range(2))
    images = (level + contrast * (noise - 0.5)).clamp(0, 1).to(where)
    with torch.no_grad(), mode(model, training=False):
        answers = model(images).float()
    predicted = answers.argmax(1)
    apart = answers.std(0).mean() / answers.std(1).mean().clamp_min(1e-12)
    if len(predicted.unique()) == 1 and apart < 0.02:
        return "answers 64 images of noise all alike"
    sure = answers.softmax(1).amax(1)
    if len(predicted.unique()) == 1 and bool((sure > 0.999).all()):
        return f"is sure that 64 images of noise are all class {int(predicted[0])}"
    return ""


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
