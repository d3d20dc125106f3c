"""How many threads a run computes with: one number, whichever way abdlab was started."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

#: environment variable that names the number itself
THREADS = "ABDLAB_THREADS"
#: more than any machine has
_MOST = 1024


class ThreadsDiffer(UserWarning):
    """Numbers that were made with different numbers of threads meet in one folder."""


def threads() -> int:
    """The number of threads that every run in a folder computes with: 1, or what the
    environment variable ABDLAB_THREADS names.

    Sums are rounded differently when more threads share them, and training amplifies
    that: the number belongs to a run's settings. So it does not follow the machine's
    cores, nor OMP_NUM_THREADS. Cores are used by runs side by side
    (:func:`abdlab.students.distill_all`, ``abdlab sweep``). A large network on a CPU
    trains faster with ABDLAB_THREADS=4, say; the numbers are then others.

    Raises:
        ValueError: when the variable holds no whole number from 1 to 1024.
    """
    named = os.environ.get(THREADS, "").strip()
    if not named:
        return 1
    if not (named.isascii() and named.isdigit() and 1 <= int(named[:9]) <= _MOST):
        raise ValueError(f"{THREADS} is a whole number from 1 to {_MOST}, not {named[:40]!r}")
    return int(named)


def share() -> int:
    """How many runs at once share the threads that torch may use in this process, each
    with :func:`threads` of them; at least 1.
    """
    return max(1, torch.get_num_threads() // threads())


@contextmanager
def computing_with(number: int) -> Iterator[None]:
    """Let torch compute with so many threads inside the block, in the calling thread.

    >>> with computing_with(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    _set(number)
    try:
        yield
    finally:
        _set(before)


def pulled_with(number: int, stream: Iterable[T]) -> Iterator[T]:
    """The stream, each of whose steps is computed with so many threads; whoever pulls
    it computes with its own between two steps. Closing it closes the stream.
    """
    steps, end = iter(stream), object()
    try:
        while True:
            with computing_with(number):
                step = next(steps, end)
            if step is end:
                return
            yield step
    finally:
        if hasattr(steps, "close"):
            with computing_with(number):
                steps.close()


def check_same(where: object, made_with: int, ours: int) -> None:
    """Warn when a run that is taken up again was begun with another number of threads.

    Warns:
        ThreadsDiffer: with what becomes of it, and how to get equal numbers.
    """
    if made_with != ours:
        warnings.warn(
            f"{where} was begun with {_count(made_with)} and keeps to that, while new runs compute"
            f" with {ours}: their numbers are not comparable in the last digits, which training"
            f" amplifies ({THREADS}={made_with} makes all alike)",
            ThreadsDiffer,
            stacklevel=4,
        )


def mixed(numbers: Iterable[float | None]) -> str:
    """A sentence that says so when rows of one table were made with different numbers
    of threads; empty when they were not. None and NaN stand for rows of which it is not
    known: they are counted beside known ones.

    >>> mixed([1, 1, 4])
    'Rows differ in threads (1 thread: 2 rows, 4 threads: 1 row): training amplifies that.'
    >>> mixed([2, 2]), mixed([None, None])
    ('', '')
    """
    known = [None if n is None or n != n else int(n) for n in numbers]
    counts = Counter(known)
    if len(counts) < 2:
        return ""
    parts = [
        f"{'not recorded' if n is None else _count(n)}: {k} {'row' if k == 1 else 'rows'}"
        for n, k in sorted(counts.items(), key=lambda item: (item[0] is None, item[0]))
    ]
    return f"Rows differ in threads ({', '.join(parts)}): training amplifies that."


def _count(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def _set(number: int) -> None:
    if torch.get_num_threads() != number:  # setting it anew makes torch's pool anew
        torch.set_num_threads(number)
