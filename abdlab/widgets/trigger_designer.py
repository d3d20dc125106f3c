"""A trigger by hand: see at once what it does to images, how large it is, and hand it
to a training run or save it.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import torch
import traitlets as t
import yaml

from abdlab.attacks.poison import Attack
from abdlab.attacks.triggers import TRIGGERS, Trigger
from abdlab.checkpoint import write_atomically
from abdlab.data import Dataset, load
from abdlab.errors import keywords
from abdlab.evaluate import trigger_size
from abdlab.home import at_home
from abdlab.settings import Settings, settings
from abdlab.teachers import made_trigger
from abdlab.widgets import looks
from abdlab.widgets.branches import root_of
from abdlab.widgets.dial import Dial
from abdlab.widgets.experiment import with_teacher
from abdlab.widgets.trigger_controls import control_of

_NONE = "nothing more"
#: images that the sizes are means over
_MEASURED = 16


class TriggerDesigner(w.VBox):
    """Choose a data set, one or two triggers and their parameters, target and poison
    rate; see them on images at once.

    >>> import tempfile
    >>> designer = TriggerDesigner(tempfile.mkdtemp())
    >>> designer.trigger.value = "blend"
    >>> designer.controls["alpha"].value = 0.3
    >>> designer.overrides["attack.trigger"], designer.overrides["attack.params"]["alpha"]
    ('blend', 0.3)

    Args:
        root: where triggers are saved, in ROOT/triggers.
        chosen: where it begins: data set, trigger, rate and target.
        data: the data set, to spare loading it.

    Traits:
        overrides: what is designed, as overrides for :func:`abdlab.settings`.
        handed: the overrides that were last handed to a training run; None before.
        sizes: l0, l2, linf and ssim, see :func:`abdlab.trigger_size`.
        seconds: how long the latest picture took to make.
    """

    overrides = t.Dict()
    handed = t.Dict(None, allow_none=True)
    sizes = t.Dict()
    seconds = t.Float(0.0)

    def __init__(
        self,
        root: str | Path = "runs/walk",
        chosen: Settings | None = None,
        data: Dataset | None = None,
    ):
        chosen = settings() if chosen is None else chosen
        if chosen.trigger is None:  # of a stranger's teacher nothing is known to begin with
            chosen = settings(chosen.preset, seed=chosen.seed, device=chosen.device)
            data = None
        self.root, self.device, self.data, self._quiet = at_home(root), chosen.device, data, False
        self._data_values = dict(chosen.values["data"])
        self._chosen = chosen
        #: place -> parameters without a control, of a trigger that was loaded
        self._patterns: dict[str, dict[str, Any]] = {}
        #: (place, trigger) -> the parameters that it was left with
        self._left: dict[tuple[str, str], dict[str, Any]] = {}
        name = self._data_values["name"]
        style = {"description_width": "92px"}
        wide = w.Layout(width="auto")
        self.dataset = w.Dropdown(
            options=list(dict.fromkeys([name, "digits", "cifar10", "gtsrb"])),
            value=name,
            description="data set",
            style=style,
            layout=wide,
        )
        self.trigger = w.Dropdown(
            options=list(TRIGGERS),
            value=chosen.trigger.name,
            description="trigger",
            style=style,
            layout=wide,
        )
        also = chosen.trigger.then[0].name if chosen.trigger.then else _NONE
        self.also = w.Dropdown(
            options=[_NONE, *TRIGGERS],
            value=also,
            description="and on top",
            style=style,
            layout=wide,
        )
        self.rate = Dial(
            value=chosen.attacks[0].rate,
            high=0.5,
            step=0.005,
            continuous=True,
            label="poison rate",
            description="poison rate",
            tooltip="Share of the training images that carry the trigger: higher is learnt more"
            " easily, and seen more easily.",
        )
        self.target = w.Dropdown(
            options=[("?", chosen.target)], description="target class", style=style, layout=wide
        )
        self.controls: dict[str, w.Widget] = {}
        self._more: dict[str, w.Widget] = {}
        self._knobs, self._knobs_more = w.VBox(), w.VBox()
        self.name = w.Text(value="my-trigger", description="name", style=style, layout=wide)
        self.picture = looks.Picture(alt="clean, triggered and difference of the same images")
        self.measured, self.note, self.trouble = w.HTML(), looks.said(), looks.Trouble()
        self._legend = w.HTML()
        self.save_button = looks.button(
            "Save", self.save, "write the trigger to ROOT/triggers as YAML parameters"
        )
        self.hand_button = looks.button(
            "Use in a training run",
            self.hand,
            "hand data set, trigger, rate and target on",
            "primary",
        )
        self.shift_button = looks.button(
            "Other images", self.shift, "show the next images of the data set"
        )
        self.shift_button.layout.align_self = "flex-start"
        self._first = 0
        left = looks.card(
            "Attack",
            self.dataset,
            self.trigger,
            self._knobs,
            self.also,
            self._knobs_more,
            self.target,
            self.rate,
        )
        self.saved = w.Dropdown(description="saved", style=style, layout=w.Layout(width="auto"))
        save = looks.card(
            "Use or keep it",
            self.hand_button,
            self.trouble,
            self.note,
            self.name,
            self.save_button,
            self.saved,
        )
        right = looks.card(
            "What it does",
            self._legend,
            self.picture,
            self.measured,
            self.shift_button,
            flex="1 1 560px",
        )
        narrow = w.Layout(width="312px", flex="0 0 312px", grid_gap="8px")
        column = w.VBox([left, save], layout=narrow)
        super().__init__([looks.row(column, right, flex_flow="row nowrap")])
        looks.dress(self)
        self._left["first", chosen.trigger.name] = dict(chosen.trigger.params)
        for then in chosen.trigger.then[:1]:
            self._left["more", then.name] = dict(then.params)
        self._build("first", self.trigger.value)
        self._build("more", self.also.value)

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.dataset.observe(heard(self._load), "value")
        self.trigger.observe(lambda change: self._choose("first", change), "value")
        self.also.observe(lambda change: self._choose("more", change), "value")
        self.saved.observe(heard(self._open), "value")
        self._list()
        for control in (self.rate, self.target):
            control.observe(heard(self.draw), "value")
        self._load()

    @property
    def designed(self) -> Trigger:
        """The trigger as the controls have it."""
        made = Trigger(self.trigger.value, self._parameters("first"))
        if self.also.value != _NONE:
            made = made + Trigger(self.also.value, self._parameters("more"))
        return made

    def _parameters(self, place: str) -> dict[str, Any]:
        """What the controls of a place say, and a loaded pattern, which has none."""
        values = {name: control.value for name, control in self._place(place)[1].items()}
        return {**self._patterns.get(place, {}), **values}

    def draw(self) -> None:
        """Show the trigger as the controls have it now; called at every change."""
        if self.data is None or self._quiet:
            return
        began = time.perf_counter()
        try:
            trigger = self.designed
            Attack(trigger, int(self.target.value), self.rate.value)
            images = self.data.test_images[self._first : self._first + _MEASURED].cpu()
            designed, trigger = trigger, self._made(trigger)
            if trigger.needs_pattern:
                self._without_pattern(trigger)
                return
            triggered = trigger(images)
            sizes = trigger_size(images, trigger)
        except ValueError as error:
            self.trouble.error = error
            return
        shown = slice(0, 8)
        difference = (triggered - images).abs()[shown]
        gain = 1 / difference.max().clamp_min(1e-6).item()
        self.picture.png = looks.mosaic(
            [images[shown], triggered[shown], difference * gain], side=76, gap=4
        )
        self._legend.value = (
            '<div class="abdlab-quiet">Rows: clean; triggered; difference, brightened x'
            f" {gain:.3g}. With the trigger on, a model shall predict {html.escape(self._class())}."
            "</div>"
        )
        pairs = [
            ("l0: pixels changed", f"{sizes['l0']:.1%}"),
            ("l2", f"{sizes['l2']:.3f}"),
            ("l∞", f"{sizes['linf']:.3f}"),
        ]
        self.measured.value = looks.scores([*pairs, ("SSIM", f"{sizes['ssim']:.3f}")])
        self.trouble.error = None
        self.sizes, self.overrides = sizes, self._overrides(designed)
        self.seconds = time.perf_counter() - began
        self.hand_button.disabled = self.save_button.disabled = False

    def _made(self, trigger: Trigger) -> Trigger:
        """The trigger with its pattern where a run has optimised it already."""
        if not trigger.needs_pattern:
            return trigger
        chosen = with_teacher(self._chosen, self._overrides(trigger))
        return made_trigger(root_of(self.root, chosen), chosen) or trigger

    def hand(self) -> None:
        """Hand the attack to a training run: :attr:`handed` becomes :attr:`overrides`."""
        looks.say(
            self.note,
            f"Handed on: {self.designed} for class {self._class()}, {self.rate.value:.1%}"
            " poisoned.",
        )
        self.handed = None  # handing the same on again is a change too
        self.handed = dict(self.overrides)

    def refused(self, why: Any) -> None:
        """Say why what was handed on was not taken."""
        self.trouble.error = why
        looks.say(self.note, "")

    def save(self) -> Path | None:
        """Write ROOT/triggers/NAME.yaml: parameters for ``papermill -f``, whose
        overrides any notebook here takes.
        """
        name = self.name.value.strip()
        if not name or Path(name).name != name or name.startswith("."):
            self.trouble.error = f"a trigger's name is a file's name, without folders, not {name!r}"
            return None
        text = f"# {self.designed}\n" + yaml.safe_dump(
            {"overrides": _plain(self.overrides)}, sort_keys=False
        )
        path = write_atomically(self.root / "triggers" / f"{name}.yaml", text.encode())
        looks.say(self.note, f"Saved as {path}.")
        self._list()
        return path

    def load(self, name: str) -> None:
        """Show a saved trigger, ROOT/triggers/NAME.yaml, with its data set, rate and
        target.

        Raises:
            ValueError: for a file that holds no trigger's parameters.
        """
        path = self.root / "triggers" / f"{name}.yaml"
        try:
            overrides = dict(yaml.safe_load(path.read_text())["overrides"])
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no trigger that was saved here") from error
        chosen = settings(self._chosen.preset, overrides)
        trigger, rest = chosen.trigger, chosen.trigger.then[:1]
        data = chosen.values["data"]
        if data["name"] not in self.dataset.options:
            self.dataset.options = [*self.dataset.options, data["name"]]
        if data != self._data_values:
            self.data, self._data_values = None, dict(data)
            self.dataset.value = data["name"]
            if self.data is None:  # the same one otherwise
                self._load()
        self._quiet = True
        for place, part in (("first", trigger), ("more", rest[0] if rest else None)):
            shown = self.trigger if place == "first" else self.also
            shown.value = part.name if part else _NONE
            if part is not None:
                self._left[place, part.name] = dict(part.params)
                self._build(place, part.name)
        self.rate.value = chosen.attacks[0].rate
        self.target.value = chosen.target
        self._quiet = False
        self.name.value = name
        self.draw()
        looks.say(self.note, f"Loaded {path}.")

    def _list(self) -> None:
        """Offer what is saved."""
        names = sorted(path.stem for path in (self.root / "triggers").glob("*.yaml"))
        self.saved.options = [("choose one to load", ""), *((name, name) for name in names)]
        self.saved.value = ""
        self.saved.layout.display = "" if names else "none"

    def _open(self) -> None:
        if self.saved.value:
            self.load(self.saved.value)

    def shift(self) -> None:
        """Show the next images."""
        if self.data is not None:
            self._first = (self._first + 8) % max(1, len(self.data.test_images) - _MEASURED)
            self.draw()

    def _class(self) -> str:
        return self.data.classes[int(self.target.value)]

    def _overrides(self, trigger: Trigger) -> dict[str, Any]:
        spec = (
            {"attack.trigger": trigger.card()}
            if trigger.then
            else {"attack.trigger": trigger.name, "attack.params": trigger.params}
        )
        data = {f"data.{key}": value for key, value in self._data_values.items()}
        return {
            **data,
            **spec,
            "attack.rate": self.rate.value,
            "attack.target": int(self.target.value),
        }

    def _without_pattern(self, trigger: Trigger) -> None:
        self.picture.png, self.measured.value, self._legend.value, self.trouble.error = (
            b"",
            "",
            "",
            None,
        )
        self.sizes, self.overrides = {}, self._overrides(trigger)
        self.hand_button.disabled = self.save_button.disabled = False
        text = (
            f"{trigger} is optimised against a clean model, so that there is nothing to see yet."
            " Hand it to a training run: that makes it first."
        )
        self._legend.value = f'<div class="abdlab-empty">{html.escape(text)}</div>'

    def _load(self) -> None:
        name = self.dataset.value
        if self.data is None or name != self.data.name:
            values = self._data_values if name == self._data_values["name"] else {"name": name}
            try:
                self.data = load(**values, device=self.device)
            except (ValueError, OSError, RuntimeError) as error:
                self.data, self.picture.png, self.measured.value = None, b"", ""
                self.hand_button.disabled = self.save_button.disabled = True
                looks.say(self._legend, f"{name} cannot be shown.", "empty")
                self.trouble.error = error
                return
            self._data_values = dict(values)
        self._quiet = True
        target = int(self.target.value or 0)
        self.target.options = [
            (f"{i}: {c}" if str(i) != c else c, i) for i, c in enumerate(self.data.classes)
        ]
        self.target.value = target if target < len(self.data.classes) else 0
        side = min(self.data.shape[1:])
        for control in (
            c
            for group in (self.controls, self._more)
            for c in group.values()
            if isinstance(c, Dial) and c.description.startswith("size")
        ):
            control.high = max(control.high, side)
        self._first, self._quiet = 0, False
        self.draw()

    def _choose(self, place: str, change: dict) -> None:
        """Another trigger: with the parameters that it was left with, else with those
        that the preset recommends for it, else with its own defaults.
        """

        def do() -> None:
            controls = self._place(place)[1]
            if not self._quiet:
                self._left[place, change["old"]] = {key: c.value for key, c in controls.items()}
            if place == "first" and self.rate.value == self._recommended(change["old"])["rate"]:
                self.rate.value = self._recommended(change["new"])["rate"]
            self._build(place, change["new"])
            self.draw()

        looks.telling(self.trouble, do)()

    def _recommended(self, name: str) -> dict[str, Any]:
        """What the preset says about an attack with this trigger: rate, and params."""
        known = settings(self._chosen.preset, {"attack.trigger": name}).values["attack"]
        return {"rate": Attack.rate, **known}

    def _place(self, place: str) -> tuple[w.VBox, dict[str, w.Widget]]:
        return {"first": (self._knobs, self.controls), "more": (self._knobs_more, self._more)}[
            place
        ]

    def _build(self, place: str, name: str) -> None:
        """Controls for the parameters of one trigger, read off its signature."""
        box, controls = self._place(place)
        controls.clear()
        hidden: dict[str, Any] = {}
        if name != _NONE:
            recommended = self._recommended(name).get("params", {})
            values = hidden = self._left.get((place, name), recommended)
            side = min(self.data.shape[1:]) if self.data is not None else 32
            for key in keywords(TRIGGERS[name])[1:]:
                made = control_of(name, key, values.get(key), side)
                if made is not None:
                    controls[key] = made
        self._patterns[place] = {k: v for k, v in hidden.items() if k not in controls}

        def changed() -> None:
            self._patterns[place] = {}  # it was made for what stood there
            self.draw()

        for control in controls.values():
            control.observe(looks.telling(self.trouble, changed), "value")
        box.children = tuple(controls.values())


def _plain(value: Any) -> Any:
    """Values that YAML writes without tags of its own."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, torch.Tensor) else value
