"""A run as it trains: status, numbers, curves, images, and what happened on the way."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence

import ipywidgets as w
import pandas as pd
from torch import Tensor

from abdlab import plots
from abdlab.stream import Step
from abdlab.widgets import looks

#: figures may take this share of the time, at most
_DRAWING_SHARE = 0.15
#: steps whose pace is that of all of them
_FEW = 30
_SCORES = ("acc", "asr")
NOTHING = "No run yet: press Start, and curves and images appear here while the student learns."


class Live(w.VBox):
    """What is known of one run so far, drawn no more often than drawing may take time.

    >>> live = Live()
    >>> live.add("zskt", Step(1, 8, {"kd": 0.5}, acc=0.9, asr=0.2))
    >>> live.redraw(floor=0.02)
    >>> len(live.rows), live.curves.png[1:4]
    (1, b'PNG')

    Attributes:
        rows: one dict per step, as a history has them.
        head: status, bar and numbers in one line, for a place above this one.
        unknown: those of "acc" and "asr" that cannot be known, for want of labelled
            images or of a known attack.
        events: sentences, each once.
        grid: the picture of the latest images, for a place beside this one.
    """

    def __init__(self):
        self.rows: list[dict] = []
        self.events: list[str] = []
        self.unknown: tuple[str, ...] = ()
        self._images: Tensor | None = None
        self._latest: Step | None = None
        self._pace: list[tuple[int, float]] = []
        self._new = True
        self._drawn, self._drawing = 0.0, 0.0
        self.status, self.empty = looks.said(), looks.said(NOTHING, "empty")
        self.bar = w.IntProgress(0, 0, 1, tooltip="of the run", layout=w.Layout(width="110px"))
        self.numbers, self.notes = w.HTML(), w.HTML()
        self.status.layout.flex = "1 1 200px"
        self.head = looks.row(self.status, self.bar, self.numbers, align_items="center")
        self.head.layout.flex_flow = "row nowrap"
        self.head.add_class("abdlab-now")
        self.curves = looks.Picture(alt="ACC, ASR and losses over training")
        self.grid = looks.Picture(alt="images that the student learns from")
        super().__init__([self.empty, self.curves, self.notes], layout=w.Layout(min_width="0"))
        self.bar.layout.display = "none"

    def clear(self) -> None:
        """Forget the run."""
        self.rows, self.events, self._images, self._latest = [], [], None, None
        self.notes.value, self.curves.png, self.grid.png = "", b"", b""
        self.numbers.value, self.bar.value, self.bar.layout.display = "", 0, "none"
        self._drawn = 0.0
        self.rest()
        self._new = True

    def show(self, rows: Sequence[Mapping], step: Step, floor: float | None = None) -> None:
        """A run that is there already, as far as it came: its history, and the step that
        it ended with.
        """
        self.clear()
        self.rows = [dict(row) for row in rows]
        for row in self.rows:
            if isinstance(row.get("events"), list):  # a table has NaN where there are none
                self.happened(*row["events"])
        self._images, self._latest = step.images, step
        self.redraw(floor)

    def rest(self, index: int | None = None) -> None:
        """Time does not count until the next step, or from now on, at step ``index``."""
        self._pace.clear()
        self._new = False
        if index is not None:
            self._pace.append((index, time.monotonic()))

    def say(self, text: str) -> None:
        """Put a sentence on top."""
        looks.say(self.status, text)

    def progress(self, step: Step) -> None:
        """Fill the bar as far as a step says."""
        self.bar.max, self.bar.value = max(1, step.total), step.index
        self.bar.layout.display = ""

    def getting_ready(self, who: str, step: Step) -> None:
        """Show a step of what must be there before the student: the bar, and in place of
        the student's numbers those of ``who`` where the step has any.
        """
        self.progress(step)
        pairs = [(f"{who}'s ACC", step.acc), (f"{who}'s ASR", step.asr)]
        if known := [(name, looks.percent(share)) for name, share in pairs if share is not None]:
            self.numbers.value = looks.scores(known)

    def happened(self, *events: str) -> None:
        """Note events that are not there yet."""
        self.events += [event for event in dict.fromkeys(events) if event not in self.events]
        lines = "".join(f"<li>{html.escape(event)}</li>" for event in self.events)
        style = 'class="abdlab-said" style="margin: 4px 0; padding-left: 18px"'
        self.notes.value = f"<ul {style}>{lines}</ul>" if lines else ""

    def add(self, label: str, step: Step) -> None:
        """Take one step in."""
        if self._new:  # a source may make images first, for many steps: that counts
            self._pace.append((step.index - 1, time.monotonic() - step.seconds))
            self._new = False
        self._pace.append((step.index, time.monotonic()))
        scores = {"acc": step.acc, "asr": step.asr, "events": list(step.events) or None}
        self.rows.append({"label": label, "step": step.index, **step.losses, **scores})
        if step.images is not None:
            self._images = step.images
        if step.events:
            self.happened(*step.events)
        self._latest = step

    @property
    def due(self) -> bool:
        """Whether it is time to draw again: a second later, or longer where drawing
        takes long, with the first scores and at the end.
        """
        step = self._latest
        if step is None:
            return False
        first = step.acc is not None and not self._drawn
        wait = max(1.0, self._drawing / _DRAWING_SHARE)
        return step.index == step.total or first or time.monotonic() - self._drawn > wait

    def left(self, total: int) -> float | None:
        """Seconds to step ``total`` at the pace of the latter half of the steps so far:
        a source that works in rounds (CMI makes images, then the student learns from
        them for many steps) has quick and slow ones. None when that is not known yet.
        """
        if len(self._pace) < 3:
            return None
        since = len(self._pace) // 2 if len(self._pace) > 2 * _FEW else 0
        (first, began), (last, now) = self._pace[since], self._pace[-1]
        return (now - began) / (last - first) * (total - last)

    def redraw(self, floor: float | None = None) -> None:
        """Draw all of it; ``floor`` is the clean-KD student's ASR, a share."""
        began = time.monotonic()
        if self._latest is not None:
            self.progress(self._latest)
        if self.rows:
            self._scores(floor)
            self._curves(floor)
        looks.say(self.empty, "" if self.rows else NOTHING, "empty")
        if self._images is not None:
            self.grid.png = looks.mosaic([self._images[:64]], 8, side=31, gap=3)
        self._drawn = time.monotonic()
        self._drawing = self._drawn - began

    def _scores(self, floor: float | None) -> None:
        scored = next((row for row in reversed(self.rows) if pd.notna(row.get("acc"))), {})
        acc, asr = (
            "unknown" if name in self.unknown else looks.percent(scored.get(name))
            for name in _SCORES
        )
        pairs = [("ACC", acc), ("ASR", asr)]
        if floor is not None:
            pairs.append(("floor (clean KD)", looks.percent(floor)))
        self.numbers.value = looks.scores(pairs)

    def _curves(self, floor: float | None) -> None:
        history = pd.DataFrame(self.rows)
        with looks.DRAWING:
            if "acc" in self.unknown:  # the losses alone
                drawn = looks.figure(5.6, 3.0)
                plots.loss_curves(history, drawn.subplots())
                self.curves.draw(drawn)
                return
            drawn = looks.figure(5.6, 4.3)
            above, below = drawn.subplots(2, 1)
            if history["acc"].notna().any():
                plots.training_curves(history, above, floor)
            else:
                above.set(
                    xlabel="training step (pseudo-batch)",
                    ylabel="share of test images (%)",
                    ylim=(-3, 103),
                )
            plots.loss_curves(history, below)
            self.curves.draw(drawn)


