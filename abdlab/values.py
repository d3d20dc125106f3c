"""Plain values as people write them: texts read as values, and types checked against
annotations.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import inspect
import math
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from abdlab.defenses.plans import Plan
from abdlab.errors import short

#: what JSON, YAML and shells call Python's constants
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    bool: "True or False",
    dict: "a dict",
    list: "a list",
    type(None): "None",
}


def read(text: str) -> Any:
    """The value that a text stands for, in Python's or in JSON's spelling.

    >>> read('{"sv.verify": false, "sv.cap": None}')
    {'sv.verify': False, 'sv.cap': None}

    Raises:
        ValueError: for a text that is no plain value, or a dict with a key twice.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes: a text is a text
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(_Constants().visit(tree))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (SyntaxError, TypeError, MemoryError) as error:
        raise ValueError(f"no plain value: {error}") from None
    for node in ast.walk(tree):
        keys = [ast.dump(key) for key in node.keys if key] if isinstance(node, ast.Dict) else []
        twice = next((i for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise ValueError(f"{ast.unparse(node.keys[twice])} stands twice in {short(text)}")
    return value


class _Constants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = _CONSTANTS.get(node.id.lower(), node)
        return node if found is node else ast.Constant(found)


def pairs(words: Sequence[str]) -> dict[str, str]:
    """The texts KEY=VALUE of the command line's -p by key.

    Raises:
        ValueError: for one without a value, and for a key that stands there twice.
    """
    found = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ValueError(f"-p takes a name and a value, as in -p seed 1; {word!r} has no value")
        if key in found:
            raise ValueError(f"-p names {key} twice: keep one of {found[key]!r} and {value!r}")
        found[key] = value
    return found


def merged(knobs: Mapping[str, Any], overrides: Mapping[str, Any] | str | None = None) -> dict:
    """Overrides for :func:`abdlab.settings.settings` from a notebook's own parameters
    and its ``overrides``, which win.

    Args:
        knobs: dotted name -> value; None leaves the setting to the preset.
        overrides: a dict, or the text of one, as papermill's own ``-p`` hands it over.

    >>> merged({"sv.alpha": None, "sr.weight": 2.0}, '{"sv.verify": false}')
    {'sr.weight': 2.0, 'sv.verify': False}
    """
    given = as_dict("overrides", overrides or {})
    return {**{name: value for name, value in knobs.items() if value is not None}, **given}


def as_dict(name: str, value: Any) -> dict:
    """A dict, or what a text of one stands for.

    Raises:
        ValueError: for anything else, with how it is written.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = read(value)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} is a dict such as {{'sv.alpha': 0.1}}, or its text, not {short(value)}"
        )
    return dict(value)


def check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Raise ValueError for a value that JSON cannot hold: another type than numbers,
    texts, lists and dicts by text, a number that is not finite, or endless nesting.
    """
    if depth > 20:
        raise ValueError(f"{name} is nested too deeply, or holds itself")
    if isinstance(value, Mapping):
        for key, held in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} names its values by texts, not by {short(key)}")
            check_plain(name, held, depth + 1)
    elif isinstance(value, (list, tuple)):
        for held in value:
            check_plain(name, held, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} holds {value}, which is no finite number")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(
            f"{name} holds {short(value)}, a {type(value).__name__}: numbers, texts, True, False,"
            " None, lists and dicts can be kept"
        )


@functools.cache
def hints(function: Callable) -> dict[str, Any]:
    """The annotations of a function, or of the class that it makes, by parameter."""
    makes = function.__init__ if inspect.isclass(function) else function
    if dataclasses.is_dataclass(function):  # fields of a base are annotated in its module
        makes = function
    found = typing.get_type_hints(makes)
    return {name: found[name] for name in inspect.signature(function).parameters if name in found}


def check_type(name: str, value: Any, annotation: Any, default: Any = None) -> None:
    """Raise ValueError unless a plain value fits an annotation.

    True and False are no numbers, a whole number is a number too, lists stand for
    sequences. A plan whose default is a whole number holds whole numbers.

    >>> check_type("sv.k", "3", int)
    Traceback (most recent call last):
    ValueError: sv.k takes a whole number, not '3'
    """
    if annotation == Plan and type(default) is int:
        annotation = int | collections.abc.Sequence[collections.abc.Sequence[int]]
    if not fits(value, annotation):
        raise ValueError(f"{name} takes {say(annotation)}, not {short(value)}")


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value fits an annotation; ones that no plain value has fit all."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    if annotation in (int, bool, str):
        return type(value) is annotation
    if annotation is type(None):
        return value is None
    if annotation is Path:
        return isinstance(value, (str, Path))
    kind = origin or annotation
    if kind in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and all(
            fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items() if parts
        )
    if kind in (collections.abc.Sequence, list, tuple):
        return isinstance(value, (list, tuple)) and all(
            fits(held, parts[0]) for held in value if parts
        )
    return True


def say(annotation: Any) -> str:
    """An annotation for a person: "a whole number", "a list of numbers, or None"."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation == Plan:
        return "a number, or a plan [[0, number], [pseudo-batch, number], ...]"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(say(part) for part in parts))
    kind = origin or annotation
    if kind in (collections.abc.Sequence, list, tuple):
        return "a list" + (f" of which each is {say(parts[0])}" if parts else "")
    if kind in (collections.abc.Mapping, dict):
        return "a dict"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
