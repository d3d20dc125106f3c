"""The run that the tuner makes next: of which teacher, by which method, from where on, with
which knobs; and what is there of runs so far.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as w
import traitlets as t

from abdlab.checks import check
from abdlab.data import Dataset
from abdlab.home import at_home
from abdlab.presets import METHOD
from abdlab.runs import Run
from abdlab.settings import Settings, settings
from abdlab.stream import HEADLESS, Step
from abdlab.widgets import looks
from abdlab.widgets.branches import (
    NOTEBOOK,
    Origin,
    length_of,
    method_of,
    newest_unfinished,
    origins,
    parameters_of,
    root_of,
    runs_in,
)
from abdlab.widgets.controls import UNDER_WAY, Controls
from abdlab.widgets.experiment import unknown, who, with_teacher
from abdlab.widgets.knobs import Knob, trimmed
from abdlab.widgets.live import Compared, Live, in_words


class NextRun(w.VBox):
    """What is chosen and shown around a run, without anything that trains it.

    >>> import tempfile
    >>> chosen = NextRun(tempfile.mkdtemp(), label="zskt+sv")
    >>> chosen.knob("sv.alpha").value = 0.5
    >>> chosen.chosen.values["sv"]["alpha"]
    0.5

    Args:
        root, chosen, data, label: as for :class:`abdlab.widgets.DefenseTuner`.
        doing: text of a button -> what it does.

    Traits:
        those of :class:`abdlab.widgets.DefenseTuner`.
    """

    state = t.Unicode("idle")
    step = t.Int(0)
    total = t.Int(0)
    acc = t.Float(None, allow_none=True)
    asr = t.Float(None, allow_none=True)
    floor = t.Float(None, allow_none=True)
    folder = t.Unicode("")

    def __init__(
        self,
        root: str | Path,
        chosen: Settings | None = None,
        data: Dataset | None = None,
        label: str = METHOD,
        doing: Mapping[str, Callable[[], Any]] | None = None,
    ):
        self._top, self._data = at_home(root), data
        self._first = self._chosen = settings() if chosen is None else chosen
        #: what its user turned knobs to, for the next run from scratch
        self._own: dict[str, Any] = {}
        self._quiet, self._asked = False, ""
        self.live, self.trouble = Live(), looks.Trouble()
        self.status, self.empty = self.live.status, self.live.empty
        doing = {**(doing or {}), "Copy as parameters": self.copy, "Preset's values": self.reset}
        self.controls = Controls(label, doing, self._turned, self.trouble)
        self.knobs, self.method, self.origin = (
            self.controls.knobs,
            self.controls.method,
            self.controls.origin,
        )
        self.compared = Compared()
        self.parameters_shown, self.parameters_for = looks.Copyable(), looks.said("", "quiet")
        self._compare_card = looks.card("Compare branches", self.compared)
        self._copy_card = looks.card(
            "This run as parameters", self.parameters_for, self.parameters_shown
        )
        self._grid_card = looks.card("What the student learns from now", self.live.grid)
        #: which teacher this is about, in one line
        self.who = w.HTML()
        head = looks.card("", self.live.head, self.controls.bar)
        narrow = w.Layout(width="312px", flex="0 0 312px", grid_gap="8px")
        left = w.VBox([self.controls, self._grid_card], layout=narrow)
        live = looks.card("", self.live, flex="1 1 300px", min_width="0")
        body = looks.row(left, live, flex_flow="row nowrap")
        super().__init__([self.who, head, body, self._compare_card, self._copy_card])
        self._listen()
        looks.dress(self)
        self._begin_where_it_stopped()
        self._name()

    def _listen(self) -> None:
        def heard(do):
            return looks.telling(self.trouble, do)

        self.method.observe(heard(self.find), "value")
        self.origin.observe(heard(self._choose), "value")
        self.compared.runs.observe(heard(self._show_compared), "value")
        self.observe(heard(self._show_state), "state")
        looks.follow_theme(self, heard(self._redraw))

    def knob(self, name: str) -> w.Widget:
        """The control of one setting of the method's defenses, such as "sv.alpha".
        Raises KeyError for one that the method has no knob for.
        """
        return self.knobs[name].control

    @property
    def chosen(self) -> Settings:
        """The experiment with the knobs as they stand. Knobs that were not turned do
        not touch it.
        """
        origin = self.origin.value
        return self.knobs.applied(self._base, origin.index if origin.checkpoint else None)

    @property
    def _base(self) -> Settings:
        """What the knobs change: the experiment, or the settings of the run that this
        one goes on from.
        """
        origin: Origin = self.origin.value
        if origin.folder is None:
            return self._chosen
        base = Settings.of(Run(self._place(origin.folder)).config, rest=self._chosen)
        return trimmed(base, self.method.value, origin.index) if origin.checkpoint else base

    def use(self, overrides: dict[str, Any], preset: str = "") -> bool:
        """Take another teacher over, as :class:`TeacherChooser` hands it on; not while a
        run goes on. Returns whether it was taken.

        Args:
            preset: of a teacher whose images do not fit this experiment's.
        """
        self.trouble.error = None
        if self.state in UNDER_WAY:
            self.trouble.error = "a run is under way: stop it first, then hand the teacher over"
            return False
        try:
            chosen = with_teacher(self._first, overrides, preset)
            check(chosen)
        except ValueError as error:
            self.trouble.error = error
            return False
        if chosen.values["data"] != self._chosen.values["data"]:
            self._data = None
        self._chosen, self.floor, self.folder = chosen, None, ""
        self.step, self.total, self.acc, self.asr = 0, 0, None, None
        self.live.clear()
        self.live.redraw()
        self.state = "idle"
        self._begin_where_it_stopped()
        self._name()
        if self.origin.value.folder is None:
            about = chosen.opened or ", ".join(map(str, chosen.attacks))
            self.live.say(f"The next run's teacher: {about}.")
        return True

    def reset(self) -> None:
        """Put every knob back where the settings have it."""
        self._own.clear()
        self._show_knobs()

    def _name(self) -> None:
        """Say which teacher this is about."""
        text = who(self._chosen, self.root, self._data)
        self.who.value = f'<div class="abdlab-who">{html.escape(text)}</div>'

    @property
    def root(self) -> Path:
        """Where this experiment's teacher and students are: the given root, or a folder
        in it where that has another teacher.
        """
        return root_of(self._top, self._chosen)

    def _place(self, folder: str) -> Path:
        return self.root / f"seed{self._chosen.seed}" / folder

    # --- runs that are there

    def find(self, origin: Origin | None = None) -> None:
        """Look for runs to go on with, to branch from and to compare; begin from
        ``origin`` (by default from scratch).
        """
        runs = runs_in(self.root / f"seed{self._chosen.seed}")
        names = [path.name for path in runs]
        alike = [path for path in runs if method_of(path.name) == self.method.value]
        places = [Origin(), *(place for path in alike for place in origins(path))]
        self._quiet = True
        self.origin.options = [(str(place), place) for place in places]
        self.origin.value = origin if origin in places else Origin()
        self._quiet = False
        self._show_knobs()
        self._lock()
        self.compared.offer(names)
        self._compare_card.layout.display = "" if len(names) > 1 else "none"

    def _begin_where_it_stopped(self) -> None:
        """Begin with the newest run that is not done, if there is one."""
        beside = self.root / f"seed{self._chosen.seed}"
        try:
            place = None if headless() else newest_unfinished(beside)
            if place is not None:
                self.controls.choose(method_of(place.folder))
            self.find(place)
            self._show_state()
            self._show_run()
        except Exception as error:  # a folder of somebody's must not close the widget
            self.find()
            self._show_state()
            self.trouble.error = error

    def _choose(self) -> None:
        if not self._quiet:
            self._show_knobs()
            self._show_run()
            self._lock()

    def _show_knobs(self) -> None:
        """Turn the knobs to what the origin's run had, or to what they were last turned
        to.
        """
        self.knobs.show(self.method.value, self._base)
        if self.origin.value.folder is None:
            self.knobs.turn(self._own)

    def _show_run(self) -> None:
        """Show the run that the origin names, as far as it came."""
        origin: Origin = self.origin.value
        if origin.folder is None or self.state in UNDER_WAY:
            return
        run = Run(self._place(origin.folder))
        index, length = origin.index, length_of(origin.checkpoint or run.path)
        rows = [row for row in run.history().to_dict("records") if row["step"] <= index]
        images = run.samples()
        last = max((step for step in images if step <= index), default=None)
        shown = images[last] if last is not None else None
        self.live.unknown = unknown(self._chosen)
        self.live.show(rows, Step(index, length, {}, images=shown), self.floor)
        self.folder, self.step, self.total, self.state = origin.folder, index, length, "idle"
        does = "Start branches off it" if origin.checkpoint else "Go on continues it"
        self.live.say(f"{origin.folder} at step {index} of {length}: {does}.")
        self._show_cards()
        self._lock()

    def _lock(self) -> None:
        origin = self.origin.value
        self.controls.lock(
            self.state,
            goes_on=bool(origin.folder and not origin.checkpoint),
            branches=bool(origin.checkpoint),
            begun=bool(self.folder and self.step),
            there=bool(self.folder) and self._place(self.folder).is_dir(),
            floor=self._chosen.labelled and bool(self._chosen.attacks),
        )

    def _turned(self, knob: Knob, value: Any) -> None:
        """A knob was turned: it stands there for the next run from scratch too."""
        self._own[knob.name] = value

    def copy(self) -> str:
        """Show the parameters that repeat exactly the latest run; returns them as YAML."""
        self.parameters_shown.text = self.parameters()
        self._copy_card.layout.display = ""
        looks.say(
            self.parameters_for,
            f"Save as parameters.yaml, then: papermill {NOTEBOOK}.ipynb out.ipynb -f"
            " parameters.yaml",
            "quiet",
        )
        return self.parameters_shown.text

    def parameters(self, folder: str | None = None) -> str:
        """YAML that repeats a run from scratch, by default the latest one; see
        :func:`abdlab.widgets.branches.parameters_of`.
        """
        run = Run(self._place(folder or self.folder))
        return parameters_of(run, self._chosen, self._top / "repeated")

    # --- what is shown

    def _show_state(self) -> None:
        text = in_words(self.state, self.folder, self.step, self.total, self.live.left(self.total))
        self.live.say(f"{self._asked} {text}" if self.state == "asking" else text)
        self._lock()
        if self.state != "idle":
            looks.say(self.empty, "")
        self._show_cards()

    def _show_cards(self) -> None:
        self._grid_card.layout.display = "" if self.live.grid.png else "none"
        self._copy_card.layout.display = "" if self.parameters_shown.text else "none"

    def _redraw(self) -> None:
        self.live.redraw(self.floor)
        if self.state == "running":
            self._show_state()
        if self.state != "idle":
            looks.say(self.empty, "")
        self._show_cards()
        self._show_compared()

    def _show_compared(self) -> None:
        if not self._quiet:
            chosen = self.compared.runs.value
            histories = {name: Run(self._place(name)).history() for name in chosen}
            self.compared.show(histories, self.floor)


def headless() -> bool:
    """Whether nobody is there to click."""
    return bool(os.environ.get(HEADLESS))
