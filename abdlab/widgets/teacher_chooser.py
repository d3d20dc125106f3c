"""The teacher that everything else is about: one that is poisoned here, or a file of
somebody's weights, opened, audited and handed on.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import ipywidgets as w
import traitlets as t
from torch import nn

from abdlab import plots
from abdlab.audit import STAGES, Audit
from abdlab.checks import stand_in
from abdlab.data import DATASETS, Dataset
from abdlab.defend import (
    audit_seconds,
    audited,
    file_settings,
    identity,
    open_file,
    preset_for,
)
from abdlab.forecast import told_time
from abdlab.home import at_home, there
from abdlab.identity import fingerprint
from abdlab.models import MODELS
from abdlab.owned import NONE, layers_told
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.widgets import looks
from abdlab.widgets.trigger_designer import TriggerDesigner
from abdlab.widgets.worker import Worker

#: test images up to which opening a file also measures its ACC; more are left to the run
_QUICK = 2000
MAKE, OPEN = "make a poisoned teacher", "open a file of weights"
#: field -> what stands in it while it is empty, and its tooltip
_FIELDS = {
    "file": ("path of .safetensors, .pt, .pth, .ckpt or .bin", "Nothing in the file is run."),
    "architecture": (
        "what the file says",
        "A name of abdlab's such as wrn-16-2, torchvision:resnet18, or my_model:TheirNet, a class"
        " in my_model.py beside the notebook.",
    ),
    "made with": ("no keywords", "What the class is made with, as a dict: {'depth': 18}."),
    "images": (
        "none",
        "For numbers only; no defense sees them: none, a folder of images, a folder with"
        " train/CLASS and test/CLASS, or a data set's name.",
    ),
    "shape": ("such as 32, or 3,32,32", "Of the images, where there are none here."),
    "classes": ("as many as the weights say", "How many there are."),
    "mean": ("images are taken as they are", "Per channel, of images that it wants normalised."),
    "std": ("images are taken as they are", "Per channel, of images that it wants normalised."),
    "key": ("the only one", "Where the state dict lies in a file with several, such as ema."),
}
#: field -> the argument of :func:`abdlab.defend.file_settings`
_SAID = {"architecture": "model", "made with": "keywords", "images": "data"}


class TeacherOpener(w.VBox):
    """Open a file of weights, audit it without data, and hand it on.

    >>> import tempfile
    >>> opener = TeacherOpener(tempfile.mkdtemp())
    >>> opener.check()
    >>> opener.trouble.sentence
    'name a file of weights first'

    Args:
        root: the folder of results; audits are kept in ROOT/audits.
        chosen: the seed and the device; where it names a file, the fields begin so.

    Traits:
        state: "idle", "auditing", "audited".
        handed: the settings of the file that was last handed on, by dotted name; None
            before.
    """

    state = t.Unicode("idle")
    handed = t.Dict(None, allow_none=True)

    def __init__(self, root: str | Path, chosen: Settings | None = None):
        self.root = at_home(root)
        self.seed, self.device = (0, "auto") if chosen is None else (chosen.seed, chosen.device)
        #: what is open: its settings, images and network, and what was said of the file
        self.opened: tuple[Settings, Dataset, nn.Module] | None = None
        self.given: dict[str, Any] = {}
        self.found: Audit | None = None
        self.worker: Worker | None = None
        self._began = self._expected = 0.0
        self.fields = {name: _field(name) for name in _FIELDS}
        #: what settings say of a file besides the fields, and which file
        self._beside: tuple[str, dict[str, Any]] = ("", {})
        self._fill(chosen)
        self.trouble, self.loaded = looks.Trouble(), looks.said()

        def heard(do: Any) -> Any:
            return looks.telling(self.trouble, do)

        self.check_button = looks.button(
            "Load and check", heard(self.check), "open it and look whether all fits", "primary"
        )
        self.audit_button = looks.button(
            "Audit", heard(self.audit), "is there a backdoor, towards which class? without data"
        )
        self.stop_button = looks.button("Stop", heard(self.stop), "end after the stage under way")
        self.use_button = looks.button(
            "Use this teacher", heard(self.hand), "the tuner distils from it next", "primary"
        )
        self.bar = w.IntProgress(
            0, 0, len(STAGES), tooltip="of the audit", layout=w.Layout(width="160px")
        )
        self.progress, self.verdict = looks.said(), looks.said()
        self.costs = looks.Picture(alt="what the cheapest trigger of every class costs")
        self.inverted = looks.Picture(alt="inverted triggers on synthetic images")
        self.empty = looks.said(
            "Load a file, then Audit: the verdict, what a trigger of every class costs, and what"
            " the cheapest ones look like appear here.",
            "empty",
        )
        left = looks.card(
            "File",
            *self.fields.values(),
            looks.row(self.check_button, self.use_button),
            self.trouble,
            self.loaded,
        )
        left.layout.width = "340px"
        right = looks.card(
            "Audit",
            looks.row(
                self.audit_button, self.stop_button, self.bar, self.progress, align_items="center"
            ),
            self.verdict,
            self.empty,
            self.inverted,
            self.costs,
            flex="1 1 400px",
            min_width="0",
        )
        super().__init__([looks.row(left, right, flex_flow="row nowrap")])
        for field in self.fields.values():
            field.observe(lambda _: self._forget(), "value")
        looks.follow_theme(self, looks.telling(self.trouble, self._draw))
        self._lock()

    def _fill(self, chosen: Settings | None) -> None:
        """Begin with what settings say of a file."""
        if chosen is None or not chosen.opened:
            return
        teacher, data = chosen.section("teacher"), chosen.section("data")
        values = {**teacher, "images": data.get("name"), "architecture": teacher.get("model")}
        values |= {"made with": teacher.get("keywords"), "shape": data.get("shape")}
        values |= {"classes": data.get("classes")}
        for name, field in self.fields.items():
            value = values.get(name)
            many = isinstance(value, (list, tuple))
            text = ",".join(map(str, value)) if many else str(value)
            field.value = "" if value is None else text
        more = {f"teacher.{key}": teacher.get(key) for key in ("width", "ignore")}
        known = {name: value for name, value in more.items() if value is not None}
        self._beside = (self.fields["file"].value, known)

    @property
    def said(self) -> dict[str, Any]:
        """What the fields say, as settings by dotted name.

        Raises:
            ValueError: for a field that holds no such thing.
        """
        texts = {name: field.value.strip() for name, field in self.fields.items()}
        file = texts.pop("file")
        if not file:
            raise ValueError("name a file of weights first")
        given: dict[str, Any] = {_SAID.get(k, k): text for k, text in texts.items() if text}
        if "classes" in given:
            if not given["classes"].isdigit():
                raise ValueError(f"classes is a number, not {given['classes']!r}")
            given["classes"] = int(given["classes"])
        more = self._beside[1] if file == self._beside[0] else {}
        return {**file_settings(there(file), **given), **more}

    def check(self) -> None:
        """Open the file, and say in one sentence what it is, or why it cannot be."""
        if self.state == "auditing":
            self.trouble.error = "an audit is under way: stop it first"
            return
        self._forget()
        looks.say(self.loaded, "Loading ...", "quiet")
        try:
            given = self.said
            with warnings.catch_warnings(record=True) as odd:
                warnings.simplefilter("always")
                chosen, data, teacher = open_file(given, self.seed, self.device)
            scores = chosen.exam(data)(teacher) if len(data.test_labels) <= _QUICK else {}
            self._expected = audit_seconds(teacher, data)
        except (ValueError, OSError, RuntimeError, TypeError) as error:
            self.trouble.error = error
            looks.say(self.loaded, "")
            return
        self.opened, self.given = (chosen, data, teacher), given
        size = f"images {'x'.join(map(str, data.shape))}, {len(data.classes)} classes"
        told = identity(chosen, scores, data.classes)
        noted = "".join(f" Note: {w.message}." for w in odd[:1])
        looks.say(self.loaded, f"Loaded: {layers_told(teacher)}; {size}; {told}.{noted}")
        looks.say(self.progress, f"takes about {told_time(self._expected)} here", "quiet")
        self._lock()

    def audit(self) -> None:
        """Audit the open teacher in the background; :attr:`found` is what came of it."""
        if self.opened is None or self.state == "auditing":
            return
        self.trouble.error, self.bar.value, self._began = None, 0, time.monotonic()
        self.worker = Worker(self._look, self._ended)
        try:
            self.worker.start()
        except RuntimeError as error:
            self.trouble.error = error
            return
        self.state = "auditing"
        self._lock()

    def stop(self) -> None:
        """End the audit after the stage under way."""
        if self.worker is not None and self.state == "auditing":
            self.worker.stop()
            looks.say(self.progress, "Stopping after this stage.")

    def hand(self) -> None:
        """Hand the file on to whoever distils: :attr:`handed` becomes its settings."""
        if self.opened is not None:
            self.handed = None  # the same once more is a change too
            self.handed = dict(self.given)

    def refused(self, why: Any) -> None:
        """Say why what was handed on was not taken."""
        self.trouble.error = why

    def preset_beside(self, chosen: Settings) -> str:
        """The preset that suits the open file's images; empty where that of an
        experiment does as well.
        """
        own = preset_for(self.opened[1].shape)
        try:
            theirs = preset_for(stand_in(chosen).shape)
        except (ValueError, OSError):
            theirs = ""
        return "" if own == theirs else own

    def _look(self, worker: Worker) -> None:
        chosen, data, teacher = self.opened

        def tell(what: str, done: int, total: int) -> None:
            if done < total:
                worker.wait()
            passed = time.monotonic() - self._began
            self.bar.value = done
            about = f"{told_time(passed)} of about {told_time(self._expected)}"
            looks.say(self.progress, f"{what}, {done} of {total} done, {about}")

        kept = Run(self.root / "audits" / fingerprint(teacher)[:12])
        self.found = audited(kept, teacher, data, chosen.seed, tell)
        self._draw()

    def _ended(self, error: BaseException | None) -> None:
        self.trouble.error = error
        if self.found is not None:
            text = self.found.verdict(self.opened[1].classes)
            looks.say(self.verdict, f"{text[0].upper()}{text[1:]}.")
            self.bar.value = self.bar.max
            looks.say(self.progress, f"done in {told_time(self.found.seconds)}", "quiet")
        else:
            looks.say(self.progress, "Stopped." if error is None else "Ended with an error.")
        # last: whoever waits for it finds all of the above settled
        self.state = "idle" if self.found is None else "audited"
        self._lock()

    def _draw(self) -> None:
        if self.found is None:
            return
        evidence, classes = self.found.evidence, self.opened[1].classes
        families = [trigger.family for trigger in evidence.bank if trigger.target == 0]
        suspects = [] if self.found.target is None else [self.found.target]
        with looks.DRAWING:
            drawn = looks.figure(5.2, 0.28 * max(5, len(classes)) + 1.2)
            plots.cost_heatmap(evidence.costs, families, classes, suspects, drawn.subplots())
            for ax in drawn.axes:
                ax.yaxis.label.set_size(8)  # of few classes the picture is low
            self.costs.draw(drawn)
            drawn = looks.figure(5.2, 0.78 * (len(self.found.triggers) + 1) + 0.4)
            self.inverted.draw(plots.inverted_figure(self.found, 5, drawn))
        looks.say(self.empty, "")

    def _forget(self) -> None:
        """Another file is meant than the one that is open."""
        if self.state == "auditing":
            return
        self.opened, self.found, self.trouble.error, self.state = None, None, None, "idle"
        for line in (self.loaded, self.progress, self.verdict):
            looks.say(line, "")
        self.costs.png = self.inverted.png = b""
        self.bar.value = 0
        self._lock()

    def _lock(self) -> None:
        busy = self.state == "auditing"
        self.audit_button.disabled = busy or self.opened is None
        self.use_button.disabled = self.opened is None
        self.check_button.disabled = busy
        self.stop_button.layout.display = "" if busy else "none"
        self.bar.layout.display = "" if busy or self.found is not None else "none"
        for field in self.fields.values():
            field.disabled = busy


class TeacherChooser(w.VBox):
    """Make a poisoned teacher, or open somebody's.

    >>> import tempfile
    >>> chooser = TeacherChooser(tempfile.mkdtemp())
    >>> chooser.way.value = OPEN
    >>> chooser.opener.layout.display == "" and chooser.designer.layout.display
    'none'

    Args:
        root, chosen, data: as for :class:`abdlab.widgets.TriggerDesigner`.

    Attributes:
        way: which of the two; designer, opener: the widgets for each.
    """

    def __init__(
        self,
        root: str | Path = "runs/walk",
        chosen: Settings | None = None,
        data: Dataset | None = None,
    ):
        opened = chosen is not None and chosen.opened is not None
        self.way = w.ToggleButtons(
            options=[MAKE, OPEN],
            value=OPEN if opened else MAKE,
            tooltips=["its trigger is designed here", "a stranger's: no trigger is known"],
            style={"button_width": "auto"},
        )
        self.designer = TriggerDesigner(root, chosen, data)
        self.opener = TeacherOpener(root, chosen)
        super().__init__([self.way, self.designer, self.opener])
        looks.dress(self)
        self.way.observe(lambda _: self._show(), "value")
        self._show()

    def _show(self) -> None:
        for part, way in ((self.designer, MAKE), (self.opener, OPEN)):
            part.layout.display = "" if self.way.value == way else "none"


def _field(name: str) -> w.Widget:
    empty, tooltip = _FIELDS[name]
    common = {
        "description": name,
        "placeholder": empty,
        "tooltip": tooltip,
        "style": {"description_width": "82px"},
        "layout": w.Layout(width="318px"),
    }
    offered = {
        "architecture": [*MODELS, "torchvision:resnet18"],
        "images": [NONE, *DATASETS],
    }.get(name)
    if offered:
        return w.Combobox(options=offered, ensure_option=False, **common)
    return w.Text(**common)
