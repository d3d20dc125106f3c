"""One step of a training stream, and the bars that show a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of a training stream (a pseudo-batch of :func:`distill`, a mini-batch of
    :func:`abdlab.train.train`).

    Attributes:
        index: 1 after the first step; ``total`` after the last.
        total: length of the stream.
        losses: the step's mean loss terms by name, weights included.
        acc, asr: shares in [0, 1], on steps where an exam was held; else None.
        images: up to 64 of the step's inputs (N, C, H, W) on the CPU, now and then;
            else None.
        events: what a reader must know, as sentences (a vaccine found or not, a defense
            that begins).
        seconds: since this process began the stream.
    """

    index: int
    total: int
    losses: dict[str, float]
    acc: float | None = None
    asr: float | None = None
    images: Tensor | None = None
    events: tuple[str, ...] = ()
    seconds: float = 0.0


#: set by whoever runs a notebook without a browser: progress bars become lines on the
#: terminal
HEADLESS = "ABDLAB_HEADLESS"


def progress(
    stream: Iterable[Step], label: str, tell: Callable[[str, Step], None] | None = None
) -> Iterator[Step]:
    """The stream with a tqdm bar, a widget in JupyterLab and a line on a terminal;
    events are printed. ``tell`` replaces the bar.
    """
    bar = None
    try:
        for step in stream:
            if tell:
                tell(label, step)
            else:
                bar = bar or _bar(label, step.total, step.index - 1)
                _advance(bar, label, step)
            yield step
    finally:
        if bar is not None:
            bar.close()
        if hasattr(stream, "close"):
            stream.close()


def stages(label: str) -> Callable[[str, int, int], None]:
    """A bar for work in stages: call it with what begins now, how many stages are done,
    and how many there are; it closes when all are.
    """
    held: list = []

    def tell(what: str, done: int, total: int) -> None:
        if not held:
            held.append(_bar(label, total))
        bar = held[0]
        bar.set_postfix_str(what, refresh=False)
        bar.n = done
        bar.refresh()
        if done == total:
            bar.close()

    return tell


def _bar(label: str, total: int, initial: int = 0):
    if os.environ.get(HEADLESS):
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm(
        total=total, initial=initial, desc=label, unit="step", mininterval=1.0, dynamic_ncols=True
    )


def _advance(bar, label: str, step: Step) -> None:
    for event in step.events:
        bar.write(f"{label}: {event}")
    if step.acc is not None:
        bar.set_postfix_str(f"{label} {_scores(step.acc, step.asr)}", refresh=False)
    bar.update()


def _scores(acc: float, asr: float | None) -> str:
    return f"ACC {acc:.1%}" + ("" if asr is None else f" ASR {asr:.1%}")


class _Board:
    """One bar that counts the steps of several students, and tells their latest scores.

    Args:
        total: steps of all of them together.
    """

    def __init__(self, total: int):
        self.done, self.latest, self.total, self.bar = {}, {}, total, None

    def show(self, label: str, step: Step) -> None:
        self.bar = self.bar or _bar("students", self.total)
        if label not in self.done:  # what a checkpoint spares is done, at no pace
            self.done[label] = step.index - 1
            self.bar.initial += step.index - 1
            self.bar.n += step.index - 1
        new = step.index - self.done[label]
        for event in step.events:
            self.bar.write(f"{label}: {event}")
        if step.acc is not None:
            self.latest[label] = _scores(step.acc, step.asr)
            self.bar.set_postfix_str(
                ", ".join(f"{k} {v}" for k, v in self.latest.items()), refresh=False
            )
        self.done[label] = step.index
        self.bar.update(new)
        if step.index == step.total:
            self.bar.write(f"{label}: {self.latest.pop(label, 'done')} after {step.seconds:.0f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