class Compared(w.HBox):
    """ACC and ASR of chosen runs in one picture.

    >>> compared = Compared()
    >>> compared.offer(["zskt@1", "zskt@2"])
    >>> compared.runs.options
    ('zskt@1', 'zskt@2')
    """

    def __init__(self):
        self.runs = w.SelectMultiple(
            options=[], rows=8, tooltip="runs to compare", layout=w.Layout(width="230px")
        )
        self.picture = looks.Picture(alt="ACC and ASR of the chosen runs")
        choose = w.VBox([looks.said("Choose several with Ctrl or Shift.", "quiet"), self.runs])
        super().__init__([looks.row(choose, self.picture)])

    def offer(self, names: Sequence[str]) -> None:
        """Let these runs be chosen; those that are chosen and still there stay so."""
        chosen = [name for name in self.runs.value if name in names]
        if list(self.runs.options) != list(names):
            self.runs.options = names
            self.runs.value = tuple(chosen)

    def show(self, histories: Mapping[str, pd.DataFrame], floor: float | None = None) -> None:
        """Draw these histories, by the names of their runs; none shows nothing."""
        if not histories:
            self.picture.png = b""
            return
        with looks.DRAWING:
            drawn = looks.figure(7.6, 3.0)
            plots.branch_curves(histories, drawn.subplots(1, 2), floor)
            self.picture.draw(drawn)


def in_words(state: str, folder: str, step: int, total: int, left: float | None = None) -> str:
    """What a tuner's state means, as a sentence; ``left`` in seconds.

    >>> in_words("running", "zskt@1", 3, 8, 40.0)
    'Training zskt@1: step 3 of 8, about 40 s left.'
    """
    at = f"step {step} of {total}" if total else "the first step"
    about = f", about {duration(left)} left" if left is not None else ""
    stopped = (
        f"Stopped and saved {folder} at {at}: Go on continues it, Branch here tries another weight."
    )
    return {
        "idle": "",
        "preparing": "Getting ready: data and teacher.",
        "running": f"Training {folder}: {at}{about}.",
        "paused": f"Paused {folder} at {at}: weights can be changed, Go on continues.",
        "asking": "Go on all the same, or Stop and change the trigger, its rate or the training.",
        "stopping": "Stopping: the step is finished, the student measured and saved.",
        "done": f"Done: {folder}, {total} steps.",
        "stopped": stopped if step else "Stopped.",
        "failed": "This run ended with an error.",
    }[state]


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(75), duration(600), duration(9000)
    ('75 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
