"""What a student learnt from, image by image: over training, by class, by score, on a
map; pick a tail and take it along.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
import traitlets as t

from abdlab import plots
from abdlab.checkpoint import CheckpointError, save_state, write_atomically
from abdlab.data import Dataset
from abdlab.home import at_home
from abdlab.inspection import MAPPED, Known, inspect_run, map_points
from abdlab.labels import FLOOR
from abdlab.plots.dark import INK
from abdlab.widgets import looks
from abdlab.widgets import sample_figures as figures
from abdlab.widgets.experiment import who

#: images on one page of the grid, and how many of them stand in a row
PAGE, COLUMNS = 48, 12
#: a cell of the grid, and the gap around it, in pixels
_SIDE, _GAP = 44, 4
ORDERS = {
    "suspicion score, lowest first": ("suspicion", 1),
    "teacher-student disagreement, largest first": ("disagreement", -1),
    "teacher's confidence, surest first": ("confidence", -1),
    "time": ("step", 1),
}
EMPTY = "No samples yet: run 02_distillation, or press Start in the defense tuner, then Refresh."
NO_MAP = (
    "Draw the map shows which images the teacher finds alike; what is selected here is selected"
    " there."
)


class SampleExplorer(w.VBox):
    """Explore the images that the students of the runs below ``root`` kept.

    >>> import tempfile
    >>> explorer = SampleExplorer(tempfile.mkdtemp())
    >>> len(explorer.table)  # no run yet
    0

    Args:
        root: the folder of results.
        device: where the networks run.

    Traits:
        selected: numbers of the selected images, rows of :attr:`table`.
        shown: numbers of the images on the grid's page, in their order.
        enlarged: the number of the image that is looked at; None: none.
    """

    selected = t.List(t.Int())
    shown = t.List(t.Int())
    enlarged = t.Int(None, allow_none=True)

    def __init__(self, root: str | Path = "runs/walk", device: str = "auto"):
        self.root, self.device = at_home(root), device
        self.known: Known | None = None
        self._datasets: dict[str, Dataset | None] = {}
        self._quiet, self._points, self._mapped = False, None, np.array([], int)
        self._boxes: dict[str, tuple[float, float, float, float]] = {}
        style, wide = {"description_width": "108px"}, w.Layout(width="340px")
        self.run = w.Dropdown(options=[], description="run", style=style, layout=wide)
        self.time = w.SelectionSlider(
            options=["-"], description="step", style=style, layout=wide, continuous_update=False
        )
        self.all_steps = w.Checkbox(
            False, description="all steps at once", indent=False, layout=w.Layout(width="150px")
        )
        self.label = w.Dropdown(
            options=[("all", -1)], description="teacher predicts", style=style, layout=wide
        )
        self.order = w.Dropdown(options=list(ORDERS), description="order", style=style, layout=wide)
        self.only = w.Checkbox(
            False, description="only the selection", indent=False, layout=w.Layout(width="150px")
        )
        self.page = w.BoundedIntText(
            1, min=1, max=1, description="page", style=style, layout=w.Layout(width="170px")
        )
        self.range = w.FloatRangeSlider(
            description="select scores",
            min=-12,
            max=2,
            step=0.01,
            style=style,
            layout=w.Layout(width="480px"),
            continuous_update=False,
        )
        self.trouble = looks.Trouble()

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.tail_button = looks.button(
            "Suspicious tail", heard(self.tail), "select what scores below mean - 3 std"
        )
        self.none_button = looks.button("Select none", heard(self.clear))
        self.map_button = looks.button(
            "Draw the map",
            heard(self.draw_map),
            "t-SNE of the teacher's last stage; takes some seconds",
        )
        self.refresh_button = looks.button("Refresh", heard(self.refresh), "look for runs again")
        self.export_button = looks.button(
            "Export the selection",
            heard(self.export),
            "images, numbers and a picture, into the run's folder",
            "primary",
        )
        self.grid = looks.Picture(
            picks="click", alt="images learnt from; click one, or walk with the arrow keys"
        )
        self.histogram = looks.Picture(
            picks="brush", alt="histogram of the suspicion scores; drag to select"
        )
        self.map = looks.Picture(
            picks="brush", alt="t-SNE map of the images; drag to select, click to enlarge"
        )
        self.detail = looks.Picture(
            alt="the image, its classes, the nearest real image and the activation"
        )
        self.note, self.empty = looks.said("", "quiet"), looks.said()
        self.said, self.who = looks.said("", "quiet"), looks.said("", "quiet")
        self.no_map = looks.said(NO_MAP, "empty")
        head = looks.row(self.run, self.refresh_button)
        choose = looks.row(
            self.time,
            self.all_steps,
            self.label,
            self.order,
            self.only,
            self.page,
            align_items="center",
        )
        tail = looks.row(self.tail_button, self.none_button, self.map_button, self.export_button)
        self._body = w.VBox(
            [
                looks.row(
                    looks.card("Images", self.grid, self.said, flex="0 1 620px", min_width="0"),
                    looks.card("One image", self.detail, flex="1 1 430px", min_width="0"),
                ),
                looks.row(
                    looks.card(
                        "Suspicion scores",
                        self.histogram,
                        self.range,
                        tail,
                        self.note,
                        flex="1 1 500px",
                        min_width="0",
                    ),
                    looks.card("Map", self.map, self.no_map, flex="1 1 430px", min_width="0"),
                ),
            ],
            layout=w.Layout(grid_gap="8px"),
        )
        super().__init__(
            [self.trouble, looks.card("Samples", head, self.who, choose, self.empty), self._body]
        )
        looks.dress(self)
        self.run.observe(heard(self._open), "value")
        for control in (self.time, self.all_steps, self.label, self.order, self.only):
            control.observe(heard(self._first_page), "value")
        self.page.observe(heard(self._grid), "value")
        self.range.observe(heard(self._from_range), "value")
        self.observe(heard(self._reselected), "selected")
        self.observe(heard(self._enlarge), "enlarged")
        self.grid.on_pick(self._on_grid)
        self.histogram.on_pick(self._on_histogram)
        self.map.on_pick(self._on_map)
        looks.follow_theme(self, heard(self._redraw))
        self.refresh()

    @property
    def table(self) -> pd.DataFrame:
        """One row per kept image: step, index in its batch, teacher's class, suspicion,
        disagreement (nats), confidence.
        """
        return pd.DataFrame() if self.known is None else self.known.table

    # --- opening a run

    def refresh(self) -> None:
        """Look for runs with samples again; where none is open, the newest that is no floor."""
        found = sorted(
            (p.parent for p in self.root.rglob("samples.safetensors")),
            key=lambda p: p.stat().st_mtime,
            reverse=True,
        )
        names = [
            str(p.relative_to(self.root))
            for p in found
            if (p / "config.json").exists() and p.parent.name.startswith("seed")
        ]
        kept = self.run.value
        opened = [n for n in names if not n.endswith(f"/{FLOOR}")] or names
        looks.say(self.empty, "" if names else EMPTY, "empty")
        self._body.layout.display = "" if names else "none"
        self._quiet = True
        self.run.options = names
        self.run.value = kept if kept in names else next(iter(opened), None)
        self._quiet = False
        self._open()

    def _open(self) -> None:
        if self._quiet or not self.run.value:
            return
        self.trouble.error = None
        try:
            self.known = inspect_run(self.root / self.run.value, self.device, self._datasets)
        except (CheckpointError, ValueError, OSError, RuntimeError, KeyError) as error:
            self.known, self.trouble.error = None, error
            return
        known, self._quiet = self.known, True
        looks.say(self.who, who(known.chosen, known.run.path.parents[1], known.data), "quiet")
        steps = sorted(known.table["step"].unique().tolist())
        self.time.options = steps
        self.time.value = steps[-1]
        classes = (
            known.data.classes
            if known.data is not None
            else [str(i) for i in range(known.logits["teacher"].shape[1])]
        )
        self.label.options = [("all", -1), *((c, i) for i, c in enumerate(classes))]
        self.label.value = -1
        low, high = known.table["suspicion"].min(), known.table["suspicion"].max()
        self.range.max = max(float(np.ceil(high * 100) / 100), self.range.min + 1)
        self.range.min = float(np.floor(low * 100) / 100)
        self.range.max = float(np.ceil(high * 100) / 100)
        self.range.value = (self.range.min, self.range.min)
        self._points, self._mapped, self.map.png = None, np.array([], int), b""
        self.no_map.layout.display = ""
        self.selected, self.enlarged, self._quiet = [], None, False
        self._first_page()
        self._histogram()
        if self.shown:
            self.enlarged = self.shown[0]

    # --- the grid and the image that is looked at

    def _first_page(self) -> None:
        if not self._quiet:
            self._quiet, self.page.value, self._quiet = True, 1, False
            self._grid()

    def _passing(self) -> pd.DataFrame:
        table = self.known.table
        if not self.all_steps.value:
            table = table[table["step"] == self.time.value]
        if self.label.value >= 0:
            table = table[table["class"] == self.label.value]
        if self.only.value:
            table = table[table.index.isin(self.selected)]
        column, sign = ORDERS[self.order.value]
        return table.sort_values(column, ascending=sign > 0, kind="stable")

    def _grid(self) -> None:
        if self._quiet or self.known is None:
            return
        passing = self._passing()
        self._quiet, self.page.max, self._quiet = True, max(1, -(-len(passing) // PAGE)), False
        begin = (self.page.value - 1) * PAGE
        self.shown = passing.index[begin : begin + PAGE].tolist()
        self._draw_grid()
        self._say(passing)
        self.time.disabled = self.all_steps.value

    def _say(self, passing: pd.DataFrame) -> None:
        text = (
            f"{len(passing)} images pass the filters, {len(self.selected)} selected"
            " (orange frames); the enlarged one has a blue frame."
        )
        if figures.column_is_missing(passing, ORDERS[self.order.value][0]):
            text = "This run has no student yet that could disagree. " + text
        looks.say(self.said, text, "quiet")

    def _draw_grid(self) -> None:
        chosen = set(self.selected)
        framed = [place for place, number in enumerate(self.shown) if number in chosen]
        marks = dict.fromkeys(framed, plots.ROLES["selected"])
        if self.enlarged in self.shown:
            marks[self.shown.index(self.enlarged)] = plots.ROLES["looked at"]
        self.grid.png = (
            looks.mosaic([self.known.images[self.shown]], COLUMNS, _SIDE, _GAP, marks)
            if self.shown
            else b""
        )

    def _on_grid(self, kind: str, at: list[float]) -> None:
        if not self.shown:
            return
        if kind == "key":
            place = self.shown.index(self.enlarged) if self.enlarged in self.shown else 0
            place += int(at[0]) + COLUMNS * int(at[1])
        else:
            lines = -(-len(self.shown) // COLUMNS)
            place = int(at[1] * lines * 0.9999) * COLUMNS + int(at[0] * COLUMNS * 0.9999)
        if 0 <= place < len(self.shown):
            self.enlarged = self.shown[place]

    def _enlarge(self) -> None:
        known, number = self.known, self.enlarged
        if self._quiet or known is None or number is None:
            return
        self._draw_grid()
        facts = known.table.loc[number]
        with looks.DRAWING:
            drawn = looks.figure(5.6, 4.6)
            figures.draw_detail(drawn, known, number, self._classes)
            self.detail.draw(drawn)
        parts = [
            f"suspicion {facts['suspicion']:.2f}",
            f"teacher's confidence {facts['confidence']:.1%}",
        ]
        if facts["disagreement"] == facts["disagreement"]:  # a run may have no student yet
            parts.append(f"disagreement {facts['disagreement']:.3g} nats")
        self.detail.alt = f"image {number}: " + ", ".join(parts)
        looks.say(self.said, self.detail.alt[0].upper() + self.detail.alt[1:] + ".", "quiet")

    # --- selecting

    def tail(self) -> None:
        """Select what scores below mean - 3 std of all kept images (the lowest 2 %
        where nothing does), and show it first.
        """
        if self.known is not None:
            self.order.value, self.all_steps.value = next(iter(ORDERS)), True
            scores = self.table["suspicion"]
            line = scores.mean() - 3 * scores.std(ddof=0)
            self._range_to(self.range.min, line if (scores < line).any() else scores.quantile(0.02))

    def clear(self) -> None:
        """Select nothing."""
        self.selected = []

    def _range_to(self, low: float, high: float) -> None:
        low, high = (min(max(v, self.range.min), self.range.max) for v in (low, high))
        self._quiet, self.range.value, self._quiet = True, (low, high), False
        self._from_range()

    def _from_range(self) -> None:
        if not self._quiet and self.known is not None:
            low, high = self.range.value
            scores = self.known.table["suspicion"]
            self.selected = (
                []
                if low == high
                else scores.index[(scores >= low - 0.005) & (scores <= high + 0.005)].tolist()
            )

    def _reselected(self) -> None:
        if self._quiet or self.known is None:
            return
        if self.only.value:
            self._first_page()
        else:
            self._draw_grid()
            self._say(self._passing())
        self._histogram()
        self._draw_map()

    def _on_histogram(self, kind: str, at: list[float]) -> None:
        if kind == "brush" and "histogram" in self._boxes:
            left, _, right, _ = self._boxes["histogram"]
            low, high = self._limits
            low, high = (low + (x - left) / (right - left) * (high - low) for x in (at[0], at[2]))
            self._range_to(low, high)
        elif kind == "click":
            self.clear()

    def _on_map(self, kind: str, at: list[float]) -> None:
        if self._points is None:
            return
        places = self._on_picture()
        if kind == "brush":
            inside = (places >= [at[0], at[1]]).all(1) & (places <= [at[2], at[3]]).all(1)
            self.selected = sorted(self._mapped[inside].tolist())
        elif kind == "click":
            self.enlarged = int(self._mapped[((places - at[:2]) ** 2).sum(1).argmin()])

    def _on_picture(self) -> np.ndarray:
        """Where the map's points are on its picture, as shares (N, 2)."""
        left, top, right, bottom = self._boxes["map"]
        x, y = ((self._points[:, i] - lo) / (hi - lo) for i, (lo, hi) in enumerate(self._extent))
        return np.stack([left + x * (right - left), bottom + y * (top - bottom)], 1)

    # --- the figures

    def _histogram(self) -> None:
        if self.known is None:
            return
        with looks.DRAWING:
            drawn = looks.figure(5.6, 3.8)
            ax = figures.draw_scores(drawn, self.known, self.selected)
            self.histogram.draw(drawn)
            self._boxes["histogram"], self._limits = figures.box_of(ax), ax.get_xlim()
        scores = self.known.table
        share = len(self.selected) / len(scores)
        looks.say(
            self.note,
            f"{len(self.selected)} of {len(scores)} images selected ({share:.1%}). Drag over"
            " the histogram, or move the range.",
            "quiet",
        )

    def draw_map(self) -> None:
        """Compute the t-SNE map, of at most 500 images evenly chosen over training, and
        show it.
        """
        if self.known is None:
            return
        self.map_button.disabled, self.no_map.layout.display = True, ""
        count = min(len(self.table), MAPPED)
        looks.wait(self.no_map, f"t-SNE of {count} images, in seconds on a laptop")
        try:
            self._mapped, self._points = map_points(self.known)
            self._draw_map()
        except ValueError as error:
            self.trouble.error = error
        finally:
            self.map_button.disabled = False
            looks.say(self.no_map, NO_MAP, "empty")

    def _draw_map(self) -> None:
        if self._points is None:
            return
        with looks.DRAWING:
            drawn = looks.figure(5.6, 4.2)
            ink, what = INK[looks.page().dark], (self._mapped, self._points)
            ax = figures.draw_map(drawn, self.known, *what, self.selected, self._classes, ink)
            self.map.draw(drawn)
            self._boxes["map"], self._extent = figures.box_of(ax), (ax.get_xlim(), ax.get_ylim())
        self.no_map.layout.display = "none"

    @property
    def _classes(self) -> list[str]:
        return [text for text, value in self.label.options if value >= 0]

    def _redraw(self) -> None:
        self._histogram()
        self._draw_map()
        self._enlarge()

    # --- taking it along

    def export(self) -> Path | None:
        """Write the selection into the run's folder, as selections/N:
        images.safetensors, numbers.csv, picture.png.
        """
        if self.known is None or not self.selected:
            self.trouble.error = "nothing is selected: drag over the histogram or the map first"
            return None
        self.trouble.error = None
        numbers, base = sorted(self.selected), self.known.run.file("selections")
        taken = [int(p.name) for p in base.glob("*") if p.name.isdigit()] if base.is_dir() else []
        folder = base / str(max(taken, default=0) + 1)
        images, table = self.known.images[numbers], self.known.table.loc[numbers]
        save_state(
            folder / "images.safetensors",
            {"images": images},
            {"run": self.run.value, "numbers": numbers},
        )
        text = io.StringIO()
        table.to_csv(text, index_label="number")
        write_atomically(folder / "numbers.csv", text.getvalue().encode())
        write_atomically(folder / "picture.png", looks.mosaic([images], min(16, len(numbers)), 64))
        looks.say(self.note, f"{len(numbers)} images exported to {folder}.", "said")
        return folder
