"""Tune the defense while a student is distilled: start, pause, change a weight, stop,
branch, compare, and take the run along.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from abdlab.checkpoint import read_card
from abdlab.data import Dataset
from abdlab.defenses.plans import tune
from abdlab.errors import short
from abdlab.home import at_home
from abdlab.labels import FLOOR
from abdlab.presets import METHOD
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.stream import Step
from abdlab.students import Distillation
from abdlab.teachers import shows
from abdlab.widgets import looks
from abdlab.widgets.branches import (
    Origin,
    method_of,
    origins,
)
from abdlab.widgets.controls import UNDER_WAY, WAITING
from abdlab.widgets.experiment import unknown
from abdlab.widgets.job import GETTING_READY, Job
from abdlab.widgets.knobs import Knob
from abdlab.widgets.next_run import NextRun
from abdlab.widgets.worker import Worker, current, watch_kernel

#: a teacher whose ASR is a smaller share has a backdoor too weak to study
_WEAK = 0.9
#: one with less has next to none: it asks before a student is distilled
USELESS = 0.5
#: what gets ready -> whose ACC and ASR are shown meanwhile
_OWNERS = {"clean_teacher": "clean teacher", FLOOR: "clean KD"}


class DefenseTuner(NextRun):
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
        state: "idle", "preparing" (teacher, floor), "asking" (the teacher is useless),
            "running", "paused", "stopping", "done", "stopped", "failed".
        step, total, acc, asr, floor: of the run; floor is the clean-KD student's ASR.
            Shares in [0, 1]; None where nothing is known.
        folder: the name of the run's folder.
    """

    def __init__(
        self,
        root: str | Path = "runs/walk",
        chosen: Settings | None = None,
        data: Dataset | None = None,
        label: str = METHOD,
        exams: int = 20,
        needs_page: bool = True,
    ):
        self.exams, self.needs_page = exams, needs_page
        self.going: Distillation | None = None
        #: roots whose teacher is useless, and taken all the same
        self._agreed: set[Path] = set()
        self.worker: Worker | None = None
        # a cell that is run again takes over from its former self
        if (other := current()) is not None and getattr(other, "root", None) == at_home(root):
            other.stop(
                "the cell was run again: the run has saved itself, Go on continues it", wait=60
            )
        doing = {
            "Start": self.start,
            "Pause": self.pause,
            "Stop": self.stop,
            "Branch here": self.branch,
        }
        super().__init__(root, chosen, data, label, doing)
        self.controls.keep_on.value = not needs_page
        self.controls.keep_on.observe(looks.telling(self.trouble, self._patience), "value")
        watch_kernel()

    def _turned(self, knob: Knob, value: Any) -> None:
        if self.state not in ("preparing", "asking", "running", "paused"):
            super()._turned(knob, value)
            return
        # locked; but a value that the page sent before it heard of Start may come after
        # it
        if not knob.live:
            begun = self._begun[knob.name]
            if value != begun:
                self.knobs.turn_back(knob.name, begun)
                self.live.say(
                    f"{knob.name} is {short(begun)} in this run, which had begun when the knob was"
                    " turned."
                )
            return
        super()._turned(knob, value)
        if self.going is None:
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
        if self.state in WAITING:
            self.live.rest(self.step)
            self.state = "running" if self.state == "paused" else "preparing"
            self.worker.resume()
            return
        self.trouble.error = None
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
        self.live.unknown = unknown(self._chosen)
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
            named = GETTING_READY.get(what, what)
            self.live.getting_ready(_OWNERS.get(what, what), step)
            self.live.say(f"First {named}: {step.index} of {step.total}.")

        if self._data is None:
            self._data = job.chosen.dataset()
        data = self._data
        ready, teacher, asr = job.teacher(data, tell)
        self._name()
        if not shows(job.chosen):
            asr = None  # it is not meant to have a backdoor
        new = job.origin.folder is None and self.root not in self._agreed
        if asr is not None and asr < USELESS and new and worker.alive():
            self._ask(worker, asr)
        if asr is not None and asr < _WEAK:
            self.live.happened(
                f"the teacher's ASR is {asr:.1%}: its backdoor is weak, and so is what this run"
                " can show"
            )
        wanted = self.controls.with_floor.value and job.has_floor
        later = wanted and not job.floor_is_there  # the student's first figures come before
        if wanted and not later:
            self.floor = job.floor(ready, data, teacher, tell)
        if job.cleans:
            self.live.say(f"First the teacher is cleaned: {', '.join(job.cleans)}.")
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
        if later and last.index == last.total:
            self.floor = job.floor(ready, data, teacher, self._tell_floor(worker))
            self._redraw()

    def _tell_floor(self, worker: Worker) -> Callable[[str, Step], None]:
        """Shows the floor's steps while the finished student's figures stay."""

        def tell(_: str, step: Step) -> None:
            worker.wait()
            self.live.say(f"Then {GETTING_READY[FLOOR]}: {step.index} of {step.total}.")

        return tell

    def _ask(self, worker: Worker, asr: float) -> None:
        """Wait for the user's word on a teacher that has next to no backdoor."""
        self._asked = (
            f"The teacher's ASR is {asr:.1%}: there is next to no backdoor that a student could"
            " inherit."
        )
        worker.pause()
        self.state = "asking"
        worker.wait()
        self._agreed.add(self.root)  # once is enough

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
        if self.folder and not self._place(self.folder).is_dir():
            self.folder = ""  # it ended before there was anything to keep
        self.find(None if done else here)
        self._name()
        self._redraw()
        # last: whoever waits for it finds all of the above settled
        self.state = "failed" if error is not None else "done" if done else "stopped"
        if why:
            self.live.happened(why)
            self.live.say(f"{why[0].upper()}{why[1:]}.")

    def left(self) -> float | None:
        """Seconds that the run still takes at its present pace; None when that is not
        known yet.
        """
        return self.live.left(self.total)

    def _patience(self) -> None:
        if self.worker is not None:
            self.worker.needs_page = not self.controls.keep_on.value
