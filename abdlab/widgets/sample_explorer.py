"""What a student learnt from, image by image: over training, by class, by score, on a
map; pick a tail and take it along.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd
import torch
import traitlets as t
from torch import Tensor, nn

from abdlab import plots
from abdlab.activations import convolutions, spatial_map, tsne
from abdlab.checkpoint import CheckpointError, load_model, load_state, save_state, write_atomically
from abdlab.data import Dataset
from abdlab.defenses import suspicion
from abdlab.evaluate import predict
from abdlab.home import at_home
from abdlab.inspection import vaccine_of
from abdlab.labels import name_of
from abdlab.losses import kl
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.widgets import looks

#: images on one page of the grid, and how many of them stand in a row
PAGE, COLUMNS = 48, 12
#: a cell of the grid, and the gap around it, in pixels
_SIDE, _GAP = 44, 4
#: images that the map shows at most, and real images among which the nearest one is
#: sought
_MAPPED, _REAL = 500, 5000
ORDERS = {
    "suspicion score, lowest first": ("suspicion", 1),
    "teacher-student disagreement, largest first": ("disagreement", -1),
    "teacher's confidence, surest first": ("confidence", -1),
    "time": ("step", 1),
}
EMPTY = "No samples yet: run 02_distillation, or press Start in the defence tuner, then Refresh."


@dataclass
class _Known:
    """All that is known of one run's images."""

    run: Run
    label: str
    chosen: Settings
    data: Dataset | None
    teacher: nn.Module
    vaccine: Any
    student: nn.Module | None
    images: Tensor
    # one row per image: step, index, class, suspicion, disagreement, confidence
    table: pd.DataFrame
    logits: dict[str, Tensor]
    reverse: bool  # whether suspicion is that of KL(T || T~)


