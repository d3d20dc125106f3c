"""What the tuner's user chooses and presses: the method, where it begins, the knobs, the
buttons, and which of them can be used when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ipywidgets as w

from abdlab.labels import Label, name_of
from abdlab.methods import methods
from abdlab.presets import DEFENDED
from abdlab.widgets import looks
from abdlab.widgets.branches import Origin
from abdlab.widgets.knobs import Knob, Knobs

#: states of a tuner whose run is not over
UNDER_WAY = ("preparing", "asking", "running", "paused", "stopping")
#: those in which it waits for its user
WAITING = ("asking", "paused")
#: button -> its tooltip and style
_BUTTONS = {
    "Start": ("begin, or go on", "primary"),
    "Pause": ("wait after this step", ""),
    "Stop": ("finish this step, measure, save", "warning"),
    "Branch here": ("begin a new run where this one is now, with other weights", ""),
    "Copy as parameters": ("parameters for papermill that repeat exactly this run", ""),
    "Preset's values": ("put every knob back where the settings have it", ""),
}


class Controls(w.VBox):
    """The tuner's left column.

    >>> controls = Controls("zskt+sv", {}, lambda knob, value: None, looks.Trouble())
    >>> controls.lock("running")
    >>> controls.buttons["Start"].disabled, controls.buttons["Pause"].disabled
    (True, False)

    Args:
        label: the method to begin with.
        doing: text of a button -> what it does.
        turned: called with a knob and its new value.
        trouble: shows what a button raises; it stands beside them.

    Attributes:
        bar: the buttons and what went wrong, for a place on top.
    """

    def __init__(
        self,
        label: str,
        doing: Mapping[str, Callable[[], Any]],
        turned: Callable[[Knob, Any], None],
        trouble: looks.Trouble,
    ):
        wide = w.Layout(width="auto")
        beside = {"style": {"description_width": "52px"}, "layout": wide}
        self.method = w.Dropdown(description="method", **beside)
        #: the first label's methods, and what cleans the teacher where that is wanted
        self._known = methods(str(replace(Label.parse(label), purifiers=())))
        self._purifiers = Label.parse(label).purifiers or Label.parse(DEFENDED).purifiers
        self.purify = w.Checkbox(
            description=f"clean the teacher first: {'+'.join(self._purifiers)}",
            tooltip="A copy of it unlearns its own inverted triggers, and its activations are"
            " bounded. The teacher itself stays as it is.",
            indent=False,
            layout=wide,
        )
        self.choose(label)
        self.purify.observe(self._switch, "value")
        self.origin = w.Dropdown(options=[(str(Origin()), Origin())], description="begin", **beside)
        self.with_floor = w.Checkbox(
            True,
            description="distil the clean-KD floor too",
            tooltip="After the first student, once per folder: its ASR is the best to expect.",
            indent=False,
            layout=wide,
        )
        self.keep_on = w.Checkbox(
            False, description="go on when the page is closed", indent=False, layout=wide
        )
        self.knobs = Knobs(turned)
        self.buttons = {
            text: looks.button(
                text, looks.telling(trouble, doing.get(text, lambda: None)), tooltip, style
            )
            for text, (tooltip, style) in _BUTTONS.items()
        }
        back = self.buttons["Preset's values"]
        back.layout.align_self = "flex-start"
        above = [button for button in self.buttons.values() if button is not back]
        self.bar = looks.row(*above, trouble, align_items="center")
        super().__init__(
            [
                looks.card(
                    "Run", self.method, self.purify, self.origin, self.with_floor, self.keep_on
                ),
                looks.card("Defense", self.knobs, back),
            ],
            layout=w.Layout(grid_gap="8px"),
        )

    def choose(self, label: str) -> None:
        """Show a method, its teacher cleaned first or not."""
        method = Label.parse(label)
        if method.purifiers:
            self._purifiers = method.purifiers
            self.purify.description = f"clean the teacher first: {'+'.join(method.purifiers)}"
        every = [replace(Label.parse(each), purifiers=method.purifiers) for each in self._known]
        every = dict.fromkeys([*map(str, every), str(method)])
        options = [(name_of(each), each) for each in every]
        if self.method.options != tuple(options):
            self.method.options = options
        self.method.value = str(method)
        self.purify.value = bool(method.purifiers)

    def _switch(self, change) -> None:
        label = Label.parse(self.method.value)
        if bool(label.purifiers) != change["new"]:
            purifiers = self._purifiers if change["new"] else ()
            self.choose(str(replace(label, purifiers=purifiers)))

    def lock(
        self,
        state: str,
        *,
        goes_on: bool = False,
        branches: bool = False,
        begun: bool = False,
        there: bool = False,
        floor: bool = True,
    ) -> None:
        """Disable what cannot be used now.

        Args:
            state: the tuner's.
            goes_on, branches: whether Start goes on with a run, or branches off one.
            begun: whether the latest run has done a step, so that one can branch off it.
            there: whether its folder is there, so that its parameters can be copied.
            floor: whether there can be one: labelled images, and a known attack.
        """
        busy = state in UNDER_WAY
        self.knobs.lock(busy=busy, begun=goes_on, branches=branches)
        for control in (self.method, self.purify, self.origin, self.with_floor):
            control.disabled = busy
        self.with_floor.disabled = busy or not floor
        waits = state in WAITING
        self.buttons["Preset's values"].disabled = busy or goes_on
        self.buttons["Start"].disabled = busy and not waits
        self.buttons["Start"].description = "Go on" if waits or goes_on else "Start"
        self.buttons["Pause"].disabled = state != "running"
        self.buttons["Stop"].disabled = not busy or state == "stopping"
        self.buttons["Branch here"].disabled = (busy and state != "paused") or not begun
        self.buttons["Copy as parameters"].disabled = not there
