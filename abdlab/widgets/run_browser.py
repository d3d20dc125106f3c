"""The runs below a folder: a table with filters, two of them side by side, their
figures, and deletion.
"""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd

from abdlab.home import at_home
from abdlab.labels import Label, in_order, name_of
from abdlab.plots import color_of, loss_curves, training_curves
from abdlab.runs import Run
from abdlab.threads import mixed
from abdlab.widgets import looks
from abdlab.widgets.branches import method_of
from abdlab.widgets.worker import current

_COLUMNS = ["run", "method", "seed", "ACC (%)", "ASR (%)", "state", "seconds", "threads"]
EMPTY = "No runs yet: run 01_poisoning, or press Start in the defense tuner."


def runs_below(root: str | Path) -> list[dict[str, Any]]:
    """Every run below a folder, finished or not: run (its folder, relative), label,
    seed, acc, asr, state, seconds, threads.

    acc, asr (shares in [0, 1]), seconds and threads are None where metrics.json has no
    number there; label is "" where it names no method (a notebook's own folder).
    """
    found = []
    root = at_home(root)
    folders = (
        {path.parent for name in ("config.json", "metrics.json") for path in root.rglob(name)}
        if root.is_dir()
        else set()
    )
    for folder in sorted(folders - {root}):
        metrics, beside = _metrics(folder), folder.parent.name
        inside = beside.startswith("seed") and beside[4:].isdigit()
        seed = metrics.get("seed", int(beside[4:]) if inside else None)
        if "stopped_at" in metrics:
            state = f"stopped at {metrics['stopped_at']} of {metrics.get('length', '?')}"
        elif metrics:
            state = "done"
        else:
            state = "unfinished" if (folder / "history.jsonl").exists() else "begun"
        label = metrics.get("label") or (method_of(folder.name) if inside else "")
        values = {key: number(metrics.get(key)) for key in ("acc", "asr", "seconds", "threads")}
        found.append(
            {
                "run": str(folder.relative_to(root)),
                "label": _label(label),
                "seed": seed,
                "state": state,
                **values,
            }
        )
    return found


def number(value: Any) -> float | None:
    """A number as it is, and None for what is none: notebooks keep dicts and lists of
    scores under the same names.

    >>> number(0.5), number({"zskt": 0.9}), number(float("nan")), number(True)
    (0.5, None, None, None)
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if fits and math.isfinite(value) else None


def _metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json holds; nothing where it is damaged, or no mapping."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _label(text: Any) -> str:
    """A method's label; "" for what is none."""
    try:
        return str(text) if text == "clean_teacher" else str(Label.parse(text))
    except ValueError:
        return ""


