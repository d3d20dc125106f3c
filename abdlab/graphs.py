"""Pieces of a pseudo-batch that run over and over, on request as CUDA graphs: thousands
of small kernels for one launch.

A graph repeats kernels, with the addresses that they had, and nothing of the Python
around them. So what goes in lies in buffers that stay (:meth:`Phases.hold`), random
numbers are drawn before a piece begins, learning rates are read from the device, and a
piece is captured anew where what its Python decides by has changed: that is its key.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")

#: calls of a piece that run as Python before it is captured: kernels are chosen and
#: optimisers make their moments in them
WARM = 3
#: pieces that are kept captured, the latest ones: each has memory of its own
KEPT = 8

#: torch allows one capture at a time in a process
_CAPTURING = threading.Lock()


def check(device: torch.device) -> None:
    """Raise ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(
            f"graphs=True needs a CUDA device, and this run is on {device.type}: leave graphs out"
        )


def captures(part: object) -> bool:
    """Whether a source or a defense can be captured now; one that says nothing cannot."""
    return bool(getattr(part, "captures", False))


def key_of(name: str, parts: Sequence, *more: Hashable) -> Hashable | None:
    """The key of a piece in which these sources and defenses decide; None when one of them
    cannot be captured.
    """
    if not all(captures(part) for part in parts):
        return None
    return (name, *more, *(part.branch() for part in parts))


class Phases:
    """The pieces of one run. Without ``graphs`` every call is the plain call, and
    nothing is held.
    """

    def __init__(self, graphs: bool = False):
        self.graphs = graphs
        self._buffers: dict[tuple, Tensor] = {}
        self._pieces: OrderedDict[Hashable, _Piece] = OrderedDict()

    def hold(self, name: str, value: Tensor) -> Tensor:
        """``value`` in a buffer that stays where it is as long as name, shape and type
        do; without graphs, itself.
        """
        if not self.graphs:
            return value
        key = (name, value.shape, value.dtype)
        if key in self._buffers:
            self._buffers[key].copy_(value, non_blocking=True)
        else:
            self._buffers[key] = value.clone()
        return self._buffers[key]

    def run(
        self, key: Hashable | None, function: Callable[[], T], optimizers: Sequence[Optimizer] = ()
    ) -> T:
        """What ``function`` returns, which may be tensors of the piece's own that its
        next call overwrites.

        Args:
            key: all that its Python decides by; None runs it as Python.
            function: reads nothing that changes but held buffers and the networks;
                draws nothing and asks the device nothing.
            optimizers: fused ones that step in it. Learning rates stay numbers, for
                schedules and checkpoints.

        Raises:
            RuntimeError: when it cannot be captured.
        """
        if not self.graphs or key is None:
            return function()
        piece = self._pieces[key] = self._pieces.pop(key, None) or _Piece()
        if len(self._pieces) > KEPT:
            self._pieces.popitem(last=False)
        return piece(function, optimizers)


class _Piece:
    """One piece: its first calls run as Python, then it is captured, and from then on
    replayed.
    """

    def __init__(self):
        self.calls, self.replay, self.rates = 0, None, []

    def __call__(self, function: Callable[[], T], optimizers: Sequence[Optimizer]) -> T:
        self.calls += 1
        if self.calls <= WARM:
            return beside(function)
        if self.replay is None:
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            self.rates = [(group, _rate(group["params"][0].device)) for group in groups]
            for group, rate in self.rates:
                rate.fill_(group["lr"])
            with _steered(self.rates):
                self.result, self.replay = capture(function)
        for group, rate in self.rates:
            rate.fill_(group["lr"])
        self.replay()
        return self.result


def _rate(device: torch.device) -> Tensor:
    """A learning rate on the device; CUDA's fused optimisers read it as float32,
    whatever the default is.
    """
    return torch.zeros((), device=device, dtype=torch.float32 if device.type == "cuda" else None)


@contextmanager
def _steered(rates: Sequence[tuple[dict, Tensor]]) -> Iterator[None]:
    """Inside the block optimisers take their learning rates from the device, and may be
    captured.
    """
    before = [
        {key: group[key] for key in ("lr", "capturable") if key in group} for group, _ in rates
    ]
    try:
        for group, rate in rates:
            group |= {"lr": rate, **({"capturable": True} if "capturable" in group else {})}
        yield
    finally:
        for (group, _), values in zip(rates, before, strict=True):
            group |= values


def beside(function: Callable[[], T]) -> T:
    """Run a piece on a stream of its own, as torch asks for before a capture; the
    current stream waits for it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    # what it made belongs to that stream: nobody may still need it when it is freed
    torch.cuda.current_stream().synchronize()
    return result


def capture(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """(what it returns, a call that runs its kernels again). Capturing runs none of
    them.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: other runs of this process, each in a thread of its own, may
        # allocate meanwhile
        with (
            _CAPTURING,
            torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
        ):
            result = function()
    except RuntimeError as error:
        raise RuntimeError(
            f"this run's step cannot be captured as a CUDA graph, so leave graphs out: {error}"
        ) from error
    return result, graph.replay


class Captured:
    """What a defense says so that CUDA graphs can hold its terms: a mixin beside
    :class:`abdlab.defenses.Defense`.

    While ``captures`` is True its ``synthesis_term`` and ``student_term`` draw nothing
    (see :meth:`draw`), ask the device nothing, and decide by :meth:`branch` alone.
    """

    captures: bool = False

    def draw(self, batch) -> None:
        """Called before each student step: draw the random numbers of its
        ``student_term``, into tensors that stay where they are.
        """

    def branch(self) -> Hashable:
        """All that its terms decide by in Python, as they are about to be computed, the
        batch's shapes aside.
        """
        return None
