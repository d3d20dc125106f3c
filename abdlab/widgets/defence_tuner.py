"""Tune the defence while a student is distilled: start, pause, change a weight, stop,
branch, compare, and take the run along.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import shutil
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
import traitlets as t
import yaml

from abdlab import plots
from abdlab.checkpoint import read_card
from abdlab.data import Dataset
from abdlab.defenses import DEFENSES
from abdlab.defenses.plans import plan_of, steps_of, then, until
from abdlab.home import at_home
from abdlab.labels import name_of
from abdlab.runs import Run
from abdlab.settings import Settings, keyword_default, settings
from abdlab.sources import SOURCES
from abdlab.stream import HEADLESS, Step
from abdlab.students import Distillation, distillation, distilled
from abdlab.teachers import poisoned_teacher, prepare
from abdlab.widgets import looks
from abdlab.widgets.branches import Origin, inherit, method_of, number_of, origins, runs_in
from abdlab.widgets.worker import Worker, current, watch_kernel

#: knob -> the setting that it turns; those of LIVE also while a run goes on
KNOBS = {
    "alpha": "sv.alpha",
    "k": "sv.k",
    "layers": "sv.layers",
    "weight": "sr.weight",
    "inner_steps": "sr.inner_steps",
    "start_at": "sr.start",
    "lr": "sr.lr",
}
LIVE = ("alpha", "weight", "inner_steps")
#: the notebook whose parameters repeat a run
NOTEBOOK = "02_distillation"
_UNDER_WAY = ("preparing", "running", "paused", "stopping")
#: a figure may take this share of the time, at most
_DRAWING_SHARE = 0.15


class DefenceTuner(w.VBox):
    """One student at a time, distilled in the background with the knobs as they stand;
    the numbers are those of a headless run.

    Args:
        root: the folder of results; runs go to ROOT/seedN/METHOD@NUMBER.
        chosen: the experiment. Knobs that are not turned leave it as it is.
        data: the data set, to spare loading it.
        label: the method to begin with.
        exams: how many times ACC and ASR are measured over a run, and checkpoints kept
            to branch from.
        needs_page: stop a run, saving it, when the page that shows this has been closed
            for a few minutes.

    Traits:
        state: "idle", "preparing" (teacher, floor), "running", "paused", "stopping",
        "done", "stopped", "failed". step, total, acc, asr, floor: of the run; floor is
        the clean-KD student's ASR. Shares in [0, 1]. folder: the name of the run's
        folder.
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
        root: str | Path = "runs/walk",
        chosen: Settings | None = None,
        data: Dataset | None = None,
        label: str = "zskt+sv+sr",
        exams: int = 20,
        needs_page: bool = True,
    ):
        self._top, self.exams, self._data, self.needs_page = at_home(root), exams, data, needs_page
        self._chosen = settings() if chosen is None else chosen
        self.going: Distillation | None = None
        self.worker: Worker | None = None
        self._quiet, self._rows, self._images, self._events = False, [], None, []
        self._pace: deque[tuple[int, float]] = deque(maxlen=30)
        self._drawn, self._drawing = 0.0, 0.0
        # a cell that is run again takes over from its former self
        if (other := current()) is not None and getattr(other, "root", None) == self._top:
            other.stop(
                "the cell was run again: the run has saved itself, Start goes on with it", wait=60
            )
        self._make(label)
        looks.dress(self)
        watch_kernel()
        self.find()
        self._show_state()

    # --- what the user turns

    def _make(self, label: str) -> None:
        style, wide = {"description_width": "140px"}, w.Layout(width="390px")
        common = {"style": style, "layout": wide, "continuous_update": False}
        sources = [
            source
            for source in dict.fromkeys([label.partition("+")[0], *SOURCES])
            if source != "clean"
        ]
        methods = [
            source + defences for source in sources for defences in ("", "+sv", "+sr", "+sv+sr")
        ]
        self.method = w.Dropdown(
            options=[(name_of(m), m) for m in methods],
            value=label,
            description="method",
            style=style,
            layout=wide,
        )
        self.origin = w.Dropdown(
            options=[(str(Origin()), Origin())], description="begin", style=style, layout=wide
        )
        value = {name: self._of(self._chosen, name) for name in KNOBS}
        self.alpha = w.FloatSlider(
            value["alpha"],
            min=0,
            max=max(2, 2 * value["alpha"]),
            step=0.01,
            description="SV: alpha",
            **common,
        )
        self.k = w.IntSlider(
            value["k"], min=1, max=max(8, value["k"]), description="SV: k (copies)", **common
        )
        named = not isinstance(value["layers"], int)
        self.layers = w.IntSlider(
            1 if named else value["layers"],
            min=1,
            max=20,
            description="SV: shuffled layers",
            **common,
        )
        log = {**common, "readout_format": ".2g"}
        self.weight = w.FloatLogSlider(
            value["weight"], min=-3, max=3, step=0.05, description="SR: weight", **log
        )
        self.inner_steps = w.IntSlider(
            value["inner_steps"],
            min=1,
            max=max(20, value["inner_steps"]),
            description="SR: inner steps",
            **common,
        )
        self.start_at = w.FloatSlider(
            value["start_at"], min=0, max=0.99, step=0.01, description="SR: start (share)", **common
        )
        self._fixed = {"layers"} if named else set()
        if value["lr"] is None:
            self._fixed.add("lr")
        self.lr = w.FloatLogSlider(
            value["lr"] or 5e-4, min=-5, max=-2, step=0.05, description="SR: learning rate", **log
        )
        self.with_floor = w.Checkbox(
            True, description="distil the clean-KD floor first", indent=False, layout=wide
        )
        self.keep_on = w.Checkbox(
            not self.needs_page,
            description="go on when the page is closed",
            indent=False,
            layout=wide,
        )
        self._before = {name: self.knob(name).value for name in KNOBS}

        self.start_button = looks.button("Start", self.start, "begin, or go on", "primary")
        self.pause_button = looks.button("Pause", self.pause, "wait after this step")
        self.stop_button = looks.button(
            "Stop", self.stop, "finish this step, measure, save", "warning"
        )
        self.branch_button = looks.button(
            "Branch here", self.branch, "begin a new run where this one is now, with other weights"
        )
        self.copy_button = looks.button(
            "Copy as parameters", self.copy, "parameters for papermill that repeat exactly this run"
        )
        self.bar = w.IntProgress(0, 0, 1, layout=w.Layout(width="auto", margin="2px 0"))
        self.trouble, self.status = looks.Trouble(), looks.said()
        self.numbers, self.notes = w.HTML(), w.HTML()
        self.curves = looks.Picture(alt="ACC, ASR and losses over training")
        self.grid = looks.Picture(alt="synthetic images that the student learns from")
        self.empty = looks.said()
        self.branches = w.SelectMultiple(options=[], rows=8, layout=w.Layout(width="230px"))
        self.compared = looks.Picture(alt="ACC and ASR of the chosen runs")
        self.parameters_shown, self.parameters_for = looks.Copyable(), looks.said("", "quiet")
        self._compare_card = looks.card(
            "Compare branches",
            looks.said("Choose several with Ctrl or Shift.", "quiet"),
            looks.row(self.branches, self.compared),
        )
        self._copy_card = looks.card(
            "This run as parameters", self.parameters_for, self.parameters_shown
        )
        knobs = looks.card("Defence", *(self.knob(name) for name in KNOBS))
        where = looks.card("Run", self.method, self.origin, self.with_floor, self.keep_on)
        press = looks.row(
            self.start_button,
            self.pause_button,
            self.stop_button,
            self.branch_button,
            self.copy_button,
        )
        self._grid_card = looks.card("What the student learns from now", self.grid)
        left = w.VBox(
            [where, knobs, looks.card("", press), self._grid_card],
            layout=w.Layout(width="432px", grid_gap="8px"),
        )
        live = looks.card(
            "Live",
            self.status,
            self.bar,
            self.numbers,
            self.empty,
            self.curves,
            self.notes,
            flex="1 1 560px",
            min_width="0",
        )
        super().__init__([self.trouble, looks.row(left, live), self._compare_card, self._copy_card])
        for name in KNOBS:
            self.knob(name).observe(
                lambda change, name=name: self._turned(name, change["new"]), "value"
            )
        self.method.observe(lambda _: self.find(), "value")
        self.origin.observe(lambda _: self._adopt(), "value")
        self.branches.observe(lambda _: self._show_compared(), "value")
        self.keep_on.observe(lambda _: self._patience(), "value")
        self.observe(lambda _: self._show_state(), "state")
        looks.page().observe(lambda _: self._redraw(), "dark")

    def knob(self, name: str) -> w.Widget:
        """The control of one of :data:`KNOBS`."""
        return getattr(self, name)

    @staticmethod
    def _of(chosen: Settings, name: str) -> Any:
        """The value that settings give a knob; of a plan, its last one."""
        section, _, key = KNOBS[name].partition(".")
        value = chosen.values[section].get(key, keyword_default(DEFENSES[section], key))
        return steps_of(value)[-1][1] if name in LIVE else value

    @property
    def chosen(self) -> Settings:
        """The experiment with the knobs as they stand. Knobs that were not turned do
        not touch it.
        """
        values = {section: dict(options) for section, options in self._base.values.items()}
        origin: Origin = self.origin.value
        for name in KNOBS:
            value = self.knob(name).value
            if value == self._before[name] or name in self._fixed:
                continue
            section, _, key = KNOBS[name].partition(".")
            if origin.checkpoint and name in LIVE:
                value = then(
                    values[section].get(key, keyword_default(DEFENSES[section], key)),
                    origin.index,
                    value,
                )
            values[section][key] = value
        return replace(self._base, values=values)

    @property
    def _base(self) -> Settings:
        """What the knobs change: the experiment, or the settings of the run that this
        one goes on from.
        """
        origin: Origin = self.origin.value
        if origin.folder is None:
            return self._chosen
        base = Settings.of(Run(self._place(origin.folder)).config, rest=self._chosen)
        if origin.checkpoint:  # weights that the old run changed later on are none of the branch's
            for name in LIVE:
                section, _, key = KNOBS[name].partition(".")
                if key in (values := base.values[section]):
                    values[key] = plan_of(until(values[key], max(1, origin.index)))
        return base

    def use(self, overrides: dict[str, Any]) -> None:
        """Take another attack (or any settings) over, as :class:`TriggerDesigner` hands
        them on; not while a run goes on.
        """
        if self.state in _UNDER_WAY:
            self.trouble.error = "a run is under way: stop it first, then hand the trigger over"
            return
        kept = {
            k: v
            for k, v in self._chosen.overrides().items()
            if k.partition(".")[0] not in {n.partition(".")[0] for n in overrides}
        }
        try:
            chosen = settings(
                self._chosen.preset,
                {**kept, **overrides},
                seed=self._chosen.seed,
                device=self._chosen.device,
            )
            looks.say(
                self.status, f"The next run is attacked with {', '.join(map(str, chosen.attacks))}."
            )
        except ValueError as error:
            self.trouble.error = error
            return
        if chosen.values["data"] != self._chosen.values["data"]:
            self._data = None
        self._chosen, self.trouble.error, self.floor = chosen, None, None
        self.find()

    @property
    def root(self) -> Path:
        """Where this experiment's teacher and students are: the given root, or a folder
        in it where that has another teacher.
        """
        config = json.loads(json.dumps(self._chosen.config("data", "attack", "teacher")))
        teacher = self._top / f"seed{self._chosen.seed}" / "teacher" / "config.json"
        there = json.loads(teacher.read_text()) if teacher.exists() else {}
        if not there or all(there.get(k) == config[k] for k in ("data", "attack", "teacher")):
            return self._top
        stamp = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]
        return self._top / f"{self._chosen.trigger}-{stamp}"

    def _place(self, folder: str) -> Path:
        return self.root / f"seed{self._chosen.seed}" / folder

    # --- runs that are there

    def find(self, origin: Origin | None = None) -> None:
        """Look for runs to go on with, to branch from and to compare; begin from
        ``origin`` (by default from scratch).
        """
        runs = runs_in(self.root / f"seed{self._chosen.seed}")
        names = [path.name for path in runs]
        places = [
            Origin(),
            *(
                place
                for path in runs
                if method_of(path.name) == self.method.value
                for place in origins(path)
            ),
        ]
        wanted = origin if origin in places else Origin()
        self._quiet = True
        self.origin.options = [(str(place), place) for place in places]
        self.origin.value = wanted
        self._quiet = False
        self._adopt()
        chosen = [name for name in self.branches.value if name in names]
        if list(self.branches.options) != names:
            self.branches.options = names
            self.branches.value = tuple(chosen)
        self._compare_card.layout.display = "" if len(names) > 1 else "none"

    def _adopt(self) -> None:
        """Turn the knobs to what the origin's run had, and lock those that can no
        longer change.
        """
        if self._quiet:
            return
        base, self._quiet = self._base, True
        for name in KNOBS:
            value = self._of(base, name)
            if name not in self._fixed and value is not None:
                knob = self.knob(name)
                if (
                    isinstance(value, (int, float))
                    and hasattr(knob, "step")
                    and not isinstance(knob, w.FloatLogSlider)
                ):
                    knob.max = max(knob.max, value)
                knob.value = value
            self._before[name] = self.knob(name).value
        self._quiet = False
        self._lock()

    def _lock(self) -> None:
        busy, origin = self.state in _UNDER_WAY, self.origin.value
        used = self.method.value.split("+")[1:]
        for name, setting in KNOBS.items():
            late = busy or origin.folder is not None
            settled = name in ("k", "layers") or (
                name in ("start_at", "lr") and (busy or origin.checkpoint is None)
            )
            self.knob(name).disabled = (
                name in self._fixed
                or setting[:2] not in used
                or (late and name not in LIVE and settled)
            )
        for control in (self.method, self.origin, self.with_floor):
            control.disabled = busy
        self.start_button.disabled = busy and self.state != "paused"
        self.start_button.description = (
            "Go on"
            if self.state == "paused" or (origin.folder and not origin.checkpoint)
            else "Start"
        )
        self.pause_button.disabled = self.state != "running"
        self.stop_button.disabled = self.state not in ("preparing", "running", "paused")
        self.branch_button.disabled = (busy and self.state != "paused") or not (
            self.folder and self.step
        )
        self.copy_button.disabled = not self.folder or not self._place(self.folder).is_dir()

    def _turned(self, name: str, value: Any) -> None:
        if self._quiet or self.state not in ("preparing", "running", "paused"):
            return
        # locked; but a value that the page sent before it heard of Start may come after
        # it
        if name not in LIVE:
            begun = self._begun[name]
            if value != begun:
                self.knob(name).value = begun
                looks.say(
                    self.status,
                    f"{KNOBS[name]} is {begun:g} in this run, which had begun when the knob was"
                    " turned.",
                )
        elif self.going is None:
            looks.say(self.status, f"{KNOBS[name]} is {value:g} from the student's next step on.")
        elif self._tune(name, value):
            looks.say(self.status, f"{KNOBS[name]} is {value:g} from the next step on.")

    def _tune(self, name: str, value: float) -> bool:
        """Turn the defence that the knob belongs to; False where the run has none."""
        section, _, key = KNOBS[name].partition(".")
        for defense in self.going.defenses:
            if defense.name == section:
                defense.tune(**{key: value})
                return True
        return False

    # --- what the buttons do

    def start(self) -> None:
        """Begin, or go on where the run was paused or stopped."""
        if self.state == "paused":
            self._pace.clear()
            self.worker.resume()
            self.state = "running"
            return
        try:
            self._begin().start()
        except (ValueError, RuntimeError, OSError) as error:
            self.trouble.error, self.worker = error, None
            self.state = "failed"

    def run(self) -> dict:
        """The same run, to its end, in the calling thread: for a kernel that nobody
        clicks in. Returns the metrics.
        """
        self._begin().run_here()
        return Run(self._place(self.folder)).metrics

    def pause(self) -> None:
        """Wait after the step under way."""
        if self.state == "running":
            self.worker.pause()
            self.state = "paused"

    def stop(self) -> None:
        """Finish the step under way, measure the student, save, end."""
        if self.worker is not None and self.state in _UNDER_WAY:
            self.worker.stop()
            self.state = "stopping"

    def branch(self) -> None:
        """Make the next run begin where this one is now. A paused run is stopped for
        that, which saves it.
        """
        if self.state == "paused":
            self.worker.stop("the run was stopped to branch off it", wait=120)
        places = [place for place in origins(self._place(self.folder)) if place.checkpoint]
        if not places:
            self.trouble.error = f"{self.folder} has no checkpoint yet to branch from"
            return
        here = places[-1]
        self.method.value = method_of(self.folder)
        self.find(here)
        looks.say(
            self.status,
            f"The next run branches off {here.folder} at step {here.index}: turn a weight, then"
            " press Start.",
        )

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
        """YAML for papermill's ``-f`` that repeats a run from scratch, weights that
        changed on the way included.

        The same numbers need the same machine and number of threads. A run that was
        stopped is repeated to its end.
        """
        folder = folder or self.folder
        label, chosen = (
            method_of(folder),
            Settings.of(Run(self._place(folder)).config, self._chosen.device),
        )
        source, *defenses = label.split("+")
        used = {"data", "attack", "teacher", "student", *chosen.sections(source), *defenses}
        # the clean-KD floor is distilled as this experiment has it
        overrides = {
            k: v for k, v in self._chosen.overrides().items() if k.partition(".")[0] not in used
        }
        overrides |= {k: v for k, v in chosen.overrides().items() if k.partition(".")[0] in used}
        common = {
            "run": str(self._top / "repeated" / folder),
            "preset": chosen.preset,
            "device": str(chosen.device),
        }
        own = {"seed": chosen.seed, "source": source, "defenses": defenses}
        text = yaml.safe_dump(
            json.loads(json.dumps({**common, **own, "overrides": overrides})),
            sort_keys=False,
            default_flow_style=None,
            width=110,
        )
        return f"# {folder}: parameters of {NOTEBOOK}\n{text}"

    # --- the run itself

    def _begin(self) -> Worker:
        """All that is settled before the thread starts, in the caller's own."""
        if self.state in _UNDER_WAY:
            raise RuntimeError("a run is under way")
        origin: Origin = self.origin.value
        chosen, label, root = self.chosen, self.method.value, self.root
        # what the run's settings have; a knob that stands elsewhere once it trains is
        # turned then
        self._begun = {name: self.knob(name).value for name in KNOBS}
        resume_from = None
        if origin.folder and not origin.checkpoint:
            folder, chosen = origin.folder, self._base
            self._begun |= {name: self._before[name] for name in LIVE}
        else:
            beside = root / f"seed{chosen.seed}"
            numbers = (
                [number_of(p.name) for p in beside.glob(f"{label}@*")] if beside.is_dir() else []
            )
            folder = f"{label}@{max(numbers, default=0) + 1}"
            if origin.checkpoint:
                self._check_branch(origin, chosen, label)
                resume_from = beside / folder / f"checkpoint-{origin.index}.safetensors"
        self.folder, self.going, self.trouble.error = folder, None, None
        self.parameters_shown.text = ""
        looks.say(self.parameters_for, "")
        self._rows, self._images, self._events = [], None, []
        self.step, self.total, self.acc, self.asr = origin.index, 0, None, None
        self.notes.value, self.curves.png, self.grid.png = "", b"", b""
        self._pace.clear()
        self.state = "preparing"

        def job(worker: Worker) -> None:
            self._train(worker, root, chosen, label, folder, origin, resume_from)

        self.worker = Worker(job, self._ended, needs_page=not self.keep_on.value)
        self.worker.root, self.worker.folder = self._top, root / f"seed{chosen.seed}" / folder
        return self.worker

    def _check_branch(self, origin: Origin, chosen: Settings, label: str) -> None:
        """A branch repeats from scratch only when nothing that it changes had an effect
        before it.
        """
        if "sr" not in label.split("+"):
            return
        length = read_card(origin.checkpoint)["run"]["length"]
        old, new = (s.defenses("sr")[0] for s in (self._base, chosen))
        if old.first_of(length) < origin.index and (old.start_share, old.lr) != (
            new.start_share,
            new.lr,
        ):
            raise ValueError(
                f"self-retrospection is on since step {old.first_of(length)}: branch off earlier to"
                " change its start or learning rate"
            )
        if new.first_of(length) < origin.index <= old.first_of(length):
            raise ValueError(
                f"self-retrospection would have begun at step {new.first_of(length)}, before the"
                f" branch at {origin.index}: start it later"
            )

    def _train(
        self,
        worker: Worker,
        root: Path,
        chosen: Settings,
        label: str,
        folder: str,
        origin: Origin,
        resume_from: Path | None,
    ) -> None:
        def tell(what: str, step: Step) -> None:
            worker.wait()
            names = {
                "teacher": "the teacher",
                "clean_teacher": "a clean teacher to optimise the trigger against",
                "clean": "clean KD, the floor",
            }
            self._say_slowly(f"First {names.get(what, what)}: {step.index} of {step.total}.", step)

        if self._data is None:
            self._data = chosen.dataset()
        data = self._data
        ready = prepare(root, chosen, data, tell=tell)
        teacher = poisoned_teacher(root, ready, data, tell=tell)
        weak = Run(root / f"seed{chosen.seed}" / "teacher").metrics
        if weak.get("asr") is not None and weak["asr"] < 0.9:
            self._events.append(
                f"the teacher's ASR is {weak['asr']:.1%}: its backdoor is weak, and so is what this"
                " run can show"
            )
        if self.with_floor.value:
            self.floor = distilled(root, ready, data, teacher, "clean", tell=tell)[1].get("asr")
        if resume_from is not None:
            branch = Run(resume_from.parent)
            shutil.copyfile(origin.checkpoint, resume_from)  # a branch survives its trunk
            inherit(Run(resume_from.parent.parent / origin.folder), branch, origin.index)
        going = distillation(
            root,
            ready,
            data,
            teacher,
            label,
            exams=self.exams,
            samples=self.exams,
            resume_from=resume_from,
            folder=folder,
            keep_all=True,
        )
        # what the folder holds already, for a run that goes on, or a branch's trunk
        self._rows = going.run.history().to_dict("records")
        self.going = going
        for name in LIVE:
            if self.knob(name).value != self._begun[name]:
                self._tune(name, self.knob(name).value)
        if self.state == "preparing":
            self.state = "running"
        last = going.run.watch(
            worker.gate(going.stream, lambda: going.exam(going.student)), label, tell=self._tell
        )
        going.keep_plans()
        if last.index == last.total:
            going.finish(last)
        else:
            going.stopped(last)
        self._redraw()

    def _tell(self, _label: str, step: Step) -> None:
        """Show one step; called in the run's thread, between steps."""
        now = time.monotonic()
        self._pace.append((step.index, now))
        self._rows.append({"label": method_of(self.folder), "step": step.index, **step.losses})
        self._rows[-1] |= {"acc": step.acc, "asr": step.asr}
        if step.events:
            self._events += [event for event in step.events if event not in self._events]
            self.going.keep_plans()
        if step.images is not None:
            self._images = step.images
        self.step, self.total = step.index, step.total
        if step.acc is not None:
            self.acc, self.asr = step.acc, step.asr
        due = now - self._drawn > max(1.0, self._drawing / _DRAWING_SHARE)
        if (
            due
            or step.index == step.total
            or (step.acc is not None and self.acc is not None and self._drawn == 0)
        ):
            self._redraw()

    def _ended(self, error: BaseException | None) -> None:
        why = self.worker.why if self.worker else ""
        done = error is None and self.total and self.step == self.total
        self.trouble.error = error
        checkpoint = self._place(self.folder) / "checkpoint.safetensors"
        here = (
            Origin(self.folder, read_card(checkpoint)["index"])
            if checkpoint.exists()
            else self.origin.value
        )
        self.find(None if done else here)
        self._redraw()
        # last: whoever waits for it finds all of the above settled
        self.state = "failed" if error is not None else "done" if done else "stopped"
        if why:
            self._events.append(why)
            self._note_events()
            looks.say(self.status, f"{why[0].upper()}{why[1:]}.")

    # --- what is shown

    def _say_slowly(self, text: str, step: Step) -> None:
        self.bar.max, self.bar.value = step.total, step.index
        looks.say(self.status, text)

    def left(self) -> float | None:
        """Seconds that the run still takes at its present pace; None when that is not
        known yet.
        """
        if len(self._pace) < 3:
            return None
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        return (now - began) / (last - first) * (self.total - last)

    def _show_state(self) -> None:
        at = f"step {self.step} of {self.total}" if self.total else "the first step"
        left = self.left()
        texts = {
            "idle": "",
            "preparing": "Getting ready: data, teacher, floor.",
            "running": (
                f"Training {self.folder}: {at}"
                + (f", about {_duration(left)} left." if left is not None else ".")
            ),
            "paused": f"Paused {self.folder} at {at}: weights can be changed, Go on continues.",
            "stopping": "Stopping: the step is finished, the student measured and saved.",
            "done": f"Done: {self.folder}, {self.total} steps.",
            "stopped": (
                f"Stopped and saved {self.folder} at {at}: Go on continues it, Branch here tries"
                " another weight."
                if self.step
                else "Stopped."
            ),
            "failed": "This run ended with an error.",
        }
        looks.say(self.status, texts[self.state])
        self._lock()
        nothing = self.state == "idle" and not self._rows
        looks.say(
            self.empty,
            (
                "No run yet: press Start, and curves and images appear here while the student"
                " learns."
                if nothing
                else ""
            ),
            "empty",
        )
        self.bar.layout.display = "none" if self.state == "idle" else ""
        self._grid_card.layout.display = "" if self.grid.png else "none"
        self._copy_card.layout.display = "" if self.parameters_shown.text else "none"

    def _redraw(self) -> None:
        began = time.monotonic()
        self.bar.max, self.bar.value = max(1, self.total), self.step
        pairs = [
            ("ACC", looks.percent(self.acc)),
            ("ASR", looks.percent(self.asr)),
            ("floor: ASR of clean KD", looks.percent(self.floor)),
        ]
        self.numbers.value = looks.scores(pairs) if self._rows else ""
        if self._rows:
            history = pd.DataFrame(self._rows)
            with looks.DRAWING:
                drawn = looks.figure(6.1, 5.6)
                above, below = drawn.subplots(2, 1)
                if history["acc"].notna().any():
                    plots.training_curves(history, above, self.floor)
                else:
                    above.set(
                        xlabel="training step (pseudo-batch)",
                        ylabel="share of test images (%)",
                        ylim=(-3, 103),
                    )
                plots.loss_curves(history, below)
                self.curves.draw(drawn)
        if self._images is not None:
            self.grid.png = looks.mosaic([self._images[:64]], 8, side=46, gap=3)
            self._grid_card.layout.display = ""
        self._note_events()
        if self.state == "running":
            self._show_state()
        self._show_compared()
        self._drawn = time.monotonic()
        self._drawing = self._drawn - began

    def _note_events(self) -> None:
        lines = "".join(f"<li>{html.escape(event)}</li>" for event in self._events)
        self.notes.value = (
            f'<ul class="abdlab-said" style="margin: 4px 0; padding-left: 18px">{lines}</ul>'
            if lines
            else ""
        )

    def _show_compared(self) -> None:
        if self._quiet or not self.branches.value:
            self.compared.png = b""
            return
        histories = {name: Run(self._place(name)).history() for name in self.branches.value}
        with looks.DRAWING:
            drawn = looks.figure(7.6, 3.0)
            plots.branch_curves(histories, drawn.subplots(1, 2), self.floor)
            self.compared.draw(drawn)

    def _patience(self) -> None:
        if self.worker is not None:
            self.worker.needs_page = not self.keep_on.value


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def headless() -> bool:
    """Whether nobody is there to click."""
    return bool(os.environ.get(HEADLESS))
