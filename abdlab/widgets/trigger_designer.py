"""A trigger by hand: see at once what it does to images, how large it is, and hand it
to a training run or save it.
"""

from __future__ import annotations

import html
import inspect
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import torch
import traitlets as t
import yaml

from abdlab.attacks.poison import Attack
from abdlab.attacks.triggers import ADVERSARIAL, CORNERS, TRIGGERS, Trigger
from abdlab.checkpoint import write_atomically
from abdlab.data import Dataset, load
from abdlab.errors import keywords
from abdlab.evaluate import trigger_size
from abdlab.home import at_home
from abdlab.settings import Settings, settings
from abdlab.widgets import looks

#: what a parameter's control is called
_WORDS = {
    "size": "size (pixels)",
    "corner": "position",
    "margin": "margin (pixels)",
    "alpha": "strength",
    "strength": "strength",
    "value": "brightness",
    "frequency": "periods per width",
    "pattern_seed": "pattern",
}
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
        self._preset = chosen.preset
        #: (place, trigger) -> the parameters that it was left with
        self._left: dict[tuple[str, str], dict[str, Any]] = {}
        name = self._data_values["name"]
        style = {"description_width": "118px"}
        wide = w.Layout(width="330px")
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
        self.rate = w.FloatSlider(
            chosen.attacks[0].rate,
            min=0,
            max=0.5,
            step=0.005,
            readout_format=".1%",
            description="poison rate",
            style=style,
            layout=wide,
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
        save = looks.card("Keep it", self.name, looks.row(self.hand_button, self.save_button))
        right = looks.card(
            "What it does",
            self._legend,
            self.picture,
            self.measured,
            self.shift_button,
            flex="1 1 560px",
        )
        column = w.VBox([left, save], layout=w.Layout(width="372px", grid_gap="8px"))
        super().__init__([self.trouble, looks.row(column, right), self.note])
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
        for control in (self.rate, self.target):
            control.observe(heard(self.draw), "value")
        self._load()

    @property
    def designed(self) -> Trigger:
        """The trigger as the controls have it."""
        made = Trigger(self.trigger.value, {name: c.value for name, c in self.controls.items()})
        if self.also.value != _NONE:
            made = made + Trigger(
                self.also.value, {name: c.value for name, c in self._more.items()}
            )
        return made

    def draw(self) -> None:
        """Show the trigger as the controls have it now; called at every change."""
        if self.data is None or self._quiet:
            return
        began = time.perf_counter()
        try:
            trigger = self.designed
            Attack(trigger, int(self.target.value), self.rate.value)
            images = self.data.test_images[self._first : self._first + _MEASURED].cpu()
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
        self.sizes, self.overrides = sizes, self._overrides(trigger)
        self.seconds = time.perf_counter() - began
        self.hand_button.disabled = self.save_button.disabled = False

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
        return path

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
            if isinstance(c, w.IntSlider)
        ):
            control.max = (
                max(control.max, side) if control.description.startswith("size") else control.max
            )
        self._first, self._quiet = 0, False
        self.draw()

    def _choose(self, place: str, change: dict) -> None:
        """Another trigger: with the parameters that it was left with, else with those
        that the preset recommends for it, else with its own defaults.
        """

        def do() -> None:
            controls = self._place(place)[1]
            self._left[place, change["old"]] = {key: c.value for key, c in controls.items()}
            if place == "first" and self.rate.value == self._recommended(change["old"])["rate"]:
                self.rate.value = self._recommended(change["new"])["rate"]
            self._build(place, change["new"])
            self.draw()

        looks.telling(self.trouble, do)()

    def _recommended(self, name: str) -> dict[str, Any]:
        """What the preset says about an attack with this trigger: rate, and params."""
        known = settings(self._preset, {"attack.trigger": name}).values["attack"]
        return {"rate": Attack.rate, **known}

    def _place(self, place: str) -> tuple[w.VBox, dict[str, w.Widget]]:
        return {"first": (self._knobs, self.controls), "more": (self._knobs_more, self._more)}[
            place
        ]

    def _build(self, place: str, name: str) -> None:
        """Controls for the parameters of one trigger, read off its signature."""
        box, controls = self._place(place)
        controls.clear()
        if name != _NONE:
            recommended = self._recommended(name).get("params", {})
            values = self._left.get((place, name), recommended)
            side = min(self.data.shape[1:]) if self.data is not None else 32
            for key in keywords(TRIGGERS[name])[1:]:
                made = control_of(name, key, values.get(key), side)
                if made is not None:
                    controls[key] = made
        for control in controls.values():
            control.observe(looks.telling(self.trouble, self.draw), "value")
        box.children = tuple(controls.values())


def control_of(name: str, key: str, value: Any, side: int) -> w.Widget | None:
    """The control for one parameter of a trigger, by its name or else by its type;
    None for a pattern, and for a parameter that says no type.

    >>> type(control_of("badnet_sq", "size", None, 32)).__name__
    'IntSlider'

    Args:
        name: of the trigger. key: of the parameter.
        value: what it stands at; None takes the signature's default.
        side: of the images, in pixels.
    """
    if key == "pattern":
        return None
    given = inspect.signature(TRIGGERS[name]).parameters[key].default
    default = None if given is inspect.Parameter.empty else given
    value = default if value is None else value
    common = {
        "description": _WORDS.get(key, key.replace("_", " ")),
        "style": {"description_width": "118px"},
        "layout": w.Layout(width="330px"),
    }
    if key == "corner":
        corners = [(c.replace("_", " "), c) for c in CORNERS]
        return w.Dropdown(options=corners, value=value, **common)
    if key == "size":
        least = 3 if "grid" in name or name in ADVERSARIAL else 2
        value = value or max(least, round(side * 3 / 32))
        return w.IntSlider(value, min=1, max=max(side, value), **common)
    if key in ("margin", "pattern_seed"):
        return w.IntSlider(value, min=0, max=max(1, side // 2, value), **common)
    if key == "frequency":
        return w.FloatSlider(
            value, min=0.5, max=max(side / 2, value), step=0.5, readout_format=".1f", **common
        )
    kind = type(value) if value is not None else _annotated(TRIGGERS[name], key)
    if kind is bool:
        return w.Checkbox(bool(value), indent=False, **common)
    if kind is int:
        return w.IntText(value or 0, **common)
    if kind is float and 0 <= (value or 0.0) <= 1:
        return w.FloatSlider(value or 0.0, min=0, max=1, step=0.01, **common)
    if kind is float:
        return w.FloatText(value, **common)
    return w.Text(value or "", **common) if kind is str else None


def _annotated(function: Callable, key: str) -> type | None:
    """The plain type that a signature says, the first of several; None for none."""
    said = typing.get_type_hints(function).get(key)
    kinds = typing.get_args(said) or (said,)
    return next((kind for kind in kinds if kind in (bool, int, float, str)), None)


def _plain(value: Any) -> Any:
    """Values that YAML writes without tags of its own."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, torch.Tensor) else value
