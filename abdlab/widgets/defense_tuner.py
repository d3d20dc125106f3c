"""Tune the defense while a student is distilled: start, pause, change a weight, stop,
branch, compare, and take the run along.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ipywidgets as w
import traitlets as t

from abdlab.checkpoint import read_card
from abdlab.data import Dataset
from abdlab.defenses.plans import tune
from abdlab.home import at_home
from abdlab.presets import METHOD
from abdlab.runs import Run
from abdlab.settings import Settings, settings
from abdlab.stream import HEADLESS, Step
from abdlab.students import Distillation
from abdlab.widgets import looks
from abdlab.widgets.branches import (
    NOTEBOOK,
    Origin,
    method_of,
    origins,
    parameters_of,
    root_of,
    runs_in,
)
from abdlab.widgets.controls import UNDER_WAY, Controls
from abdlab.widgets.job import GETTING_READY, Job
from abdlab.widgets.knobs import Knob, trimmed
from abdlab.widgets.live import Compared, Live, in_words
from abdlab.widgets.worker import Worker, current, watch_kernel

#: a teacher whose ASR is a smaller share has a backdoor too weak to study
_WEAK = 0.9


class DefenseTuner(w.VBox):
    """One student at a time, distilled in the background with the knobs as they stand;
    the numbers are those of a headless run.

    >>> import tempfile
    >>> tuner = DefenseTuner(tempfile.mkdtemp(), label="zskt+sv")
    >>> tuner.knob("sv.alpha").value = 0.5
    >>> tuner.chosen.values["sv"]["alpha"]
    0.5
    >>> tuner.start()  # doctest: +SKIP

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
        label: str = METHOD,
        exams: int = 20,
        needs_page: bool = True,
    ):
        self._top, self.exams, self._data, self.needs_page = at_home(root), exams, data, needs_page
        self._chosen = settings() if chosen is None else chosen
        self.going: Distillation | None = None
        self.worker: Worker | None = None
        self._quiet = False
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
        self.live, self.trouble = Live(), looks.Trouble()
        self.status, self.empty = self.live.status, self.live.empty
        doing = {
            "Start": self.start,
            "Pause": self.pause,
            "Stop": self.stop,
            "Branch here": self.branch,
            "Copy as parameters": self.copy,
        }
        self.controls = Controls(label, doing, self._turned, self.trouble)
        self.knobs, self.method, self.origin = (
            self.controls.knobs,
            self.controls.method,
            self.controls.origin,
        )
        self.controls.keep_on.value = not self.needs_page
        self.compared = Compared()
        self.parameters_shown, self.parameters_for = looks.Copyable(), looks.said("", "quiet")
        self._compare_card = looks.card("Compare branches", self.compared)
        self._copy_card = looks.card(
            "This run as parameters", self.parameters_for, self.parameters_shown
        )
        self._grid_card = looks.card("What the student learns from now", self.live.grid)
        left = w.VBox(
            [self.controls, self._grid_card], layout=w.Layout(width="432px", grid_gap="8px")
        )
        live = looks.card("Live", self.live, flex="1 1 560px", min_width="0")
        super().__init__([self.trouble, looks.row(left, live), self._compare_card, self._copy_card])
        self._listen()

    def _listen(self) -> None:
        def heard(do):
            return looks.telling(self.trouble, do)

        self.method.observe(heard(self.find), "value")
        self.origin.observe(heard(self._adopt), "value")
        self.compared.runs.observe(heard(self._show_compared), "value")
        self.controls.keep_on.observe(heard(self._patience), "value")
        self.observe(heard(self._show_state), "state")
        looks.page().observe(heard(self._redraw), "dark")

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

    def use(self, overrides: dict[str, Any]) -> None:
        """Take another attack (or any settings) over, as :class:`TriggerDesigner` hands
        them on; not while a run goes on.
        """
        if self.state in UNDER_WAY:
            self.trouble.error = "a run is under way: stop it first, then hand the trigger over"
            return
        kept = {
            k: v
            for k, v in self._chosen.overrides().items()
            if k.rpartition(".")[0] not in {n.rpartition(".")[0] for n in overrides}
        }
        try:
            chosen = settings(
                self._chosen.preset,
                {**kept, **overrides},
                seed=self._chosen.seed,
                device=self._chosen.device,
            )
            self.live.say(f"The next run is attacked with {', '.join(map(str, chosen.attacks))}.")
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
        self._adopt()
        self.compared.offer(names)
        self._compare_card.layout.display = "" if len(names) > 1 else "none"

    def _adopt(self) -> None:
        """Turn the knobs to what the origin's run had, and lock those that can no
        longer change.
        """
        if not self._quiet:
            self.knobs.show(self.method.value, self._base)
            self._lock()

    def _lock(self) -> None:
        origin = self.origin.value
        self.controls.lock(
            self.state,
            goes_on=bool(origin.folder and not origin.checkpoint),
            branches=bool(origin.checkpoint),
            begun=bool(self.folder and self.step),
            there=bool(self.folder) and self._place(self.folder).is_dir(),
        )

    def _turned(self, knob: Knob, value: Any) -> None:
        if self.state not in ("preparing", "running", "paused"):
            return
        # locked; but a value that the page sent before it heard of Start may come after
        # it
        if not knob.live:
            begun = self._begun[knob.name]
            if value != begun:
                self.knobs.turn_back(knob.name, begun)
                self.live.say(
                    f"{knob.name} is {begun:g} in this run, which had begun when the knob was"
                    " turned."
                )
        elif self.going is None:
            self.live.say(f"{knob.name} is {value:g} from the student's next step on.")
        elif self._tune(knob, value):
            self.live.say(f"{knob.name} is {value:g} from the next step on.")

    def _tune(self, knob: Knob, value: float) -> bool:
        """Turn the defense that the knob belongs to; False where the run has none."""
        for defense in self.going.defenses:
            if defense.name == knob.section:
                tune(defense, **{knob.key: value})
                return True
        return False

    # --- what the buttons do

    def start(self) -> None:
        """Begin, or go on where the run was paused or stopped."""
        if self.state == "paused":
            self.live.rest()
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
        if self.worker is not None and self.state in UNDER_WAY:
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
        self.controls.choose(method_of(self.folder))
        self.find(here)
        self.live.say(
            f"The next run branches off {here.folder} at step {here.index}: turn a weight, then"
            " press Start."
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
        """YAML that repeats a run from scratch, by default the latest one; see
        :func:`abdlab.widgets.branches.parameters_of`.
        """
        run = Run(self._place(folder or self.folder))
        return parameters_of(run, self._chosen, self._top / "repeated")

    # --- the run itself

    def _begin(self) -> Worker:
        """All that is settled before the thread starts, in the caller's own."""
        if self.state in UNDER_WAY:
            raise RuntimeError("a run is under way")
        job = Job.of(self.root, self._base, self.chosen, self.method.value, self.origin.value)
        # what the run's settings have; a knob that stands elsewhere once it trains is
        # turned then
        goes_on = job.chosen is job.base
        self._begun = self.knobs.before if goes_on else self.knobs.values()
        self.folder, self.going, self.trouble.error = job.folder, None, None
        self.parameters_shown.text = ""
        looks.say(self.parameters_for, "")
        self.step, self.total, self.acc, self.asr = job.origin.index, 0, None, None
        self.live.clear()
        self.state = "preparing"
        self.worker = Worker(
            lambda worker: self._train(worker, job),
            self._ended,
            needs_page=not self.controls.keep_on.value,
        )
        self.worker.root, self.worker.folder = self._top, job.place
        return self.worker

    def _train(self, worker: Worker, job: Job) -> None:
        def tell(what: str, step: Step) -> None:
            worker.wait()
            self.live.progress(step)
            self.live.say(f"First {GETTING_READY.get(what, what)}: {step.index} of {step.total}.")

        if self._data is None:
            self._data = job.chosen.dataset()
        data = self._data
        ready, teacher, asr = job.teacher(data, tell)
        if asr is not None and asr < _WEAK:
            self.live.happened(
                f"the teacher's ASR is {asr:.1%}: its backdoor is weak, and so is what this run"
                " can show"
            )
        if self.controls.with_floor.value:
            self.floor = job.floor(ready, data, teacher, tell)
        going = job.begin(ready, data, teacher, self.exams)
        # what the folder holds already, for a run that goes on, or a branch's trunk
        self.live.rows = going.run.history().to_dict("records")
        self.going = going
        for knob in self.knobs.shown:
            if knob.live and knob.control.value != self._begun[knob.name]:
                self._tune(knob, knob.control.value)
        if self.state == "preparing":
            self.state = "running"
        last = going.run.watch(
            worker.gate(going.stream, lambda: going.exam(going.student)),
            job.label,
            tell=self._tell,
        )
        going.keep_plans()
        if last.index == last.total:
            going.finish(last)
        else:
            going.stopped(last)
        self._redraw()

    def _tell(self, label: str, step: Step) -> None:
        """Show one step; called in the run's thread, between steps."""
        self.live.add(label, step)
        if step.events:
            self.going.keep_plans()
        if step.acc is not None:
            self.acc, self.asr = step.acc, step.asr
        self.step, self.total = step.index, step.total
        if self.live.due:
            self._redraw()

    def _ended(self, error: BaseException | None) -> None:
        why = self.worker.why if self.worker else ""
        done = error is None and self.total and self.step == self.total
        self.trouble.error = error
        checkpoint = self._place(self.folder) / "checkpoint.safetensors"
        here = self.origin.value
        if checkpoint.exists():
            here = Origin(self.folder, read_card(checkpoint)["index"])
        self.find(None if done else here)
        self._redraw()
        # last: whoever waits for it finds all of the above settled
        self.state = "failed" if error is not None else "done" if done else "stopped"
        if why:
            self.live.happened(why)
            self.live.say(f"{why[0].upper()}{why[1:]}.")

    # --- what is shown

    def left(self) -> float | None:
        """Seconds that the run still takes at its present pace; None when that is not
        known yet.
        """
        return self.live.left(self.total)

    def _show_state(self) -> None:
        self.live.say(
            in_words(self.state, self.folder, self.step, self.total, self.live.left(self.total))
        )
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

    def _patience(self) -> None:
        if self.worker is not None:
            self.worker.needs_page = not self.controls.keep_on.value


def headless() -> bool:
    """Whether nobody is there to click."""
    return bool(os.environ.get(HEADLESS))