class RunBrowser(w.VBox):
    """Browse the runs below ``root``: choose one or two to see them side by side.

    >>> import tempfile
    >>> RunBrowser(tempfile.mkdtemp()).found
    []

    Args:
        root: the folder of results.

    ``rows.chosen`` holds the (at most two) runs that are shown side by side, by their
    folders relative to ``root``.
    """

    def __init__(self, root: str | Path = "runs/walk"):
        self.root = at_home(root)
        self.found: list[dict[str, Any]] = []
        layout = w.Layout(width="230px")
        self.text = w.Text(
            placeholder="part of its name",
            description="run",
            layout=layout,
            style={"description_width": "56px"},
        )
        self.method = w.Dropdown(
            options=["all"],
            description="method",
            layout=layout,
            style={"description_width": "56px"},
        )
        self.least_acc = w.IntSlider(
            0,
            0,
            100,
            description="ACC at least",
            layout=w.Layout(width="290px"),
            style={"description_width": "90px"},
        )
        self.most_asr = w.IntSlider(
            100,
            0,
            100,
            description="ASR at most",
            layout=w.Layout(width="290px"),
            style={"description_width": "90px"},
        )
        self.rows, self.trouble = looks.Rows(columns=_COLUMNS), looks.Trouble()

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.refresh_button = looks.button("Refresh", heard(self.refresh), "look for runs again")
        self.delete_button = looks.button(
            "Delete...",
            heard(self.ask),
            "delete the chosen runs that the table shows, after asking",
        )
        self.yes = looks.button("Yes, delete", heard(self.delete), style="danger")
        self.no = looks.button("Keep", heard(self.keep))
        self._asked, self._question = [], looks.said()
        self.question = looks.row(
            self._question, self.yes, self.no, align_items="center", display="none"
        )
        self.note, self.sides = (
            looks.said("", "quiet"),
            w.HBox(layout=w.Layout(grid_gap="8px", align_items="stretch")),
        )
        head = looks.row(
            self.text,
            self.method,
            self.least_acc,
            self.most_asr,
            self.refresh_button,
            self.delete_button,
        )
        super().__init__(
            [
                self.trouble,
                looks.card("Runs", head, self.question, self.rows, self.note),
                self.sides,
            ]
        )
        looks.dress(self)
        for control in (self.text, self.method, self.least_acc, self.most_asr):
            control.observe(heard(self._filter), "value")
        self.rows.observe(heard(self._show_sides), "chosen")
        looks.page().observe(heard(self._show_sides), "dark")
        heard(self.refresh)()

    def refresh(self) -> None:
        """Look for runs again."""
        self.found = runs_below(self.root)
        methods = in_order([r["label"] for r in self.found if r["label"]])
        options = [("all", "all"), *((name_of(m), m) for m in methods)]
        if list(self.method.options) != options:
            kept = self.method.value
            self.method.options = options
            self.method.value = kept if kept in methods else "all"
        self.rows.chosen = [c for c in self.rows.chosen if c in {r["run"] for r in self.found}]
        self._filter()

    def ask(self) -> None:
        """Ask whether the chosen runs shall go; those that the filters hide stay."""
        shown = {row["id"] for row in self.rows.rows}
        self._asked = [name for name in self.rows.chosen if name in shown]
        if not self._asked:
            hidden = f": the filters hide {' and '.join(self.rows.chosen)}"
            self.trouble.error = "choose a run in the table first" + (
                hidden if self.rows.chosen else ""
            )
            return
        self.trouble.error = None
        students = [r["run"] for r in self.found if r["run"] not in self._asked]
        lost = [
            s
            for s in students
            if any(
                Path(a).name == "teacher" and Path(s).parent == Path(a).parent for a in self._asked
            )
        ]
        more = (
            f" {len(lost)} students of this teacher stay, but can no longer be inspected."
            if lost
            else ""
        )
        looks.say(self._question, f"Delete {' and '.join(self._asked)} with all files?{more}")
        self.question.layout.display = ""

    def keep(self) -> None:
        """Do not delete."""
        self._asked, self.question.layout.display = [], "none"

    def delete(self) -> None:
        """Delete what was asked about. A link, a folder outside the root, and the run
        under way stay.
        """
        asked = list(self._asked)
        self.keep()
        for name in asked:
            folder = self.root / name
            if current() is not None and getattr(current(), "folder", None) in (folder, None):
                self.trouble.error = f"{name} may be training now: stop the run first"
                return
            if folder.is_symlink() or self.root.resolve() not in folder.resolve().parents:
                self.trouble.error = (
                    f"{name} is a link or lies outside {self.root}: delete it by hand"
                )
                return
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self.trouble.error = f"{name} cannot be deleted: {error.strerror or error}"
                return
        self.refresh()

    def _filter(self) -> None:
        self.keep()  # a question about what is no longer in sight is withdrawn
        shown = []
        for r in self.found:
            scored = r["acc"] is None or 100 * r["acc"] >= self.least_acc.value
            scored &= r["asr"] is None or 100 * r["asr"] <= self.most_asr.value
            if (
                self.text.value.strip() in r["run"]
                and self.method.value in ("all", r["label"])
                and scored
            ):
                shown.append(r)
        self.rows.rows = [
            {
                "id": r["run"],
                "color": color_of(r["label"]) if r["label"] else "",
                "cells": [
                    r["run"],
                    name_of(r["label"]) if r["label"] else "notebook",
                    "" if r["seed"] is None else str(r["seed"]),
                    "" if r["acc"] is None else f"{100 * r['acc']:.1f}",
                    "" if r["asr"] is None else f"{100 * r['asr']:.1f}",
                    r["state"],
                    "" if r["seconds"] is None else f"{r['seconds']:.0f}",
                    "" if r["threads"] is None else f"{r['threads']:.0f}",
                ],
            }
            for r in shown
        ]
        if not self.found:
            looks.say(self.note, EMPTY, "empty")
        elif not shown:
            looks.say(self.note, f"None of the {len(self.found)} runs passes the filters.", "empty")
        else:
            looks.say(
                self.note,
                f"{len(shown)} of {len(self.found)} runs. Choose one or two rows to see them side"
                f" by side. {mixed(r['threads'] for r in shown if r['acc'] is not None)}".rstrip(),
                "quiet",
            )
        self.rows.layout.display = "" if shown else "none"

    def _show_sides(self) -> None:
        chosen = [c for c in self.rows.chosen if (self.root / c).is_dir()]
        runs = [Run(self.root / c) for c in chosen]
        configs = [_flat(run.config) for run in runs]
        differ = (
            {
                k
                for k in {k for c in configs for k in c}
                if len({json.dumps(c.get(k)) for c in configs}) > 1
            }
            if len(runs) == 2
            else set()
        )
        self.sides.children = tuple(
            self._side(c, run, flat, differ)
            for c, run, flat in zip(chosen, runs, configs, strict=True)
        )

    def _side(self, name: str, run: Run, flat: dict, differ: set[str]) -> w.VBox:
        facts = next((r for r in self.found if r["run"] == name), {})
        parts: list[w.Widget] = [
            w.HTML(
                looks.scores(
                    [
                        ("ACC", looks.percent(facts.get("acc"))),
                        ("ASR", looks.percent(facts.get("asr"))),
                    ]
                )
            )
        ]
        parts.append(looks.said(facts.get("state", ""), "quiet"))
        history = run.history()
        if len(history) and "acc" in history:
            parts.append(self._curves(history))
        for path in sorted((run.path / "figures").glob("*.png")):
            parts += [
                looks.said(path.stem.replace("_", " "), "quiet"),
                looks.Picture(png=path.read_bytes(), width=520, alt=path.stem),
            ]
        if samples := run.samples():
            last = max(samples)
            parts += [
                looks.said(f"what the student learnt from at step {last}", "quiet"),
                looks.Picture(
                    png=looks.mosaic([samples[last][:32]], 16, side=30, gap=2),
                    alt="synthetic images",
                ),
            ]
        wanted = sorted(differ) if differ else []
        if wanted:
            lines = "".join(
                f"<div>{html.escape(k)}: <b>{html.escape(_short(flat.get(k)))}</b></div>"
                for k in wanted
            )
            parts.append(w.HTML(f'<div class="abdlab-said">Settings that differ:{lines}</div>'))
        elif flat:
            lines = "\n".join(f"{k}: {_short(v)}" for k, v in flat.items())
            parts.append(
                w.HTML(
                    "<details class='abdlab-quiet'><summary>settings</summary>"
                    f"<pre>{html.escape(lines)}</pre></details>"
                )
            )
        return looks.card(name, *parts, flex="1 1 0", min_width="0")

    def _curves(self, history: pd.DataFrame) -> looks.Picture:
        shown = looks.Picture(alt="ACC, ASR and losses over training")
        with looks.DRAWING:
            drawn = looks.figure(5.4, 4.6)
            above, below = drawn.subplots(2, 1)
            training_curves(
                history,
                above,
                step="epoch" if history["label"].iloc[0] == "teacher" else "pseudo-batch",
            )
            loss_curves(history, below)
            shown.draw(drawn)
        return shown


def _flat(config: dict) -> dict[str, Any]:
    flat = {}
    for section, values in config.items():
        flat |= (
            {f"{section}.{k}": v for k, v in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    return flat


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:70]}..."
