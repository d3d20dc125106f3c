"""The runs below a folder: a table with filters, the chosen ones in one figure, two of
them side by side, what to do with one, and deletion.
"""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd

from abdlab.attacks.poison import RELABEL
from abdlab.home import at_home
from abdlab.labels import in_order, name_of
from abdlab.plots import confusion_figure, loss_curves, training_curves
from abdlab.plots.run_words import differing, flat, spoken
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.threads import mixed
from abdlab.widgets import looks
from abdlab.widgets.branches import NOTEBOOK, method_of, parameters_of
from abdlab.widgets.found_runs import COLUMNS, notes_of, row_of, runs_below, save_notes
from abdlab.widgets.many_runs import ManyRuns
from abdlab.widgets.worker import current

EMPTY = "No runs yet: run 01_poisoning, or press Start in the defense tuner."
#: runs that are shown with all that they have, side by side
_SIDES = 2


class RunBrowser(w.VBox):
    """Browse the runs below ``root``: choose any number to see them in one figure.

    >>> import tempfile
    >>> RunBrowser(tempfile.mkdtemp()).found
    []

    Args:
        root: the folder of results.

    ``rows.chosen`` holds the runs that are shown, by their folders relative to ``root``.
    The latest two of them stand side by side, with their pictures, settings and notes.
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
        self.rows, self.trouble = looks.Rows(columns=[*COLUMNS], most=0), looks.Trouble()
        self.many, self._take = ManyRuns(self.root), None

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.refresh_button = looks.button("Refresh", heard(self.refresh), "look for runs again")
        self.delete_button = looks.button(
            "Delete...",
            heard(self.ask),
            "delete the chosen runs that the table shows, after asking",
        )
        self.take_button = looks.button(
            "Continue in the tuner",
            heard(self.take),
            "go on with the run that was chosen last, or begin one with its settings",
        )
        self.take_button.layout.display = "none"
        self.copy_button = looks.button(
            "Copy as parameters",
            heard(self.copy),
            "parameters for papermill that repeat the run that was chosen last",
        )
        self.copied, self._copied_note = looks.Copyable(), looks.said("", "quiet")
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
            self.take_button,
            self.copy_button,
        )
        copied = (self._copied_note, self.copied)
        super().__init__(
            [
                self.trouble,
                looks.card("Runs", head, self.question, self.rows, self.note, *copied),
                self.many,
                self.sides,
            ]
        )
        looks.dress(self)
        for control in (self.text, self.method, self.least_acc, self.most_asr):
            control.observe(heard(self._filter), "value")
        self.rows.observe(heard(self._show_sides), "chosen")
        looks.follow_theme(self, heard(self._show_sides))
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
        self.rows.rows = [row_of(r) for r in shown]
        if not self.found:
            looks.say(self.note, EMPTY, "empty")
        elif not shown:
            looks.say(self.note, f"None of the {len(self.found)} runs passes the filters.", "empty")
        else:
            threads = mixed(r["threads"] for r in shown if r["acc"] is not None)
            looks.say(
                self.note,
                f"{len(shown)} of {len(self.found)} runs. Choose any number of rows to see them in"
                f" one figure. {threads}".rstrip(),
                "quiet",
            )
        self.rows.layout.display = "" if shown else "none"

    def on_take(self, take: Callable[[Path], Any]) -> None:
        """Offer to continue runs elsewhere: ``take(folder)`` is then called."""
        self._take, self.take_button.layout.display = take, ""

    def take(self) -> None:
        """Hand the run that was chosen last on, as :meth:`on_take` says."""
        folder = self._latest()
        self.trouble.error = None
        if self._take is not None:
            self._take(folder)

    def copy(self) -> str:
        """Show the parameters that repeat the run that was chosen last; returns them as
        YAML.

        Raises:
            ValueError: for a folder that is no student's run, or has no settings.
        """
        folder = self._latest()
        run = Run(folder)
        label = next(r["label"] for r in self.found if self.root / r["run"] == folder)
        if label != method_of(folder.name) or label.endswith("teacher") or not run.config:
            raise ValueError(
                f"{folder.name} is no student's run with settings: choose one whose method is a"
                " source and its defenses"
            )
        self.trouble.error = None
        self.copied.text = parameters_of(run, Settings.of(run.config), self.root / "repeated")
        looks.say(
            self._copied_note,
            f"{self.rows.chosen[-1]}: save as parameters.yaml, then papermill {NOTEBOOK}.ipynb"
            " out.ipynb -f parameters.yaml",
            "quiet",
        )
        return self.copied.text

    def _latest(self) -> Path:
        """The run that was chosen last."""
        if not self.rows.chosen:
            raise ValueError("choose a run in the table first")
        return self.root / self.rows.chosen[-1]

    def _show_sides(self) -> None:
        chosen = [c for c in self.rows.chosen if (self.root / c).is_dir()]
        self.copied.text = ""
        looks.say(self._copied_note, "")
        runs = [Run(self.root / c) for c in chosen]
        configs = [run.config for run in runs]
        apart = differing(configs)
        labels = [r["label"] for c in chosen for r in self.found if r["run"] == c]
        if len({*labels}) > 1:  # the methods' own sections are in their names
            named = [name_of(label) if label else "notebook" for label in labels]
            apart = [
                {"method": name, **own} if config else {}
                for name, own, config in zip(named, apart, configs, strict=True)
            ]
        self.sides.children = tuple(
            self._side(c, run, flat(config), own, len(runs) > 1)
            for c, run, config, own in [*zip(chosen, runs, configs, apart, strict=True)][-_SIDES:]
        )
        self.many.show(chosen)

    def _side(self, name: str, run: Run, settings: dict, differ: dict, beside: bool) -> w.VBox:
        facts = next((r for r in self.found if r["run"] == name), {})
        parts: list[w.Widget] = [
            w.HTML(
                looks.scores(
                    [
                        ("ACC", looks.percent(facts.get("acc"))),
                        ("ASR", looks.percent(facts.get("asr"))),
                        ("robust", looks.percent(facts.get("robust"))),
                    ]
                )
            )
        ]
        parts.append(looks.said(facts.get("state", ""), "quiet"))
        history = run.history()
        if len(history) and "acc" in history:
            parts.append(self._curves(history))
        if confusion := run.confusion:
            parts.append(self._confusion(confusion, run.config))
        for path in sorted((run.path / "figures").glob("*.png")):
            parts += [
                looks.said(path.stem.replace("_", " "), "quiet"),
                looks.Picture(png=path.read_bytes(), width=520, alt=path.stem),
            ]
        if samples := run.samples():
            last = max(samples)
            text = f"what the student learnt from at step {last}"
            shown = looks.Picture(png=looks.mosaic([samples[last][:32]], 16, side=30, gap=2))
            shown.alt = text
            parts += [looks.said(text, "quiet"), shown]
        if differ:
            lines = "".join(
                f"<div>{html.escape(k)}: <b>{html.escape(spoken(v))}</b></div>"
                for k, v in sorted(differ.items())
            )
            parts.append(w.HTML(f'<div class="abdlab-said">Settings that differ:{lines}</div>'))
        elif beside:
            why = "No settings differ." if settings else "This folder records no settings."
            parts.append(looks.said(why, "quiet"))
        if settings:
            lines = "\n".join(f"{k}: {spoken(v)}" for k, v in settings.items())
            parts.append(
                w.HTML(
                    "<details class='abdlab-quiet'><summary>settings</summary>"
                    f"<pre>{html.escape(lines)}</pre></details>"
                )
            )
        parts.append(self._notes(name, run))
        return looks.card(name, *parts, flex="1 1 0", min_width="0")

    def _confusion(self, found: dict, config: dict) -> looks.Picture:
        """What the model answers, class by class, without and with the (first) trigger."""
        count, attack = 1 + bool(found["triggered"]), config.get("attack") or {}
        target = attack.get("target") if attack.get("relabel") != RELABEL[1] else None
        shown = looks.Picture(alt="confusion matrices, the target's column framed")
        with looks.DRAWING:
            drawn = looks.figure(5.4, 2.9)
            axes = drawn.subplots(1, count, squeeze=False)[0]
            confusion_figure(found, axes, target if count > 1 else None)
            shown.draw(drawn)
        return shown

    def _notes(self, name: str, run: Run) -> w.Widget:
        """A field for what a person has to say about a run."""
        field = w.Textarea(
            notes_of(run.path),
            placeholder="notes, kept beside the run",
            continuous_update=False,
            layout=w.Layout(width="auto", height="54px"),
        )

        def keep() -> None:
            save_notes(run.path, field.value)
            next(r for r in self.found if r["run"] == name)["notes"] = notes_of(run.path)
            self._filter()

        field.observe(looks.telling(self.trouble, keep), "value")
        return field

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
