"""The widgets as one dashboard: what one makes, the others take up."""

from __future__ import annotations

from pathlib import Path

import anywidget
import ipywidgets as w
import traitlets as t

from abdlab.presets import METHOD
from abdlab.runs import Run
from abdlab.settings import Settings, settings
from abdlab.widgets import looks
from abdlab.widgets.defense_tuner import DefenseTuner
from abdlab.widgets.next_run import headless
from abdlab.widgets.queue import Queue
from abdlab.widgets.run_browser import RunBrowser
from abdlab.widgets.sample_explorer import SampleExplorer
from abdlab.widgets.taking_up import take_up
from abdlab.widgets.teacher_chooser import TeacherChooser, TeacherOpener
from abdlab.widgets.trigger_designer import TriggerDesigner

TITLES = ("1 Teacher", "2 Defense", "3 Samples", "4 Runs")
_HERE = Path(__file__).parent


class _Lead(anywidget.AnyWidget):
    """Brings the cell that it is in to the top of the page, once. Draws nothing."""

    _esm = _HERE / "lead.js"
    done = t.Bool(False).tag(sync=True)


class Workbench(w.VBox):
    """Make or open a teacher, tune a defense against its backdoor, look at what the student learns
    from, and browse what is there.

    >>> import tempfile
    >>> bench = Workbench(tempfile.mkdtemp())
    >>> bench.designer.hand()  # the trigger goes from tab to tab
    >>> bench.tuner.who.value.count("badnet_sq")
    1

    Args:
        root: the folder of results; notebooks that name the same one share its teachers
            and students.
        chosen: the experiment to begin with.
        label: the method to begin with, such as "zskt+sv+tu".

    Attributes:
        teacher, tuner, explorer, browser: the widgets, in the order of the tabs.
        designer, opener: the two halves of the first.
        queue: several runs one after another, below the browser.
    """

    def __init__(
        self,
        root: str | Path = "runs/walk",
        chosen: Settings | None = None,
        label: str = METHOD,
    ):
        self.chosen = settings() if chosen is None else chosen
        try:
            data = self.chosen.dataset()
        except (ValueError, OSError, RuntimeError):
            data = None  # the designer says what is missing
        self.teacher = TeacherChooser(root, self.chosen, data)
        self.designer, self.opener = self.teacher.designer, self.teacher.opener
        self.tuner = DefenseTuner(root, self.chosen, data, label)
        self.explorer = SampleExplorer(root, self.chosen.device)
        self.browser = RunBrowser(root)
        self.queue = Queue(root, lambda: self.tuner.chosen, label)
        runs = w.VBox([self.browser, self.queue])
        parts = (self.teacher, self.tuner, self.explorer, runs)
        self.tabs = w.Tab(parts, titles=TITLES)
        # above the tabs it is true of all of them
        self.tuner.children = [part for part in self.tuner.children if part is not self.tuner.who]
        super().__init__([_Lead(), self.tuner.who, self.tabs])
        looks.dress(self)
        self.designer.observe(lambda change: self._take(self.designer, change["new"]), "handed")
        self.opener.observe(lambda change: self._take(self.opener, change["new"]), "handed")
        self.tuner.observe(self._trained, "state")
        self.queue.observe(self._queued, "state")
        self.browser.on_take(self._take_up)
        self._stale = False
        self.tabs.observe(lambda _: self._look(), "selected_index")

    def finish(self) -> dict:
        """Where nobody can click (papermill), run the tuner to its end; in a browser,
        nothing. Returns the tuner's metrics.
        """
        if headless():
            self.tuner.run()
            self._stale = True
            for index in (2, 3):
                self.tabs.selected_index = index
        folder = self.tuner.folder
        return Run(self.tuner._place(folder)).metrics if folder else {}

    def _take(self, part: TriggerDesigner | TeacherOpener, overrides: dict | None) -> None:
        """The tuner takes a teacher over; where it refuses, the part that handed it on
        says why, and its tab stays.
        """
        if not overrides:
            return
        preset = part.preset_beside(self.chosen) if part is self.opener else ""
        if self.tuner.use(overrides, preset):
            self.tabs.selected_index = 1
        else:
            part.refused(self.tuner.trouble.error)

    def _queued(self, change: dict) -> None:
        if change["new"] in ("done", "stopped", "failed"):
            self.browser.refresh()
            self._stale = True

    def _take_up(self, folder: Path) -> None:
        take_up(self.tuner, folder)
        self.tabs.selected_index = self.tabs.children.index(self.tuner)

    def _trained(self, change: dict) -> None:
        """Samples and runs are looked for when their tab is next opened: at once would
        slow the run's end.
        """
        if change["new"] in ("done", "stopped", "failed"):
            self._stale = True

    def _look(self) -> None:
        if self.tabs.selected_index == 0:
            self.designer.draw()  # a run may have made an optimised trigger
        if self.tabs.selected_index in (2, 3) and self._stale:
            self.explorer.refresh()
            self.browser.refresh()
            self._stale = False
