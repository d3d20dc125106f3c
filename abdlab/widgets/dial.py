"""A number that can be slid and typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets as t

_HERE = Path(__file__).parent


class Dial(anywidget.AnyWidget):
    """A slider and a box in one line. What is typed is kept exactly, and the slider's
    ends move to reach it; a text that is no number is refused in words beside it.

    >>> dial = Dial(value=0.01, low=1e-3, high=10.0, log=True)
    >>> dial.value = 150
    >>> dial.value, dial.high
    (150.0, 150.0)

    Traits:
        value: a float, or an int where ``whole``; None is off, and can be typed where
            ``optional``.
        low, high, step: of the slider. log: it goes by decades; its ``low`` is above 0,
            and a 0 is typed.
        bounded: nothing beyond the ends can be typed.
        continuous: tell while it is slid, not only at the end.
        label, description: beside it, and what a screen reader says.
    """

    _esm = _HERE / "dial.js"
    value = t.Any(0.0).tag(sync=True)
    low = t.Float(0.0).tag(sync=True)
    high = t.Float(1.0).tag(sync=True)
    step = t.Float(0.01).tag(sync=True)
    log = t.Bool(False).tag(sync=True)
    whole = t.Bool(False).tag(sync=True)
    optional = t.Bool(False).tag(sync=True)
    bounded = t.Bool(False).tag(sync=True)
    continuous = t.Bool(False).tag(sync=True)
    disabled = t.Bool(False).tag(sync=True)
    label = t.Unicode("").tag(sync=True)
    description = t.Unicode("").tag(sync=True)

    @t.validate("value")
    def _numbers_only(self, proposal: dict) -> Any:
        value = proposal["value"]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise t.TraitError(f"{self.description} is a number, not {value!r}")
        if self.whole and value != int(value):
            raise t.TraitError(f"{self.description} is a whole number, not {value!r}")
        if self.bounded:
            value = min(max(value, self.low), self.high)
        return int(value) if self.whole else float(value)

    @t.observe("value")
    def _reach(self, _change: dict) -> None:
        if self.value is not None:
            self.high = max(self.high, self.value)
            if not self.log or self.value > 0:
                self.low = min(self.low, self.value)