class SampleExplorer(w.VBox):
    """Explore the synthetic images that the runs below ``root`` kept.

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
        self.known: _Known | None = None
        self._datasets: dict[str, Dataset | None] = {}
        self._quiet, self._points, self._mapped = False, None, np.array([], int)
        self._boxes: dict[str, tuple[float, float, float, float]] = {}
        style, wide = {"description_width": "90px"}, w.Layout(width="330px")
        self.run = w.Dropdown(options=[], description="run", style=style, layout=wide)
        self.time = w.SelectionSlider(
            options=["-"], description="step", style=style, layout=wide, continuous_update=False
        )
        self.all_steps = w.Checkbox(
            False, description="all steps at once", indent=False, layout=w.Layout(width="150px")
        )
        self.label = w.Dropdown(
            options=[("all", -1)], description="teacher says", style=style, layout=wide
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
        self.tail_button = looks.button(
            "Suspicious tail", self.tail, "select what scores below mean - 3 std"
        )
        self.none_button = looks.button("Select none", self.clear)
        self.map_button = looks.button(
            "Draw the map", self.draw_map, "t-SNE of the teacher's last stage; takes some seconds"
        )
        self.refresh_button = looks.button("Refresh", self.refresh, "look for runs again")
        self.export_button = looks.button(
            "Export the selection",
            self.export,
            "images, numbers and a picture, into the run's folder",
            "primary",
        )
        self.grid = looks.Picture(
            picks="click", alt="synthetic images; click one, or walk with the arrow keys"
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
        self.trouble, self.note, self.empty = looks.Trouble(), looks.said("", "quiet"), looks.said()
        self.said = looks.said("", "quiet")
        self.no_map = looks.said(
            "Draw the map shows which images the teacher finds alike; what is selected here is"
            " selected there.",
            "empty",
        )
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
            [self.trouble, looks.card("Samples", head, choose, self.empty), self._body]
        )
        looks.dress(self)
        self.run.observe(lambda _: self._open(), "value")
        for control in (self.time, self.all_steps, self.label, self.order, self.only):
            control.observe(lambda _: self._first_page(), "value")
        self.page.observe(lambda _: self._grid(), "value")
        self.range.observe(lambda _: self._from_range(), "value")
        self.observe(lambda _: self._reselected(), "selected")
        self.observe(lambda _: self._enlarge(), "enlarged")
        self.grid.on_pick(self._on_grid)
        self.histogram.on_pick(self._on_histogram)
        self.map.on_pick(self._on_map)
        looks.page().observe(lambda _: self._redraw(), "dark")
        self.refresh()

    @property
    def table(self) -> pd.DataFrame:
        """One row per kept image: step, index in its batch, teacher's class, suspicion,
        disagreement (nats), confidence.
        """
        return pd.DataFrame() if self.known is None else self.known.table

    # --- opening a run

    def refresh(self) -> None:
        """Look for runs with samples again; the newest is opened when none is open."""
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
        looks.say(self.empty, "" if names else EMPTY, "empty")
        self._body.layout.display = "" if names else "none"
        self._quiet = True
        self.run.options = names
        self.run.value = kept if kept in names else (names[0] if names else None)
        self._quiet = False
        self._open()

    def _open(self) -> None:
        if self._quiet or not self.run.value:
            return
        self.trouble.error = None
        try:
            self.known = self._know(self.root / self.run.value)
        except (CheckpointError, ValueError, OSError, RuntimeError, KeyError) as error:
            self.known, self.trouble.error = None, error
            return
        known, self._quiet = self.known, True
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

    def _know(self, folder: Path) -> _Known:
        run = Run(folder)
        chosen = Settings.of(run.config, self.device)
        label = folder.name.partition("@")[0]
        data = self._dataset(chosen)
        where = data.train_images.device if data is not None else "cpu"
        teacher = load_model(folder.parent / "teacher" / "teacher.safetensors", device=where)
        vaccine, reverse = vaccine_of(run, chosen, teacher), chosen.defenses("sv")[0].reverse
        student, samples = self._student(run, chosen, data), run.samples()
        images = torch.cat([samples[step] for step in sorted(samples)]).to(where)
        steps = [step for step in sorted(samples) for _ in samples[step]]
        logits = {"teacher": predict(teacher, images).cpu()}
        with torch.no_grad():
            logits["vaccine"] = torch.cat([vaccine(part) for part in images.split(500)]).cpu()
        if student is not None:
            logits["student"] = predict(student, images).cpu()
        sure, said = logits["teacher"].softmax(1).max(1)
        other = (
            kl(logits["teacher"], logits["student"])
            if student is not None
            else torch.full((len(images),), float("nan"))
        )
        table = pd.DataFrame(
            {
                "step": steps,
                "index": [i for step in sorted(samples) for i in range(len(samples[step]))],
                "class": said.tolist(),
                "suspicion": suspicion(vaccine, teacher, images, reverse=reverse).cpu().tolist(),
                "disagreement": other.tolist(),
                "confidence": sure.tolist(),
            }
        )
        return _Known(
            run, label, chosen, data, teacher, vaccine, student, images, table, logits, reverse
        )

    def _dataset(self, chosen: Settings) -> Dataset | None:
        """The data set where it is at hand; nothing is downloaded for looking."""
        key = json.dumps(chosen.values["data"], sort_keys=True)
        if key not in self._datasets:
            try:
                self._datasets[key] = chosen.dataset()
            except (ValueError, OSError, RuntimeError):
                self._datasets[key] = None
        return self._datasets[key]

    @staticmethod
    def _student(run: Run, chosen: Settings, data: Dataset | None) -> nn.Module | None:
        where = data.train_images.device if data is not None else "cpu"
        if run.file("student.safetensors").exists():
            return load_model(run.file("student.safetensors"), device=where)
        if data is None or not run.file("checkpoint.safetensors").exists():
            return None
        student = chosen.student(data).to(where)
        student.load_state_dict(load_state(run.file("checkpoint.safetensors"), where)[0]["student"])
        return student.eval()

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
        text = (
            f"{len(passing)} images pass the filters, {len(self.selected)} are selected (orange"
            " frames); the enlarged one has a blue frame."
        )
        if column_is_missing(passing, ORDERS[self.order.value][0]):
            text = "This run has no student yet that could disagree. " + text
        looks.say(self.said, text, "quiet")
        self.time.disabled = self.all_steps.value

    def _draw_grid(self) -> None:
        chosen = set(self.selected)
        marks = {
            place: plots.COLORS["sr"] for place, number in enumerate(self.shown) if number in chosen
        }
        if self.enlarged in self.shown:
            marks[self.shown.index(self.enlarged)] = plots.COLORS["sv"]
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
        facts, image = known.table.loc[number], known.images[number]
        layer = (
            known.teacher.stages[-2]
            if len(getattr(known.teacher, "stages", ())) > 1
            else convolutions(known.teacher)[-1]
        )
        heat = spatial_map(known.teacher, image[None], layer)[0]
        classes = [text for text, value in self.label.options if value >= 0]
        with looks.DRAWING:
            drawn = looks.figure(5.6, 4.6)
            axes = drawn.subplot_mosaic(
                [["image", "heat", "real"], ["bars", "bars", "bars"]], height_ratios=[1, 1.05]
            )
            plots.show(
                axes["image"], image, f"step {facts['step']:.0f}, image {facts['index']:.0f}"
            )
            plots.show(axes["heat"], image, f"activation, {layer}")
            height, width = image.shape[-2:]
            axes["heat"].imshow(
                heat.numpy(),
                cmap="inferno",
                alpha=0.6,
                vmin=0,
                vmax=1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
            self._nearest(axes["real"], image)
            self._bars(axes["bars"], number, classes)
            self.detail.draw(drawn)
        parts = [
            f"suspicion {facts['suspicion']:.2f}",
            f"teacher's confidence {facts['confidence']:.1%}",
        ]
        parts += (
            [f"disagreement {facts['disagreement']:.3g} nats"]
            if facts["disagreement"] == facts["disagreement"]
            else []
        )
        self.detail.alt = f"image {number}: " + ", ".join(parts)
        looks.say(self.said, self.detail.alt[0].upper() + self.detail.alt[1:] + ".", "quiet")

    def _nearest(self, ax, image: Tensor) -> None:
        if self.known.data is None:
            ax.axis("off")
            ax.text(
                0.5, 0.5, "no real data\nat hand", ha="center", va="center", fontsize=9, color="0.5"
            )
            return
        real = self.known.data.train_images[:_REAL]
        found = int((real - image.clamp(0, 1)).flatten(1).norm(dim=1).argmin())
        plots.show(
            ax,
            real[found],
            f"nearest real: {self.known.data.classes[int(self.known.data.train_labels[found])]}",
        )

    def _bars(self, ax, number: int, classes: list[str]) -> None:
        names = {
            "teacher": "teacher",
            "vaccine": "shuffled teacher",
            "student": name_of(self.known.label),
        }
        colors = {
            "teacher": "#8c8c8c",
            "vaccine": plots.COLORS["sv"],
            "student": plots.color_of(self.known.label),
        }
        if colors["student"] == colors["vaccine"]:
            colors["vaccine"] = "#56b4e9"
        share = {kind: values[number].softmax(0) for kind, values in self.known.logits.items()}
        # of many classes, the ten that any of the three gives most
        best = sorted(
            torch.stack([*share.values()]).amax(0).topk(min(10, len(classes))).indices.tolist()
        )
        for i, (kind, values) in enumerate(share.items()):
            places = np.arange(len(best)) + (i - (len(share) - 1) / 2) * 0.27
            ax.bar(
                places,
                [100 * values[c].item() for c in best],
                0.25,
                color=colors[kind],
                label=names[kind],
            )
        ax.set(xticks=range(len(best)), ylim=(0, 103), ylabel="probability (%)")
        ax.set_xticklabels([classes[c] for c in best], fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    # --- selecting

    def tail(self) -> None:
        """Select what scores below mean - 3 std of all kept images (the lowest 2 %
        where nothing does), and show it first.
        """
        if self.known is not None:
            self.order.value, self.all_steps.value = next(iter(ORDERS)), True
            scores = self.known.table["suspicion"]
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
        scores = self.known.table["suspicion"]
        with looks.DRAWING:
            drawn = looks.figure(5.6, 3.8)
            ax = drawn.subplots()
            plots.suspicion_histogram(
                torch.tensor(scores.to_numpy()), ax=ax, reverse=self.known.reverse
            )
            if self.selected:
                bins = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 60)
                width, chosen = bins[1] - bins[0], scores.loc[self.selected]
                weights = np.full(len(chosen), 1 / (len(scores) * width))
                ax.hist(
                    chosen,
                    bins,
                    weights=weights,
                    color=plots.COLORS["sr"],
                    label=f"selected (n = {len(chosen)})",
                )
                ax.legend(
                    fontsize=8,
                    frameon=False,
                    loc="lower center",
                    bbox_to_anchor=(0.5, 1.0),
                    ncols=2,
                )
            self.histogram.draw(drawn)
            self._boxes["histogram"], self._limits = _box(drawn, ax), ax.get_xlim()
        share = len(self.selected) / len(scores)
        looks.say(
            self.note,
            f"{len(self.selected)} of {len(scores)} images are selected ({share:.1%}). Drag over"
            " the histogram, or move the range.",
            "quiet",
        )

    def draw_map(self) -> None:
        """Compute the t-SNE map, of at most 500 images evenly chosen over training, and
        show it.
        """
        if self.known is None:
            return
        count = len(self.known.table)
        if count < 8:
            self.trouble.error = "a map needs at least 8 images"
            return
        self.map_button.disabled, self.map_button.description = True, "Drawing..."
        try:
            self._mapped = np.unique(
                np.linspace(0, count - 1, min(count, _MAPPED)).round().astype(int)
            )
            stages = getattr(self.known.teacher, "stages", ())
            layer = stages[-1] if stages else convolutions(self.known.teacher)[-1]
            self._points = tsne(
                self.known.teacher,
                layer,
                self.known.images[self._mapped],
                seed=self.known.chosen.seed,
            )
            self._draw_map()
        finally:
            self.map_button.disabled, self.map_button.description = False, "Draw the map"

    def _draw_map(self) -> None:
        if self._points is None:
            return
        table, classes = (
            self.known.table.loc[self._mapped],
            [text for text, value in self.label.options if value >= 0],
        )
        with looks.DRAWING:
            drawn = looks.figure(5.6, 4.2)
            ax = drawn.subplots()
            groups = ["selected" if n in set(self.selected) else "synthetic" for n in self._mapped]
            colors = plots.class_colors(len(classes))
            for group, size, edge in (
                ("synthetic", 16, "none"),
                ("selected", 46, looks.INK[looks.page().dark]),
            ):
                inside = np.array([g == group for g in groups])
                ax.scatter(
                    *self._points[inside].T,
                    s=size,
                    c=[colors[c] for c in table["class"][inside]],
                    edgecolors=edge,
                    linewidths=1.4,
                )
            for i, name in enumerate(classes):
                if (table["class"] == i).any() and len(classes) <= 12:
                    ax.scatter([], [], s=16, color=colors[i], label=name)
            ax.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
            ax.legend(
                fontsize=8,
                frameon=False,
                bbox_to_anchor=(1.0, 1.0),
                loc="upper left",
                title="teacher says",
                title_fontsize=8,
            )
            ax.spines[["top", "right"]].set_visible(False)
            self.map.draw(drawn)
            self.no_map.layout.display = "none"
            self._boxes["map"], self._extent = _box(drawn, ax), (ax.get_xlim(), ax.get_ylim())

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


def column_is_missing(table: pd.DataFrame, column: str) -> bool:
    """Whether a column says nothing about these images."""
    return bool(len(table)) and bool(table[column].isna().all())


def _box(figure, ax) -> tuple[float, float, float, float]:
    """Where the axes are on the drawn picture: left, top, right, bottom as shares."""
    box = ax.get_position()
    return box.x0, 1 - box.y1, box.x1, 1 - box.y0
