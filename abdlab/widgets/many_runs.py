"""All chosen runs in one figure that answers the pointer.

plotly draws it. Its FigureWidget is an anywidget whose script, plotly.js with all that
it needs, comes with the Python package: it works in JupyterLab 4 without a network and
without an extension, and under papermill its trait values are set as in a page. bokeh
needs the extension jupyter_bokeh for the same, and altair's JupyterChart fetches Vega
from a CDN unless another package brings it along. The figure itself is described by
:mod:`abdlab.plots.many_runs`, which needs none of them; plotly is imported when the
first runs are shown, since that takes about two seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as w

from abdlab.checkpoint import write_atomically
from abdlab.home import at_home
from abdlab.labels import FLOOR, TEACHER
from abdlab.plots.dark import INK
from abdlab.plots.many_runs import END, many_runs, views_of
from abdlab.plots.run_words import Shown, csv_of
from abdlab.runs import Run
from abdlab.widgets import looks

#: what stands beside students as level lines
_REFERENCES = (TEACHER, FLOOR)
#: folder below the root that tables go to
EXPORTS = "exports"
#: plotly's own buttons over the figure: none that sends anything anywhere
_CONFIG = {
    "displaylogo": False,
    "displayModeBar": True,
    "responsive": True,
    "modeBarButtons": [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    "toImageButtonOptions": {"format": "svg", "filename": "runs"},
}


class Fit(anywidget.AnyWidget):
    """Keeps the figure beside it as wide as the card that both are in. Draws nothing."""

    _esm = Path(__file__).parent / "fit.js"


class ManyRuns(w.VBox):
    """Any number of runs below ``root`` in one interactive figure.

    >>> import tempfile
    >>> figure = ManyRuns(tempfile.mkdtemp())
    >>> figure.show([])
    >>> figure.figure is None
    True

    Args:
        root: the folder of results.

    Attributes:
        figure: plotly's FigureWidget; None until runs are shown.
        shown: the runs that it shows.
    """

    def __init__(self, root: str | Path = "runs/walk"):
        self.root = at_home(root)
        self.shown: list[Shown] = []
        self.references: list[Shown] = []
        self.figure: Any = None
        self.trouble = looks.Trouble()
        beside = {"style": {"description_width": "auto"}}
        self.view = w.Dropdown(description="show", layout=w.Layout(width="250px"), **beside)
        self.smoothing = w.FloatSlider(
            0.0,
            min=0.0,
            max=0.98,
            step=0.02,
            description="smoothing",
            tooltip="weight of the moving average; hovering tells the value as measured",
            continuous_update=False,
            layout=w.Layout(width="260px"),
            **beside,
        )
        self.seeds = self._switch("one line per method, a band over its seeds", True)
        self.marked = self._switch("marks", True)
        self.log_x, self.log_y = self._switch("log x", False), self._switch("log y", False)
        self.note, self._fit = looks.said("", "quiet"), Fit()

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.csv = looks.button(
            "Save as CSV",
            heard(self.save_csv),
            "the histories of all runs shown, as measured, into one table",
        )
        self._controls = (self.view, self.smoothing, self.seeds, self.marked)
        self._controls += (self.log_x, self.log_y)
        head = looks.row(*self._controls, self.csv, align_items="center")
        self._card = looks.card("All chosen runs", head, self.note)
        super().__init__([self.trouble, self._card])
        for control in self._controls:
            control.observe(heard(self.draw), "value")
        looks.follow_theme(self, heard(self.draw))
        self._card.layout.display = "none"

    @staticmethod
    def _switch(text: str, on: bool) -> w.Checkbox:
        return w.Checkbox(on, description=text, indent=False, layout=w.Layout(width="auto"))

    def show(self, names: Sequence[str]) -> None:
        """Show these runs, by their folders relative to the root; those that have no
        history are left out.
        """
        found = [Shown.of(Run(self.root / name), name) for name in names]
        self.shown = [run for run in found if len(run.history)]
        beside = dict.fromkeys((self.root / run.name).parent for run in self.shown)
        places = [folder / label for folder in beside for label in _REFERENCES]
        self.references = [
            Shown.of(Run(place), str(place.relative_to(self.root)))
            for place in places
            if (place / "metrics.json").exists()
        ]
        chosen = {run.name for run in self.shown}
        self.references = [run for run in self.references if run.name not in chosen]
        self._card.layout.display = "" if self.shown else "none"
        if self.shown:
            views = views_of(self.shown)
            if list(self.view.options) != views:
                kept = self.view.value
                self.view.options = views
                self.view.value = kept if kept in views else views[0]
            self.draw()

    def draw(self) -> None:
        """Draw anew what is shown."""
        if not self.shown:
            return
        self.trouble.error = None
        self.log_x.disabled = self.smoothing.disabled = self.marked.disabled = False
        spec = many_runs(
            self.shown,
            self.references,
            view=self.view.value,
            seeds=self.seeds.value,
            smoothing=self.smoothing.value,
            log_x=self.log_x.value,
            log_y=self.log_y.value,
            marked=self.marked.value,
            ink=INK[looks.page().dark],
        )
        self.smoothing.disabled = self.marked.disabled = self.view.value == END
        from plotly.graph_objects import FigureWidget

        # a new one each time: what is sent to a figure whose script is still on its way to
        # the page is lost, and what comes after it too
        before, self.figure = self.figure, FigureWidget(spec)
        self.figure._config = {**self.figure._config, **_CONFIG}
        self._card.children = (*self._card.children[:2], self.figure, self._fit, self.note)
        if before is not None:
            before.close()
        looks.say(
            self.note,
            "Hover for exact values, drag to zoom, double-click to zoom out, click the legend to"
            " hide a run, and press the camera above the figure to save it as SVG. Marks: diamond,"
            " a weight was turned; triangle, a defense begins; square, one ends; ring, else.",
            "quiet",
        )

    def save_csv(self) -> Path:
        """Write the histories of the runs that are shown to ROOT/exports/runs-N.csv."""
        folder = self.root / EXPORTS
        taken = {path.name for path in folder.glob("runs-*.csv")} if folder.is_dir() else set()
        number = next(n for n in range(1, len(taken) + 2) if f"runs-{n}.csv" not in taken)
        path = folder / f"runs-{number}.csv"
        write_atomically(path, csv_of(self.shown).encode())
        looks.say(self.note, f"{len(self.shown)} histories saved to {path}.", "said")
        return path
