"""What made a checkpoint: a fingerprint of the teacher, and every setting of the parts."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Described:
    """Base class that remembers what an instance was made with, for :func:`settings_of`.

    >>> class Noise(Described):
    ...     def __init__(self, *, weight=1.0, size=0.1): ...
    >>> settings_of(Noise(size=0.2))
    {'weight': 1.0, 'size': 0.2}
    """

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made._given = args, kwargs
        return made


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell a network's weights and buffers apart from others'."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(_bytes(value))
    return total.hexdigest()[:16]


def settings_of(part: Described) -> dict[str, Any]:
    """Every setting that a part was made with, defaults included, as plain values."""
    args, kwargs = part._given
    try:
        bound = inspect.signature(type(part)).bind_partial(*args, **kwargs)
    except TypeError:  # a class of its own __new__, or a copy
        return {}
    bound.apply_defaults()
    return {name: _plain(value) for name, value in bound.arguments.items()}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """What differs between two nested mappings of plain values, as phrases.

    >>> differences({"zskt": {"z": 5, "width": 4}}, {"zskt": {"z": 6, "width": 4}})
    ['zskt.z was 5 and is 6']
    """
    found = []
    for name in dict.fromkeys([*saved, *now]):
        old, new, here = saved.get(name), now.get(name), f"{at}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{here}.")
        elif old != new:
            found.append(f"{here} was {_short(old)} and is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "absent" if value is None else "there" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(-1).numpy(force=True).tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, Tensor):
        digest = hashlib.sha256(_bytes(value)).hexdigest()[:16]
        return f"tensor {'x'.join(map(str, value.shape))} {digest}"
    if isinstance(value, nn.Module):
        return f"network {fingerprint(value)}"
    if isinstance(value, Described):
        return {"name": getattr(value, "name", type(value).__name__), **settings_of(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return getattr(value, "__qualname__", type(value).__qualname__)
