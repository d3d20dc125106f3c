"""Controls for the parameters of one trigger, read off its signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import ipywidgets as w

from abdlab.attacks.triggers import ADVERSARIAL, CORNERS, TRIGGERS
from abdlab.widgets.dial import Dial

#: what a parameter's control is called
_WORDS = {
    "size": "size (pixels)",
    "corner": "position",
    "margin": "margin (pixels)",
    "alpha": "strength",
    "strength": "strength",
    "value": "brightness",
    "frequency": "periods per width",
    "pattern_seed": "pattern",
    "pixels": "shift (pixels)",
    "grid": "control points",
}
#: parameter -> its tooltip
_TOLD = {
    "size": "Larger is learnt more easily, and seen more easily.",
    "margin": "Between the trigger and the image's edge.",
    "alpha": "Share of the trigger in the mixture: higher is learnt more easily, and seen.",
    "strength": "Of the change, in [0, 1] units: higher is learnt more easily, and seen.",
    "value": "Of its pixels: 0 black, 1 white.",
    "frequency": "Higher is finer.",
    "pattern_seed": "Another number draws another pattern.",
    "pixels": "How far the image is bent: more is learnt more easily, and seen more easily.",
    "grid": "Per axis: more bend the image in more places.",
}


def control_of(name: str, key: str, value: Any, side: int) -> w.Widget | None:
    """The control for one parameter of a trigger, by its name or else by its type;
    None for a pattern, and for a parameter that says no type.

    >>> type(control_of("badnet_sq", "size", None, 32)).__name__
    'Dial'

    Args:
        name: of the trigger. key: of the parameter.
        value: what it stands at; None takes the signature's default.
        side: of the images, in pixels.
    """
    if key == "pattern":
        return None
    given = inspect.signature(TRIGGERS[name]).parameters[key].default
    default = None if given is inspect.Parameter.empty else given
    value = default if value is None else value
    label = _WORDS.get(key, key.replace("_", " "))
    common = {
        "description": label,
        "style": {"description_width": "112px"},
        "layout": w.Layout(width="auto"),
    }
    if key == "corner":
        corners = [(c.replace("_", " "), c) for c in CORNERS]
        return w.Dropdown(options=corners, value=value, **common)
    told = {"label": label, "description": label, "continuous": True, "tooltip": _TOLD.get(key, "")}
    if key == "size":
        least = 3 if "grid" in name or name in ADVERSARIAL else 2
        value = value or max(least, round(side * 3 / 32))
        return Dial(value=value, low=1, high=side, step=1, whole=True, **told)
    if key in ("margin", "pattern_seed"):
        return Dial(value=value, high=max(1, side // 2), step=1, whole=True, **told)
    if key == "pixels":
        return Dial(value=value, low=0.05, high=side / 4, step=0.05, **told)
    if key == "grid":
        return Dial(value=value, low=2, high=side, step=1, whole=True, **told)
    if key == "frequency":
        return Dial(value=value, low=0.5, high=side / 2, step=0.5, **told)
    kind = type(value) if value is not None else _annotated(TRIGGERS[name], key)
    if kind is bool:
        return w.Checkbox(bool(value), indent=False, **common)
    if kind is int:
        value = value or 0
        return Dial(value=value, high=max(10, 2 * abs(value)), step=1, whole=True, **told)
    if kind is float:
        value = value or 0.0
        return Dial(value=value, high=1 if 0 <= value <= 1 else 2 * abs(value), **told)
    return w.Text(value or "", **common) if kind is str else None


def _annotated(function: Callable, key: str) -> type | None:
    """The plain type that a signature says, the first of several; None for none."""
    said = typing.get_type_hints(function).get(key)
    kinds = typing.get_args(said) or (said,)
    return next((kind for kind in kinds if kind in (bool, int, float, str)), None)
