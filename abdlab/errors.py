"""The errors that a user can mend, each one clear sentence, and the "did you mean" that
goes with names.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any


class CheckpointError(ValueError):
    """A weights file that cannot, or must not, be loaded."""


class Diverged(RuntimeError):
    """A loss or a weight is no longer finite; the message names the step, the loss and
    the last good checkpoint.
    """


#: a list of known names that is longer (characters) is cut to the nearest ones
_LONGEST = 180


def short(value: Any, longest: int = 60) -> str:
    """A value as a sentence quotes it, in one line and cut to so many characters."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def did_you_mean(what: str, given: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: the nearest known one, then all of them, or of
    very many those that are nearest.
    """
    known = [str(k) for k in known]
    near = difflib.get_close_matches(str(given), known, n=4, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    told = ", ".join(known)
    if len(told) > _LONGEST:
        some = near[:4] or known[:4]
        told = f"{', '.join(some)} and {len(known) - len(some)} more"
    return f"unknown {what} {short(given)}: {hint}known are {told}"


def check_keys(what: str, given: Mapping | Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError with a "did you mean" for the first key that is not known."""
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(did_you_mean(what, key, known))


def keywords(function: Callable) -> list[str]:
    """The names that ``function`` takes by keyword."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind in kinds and name != "self"
    ]


def check_above_zero(**values: float) -> None:
    """Raise ValueError, naming it, for the first value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is above 0, not {value}")


def one_of(what: str, value: Any, *known: Any) -> None:
    """Raise ValueError, naming what is known, for a value that is none of these."""
    if value not in known:
        *most, last = map(repr, known)
        raise ValueError(f"{what} is {', '.join(most)} or {last}, not {value!r}")


def some(names: Collection, spoken: Callable[[Any], str] = str) -> str:
    """The first three names as they are ``spoken``, and how many more there are."""
    names = list(names)
    return ", ".join(map(spoken, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
