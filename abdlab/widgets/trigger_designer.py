"""A trigger by hand: see at once what it does to images, how large it is, and hand it
to a training run or save it.
"""

from __future__ import annotations

import html
import inspect
import time
from pathlib import Path
from typing import Any

import ipywidgets as w
import torch
import traitlets as t
import yaml

from abdlab.attacks.poison import Attack
from abdlab.attacks.triggers import CORNERS, TRIGGERS, Trigger
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
        self.root, self.device, self.data, self._quiet = at_home(root), chosen.device, data, False
        self._data_values = dict(chosen.values["data"])
        self._start = chosen.trigger.params
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
        self._build(self.trigger.value, self._knobs, self.controls, dict(self._start))
        self._build(
            self.also.value,
            self._knobs_more,
            self._more,
            dict(chosen.trigger.then[0].params) if chosen.trigger.then else {},
        )
        self.dataset.observe(lambda _: self._load(), "value")
        self.trigger.observe(
            lambda c: self._build(c["new"], self._knobs, self.controls) or self.draw(), "value"
        )
        self.also.observe(
            lambda c: self._build(c["new"], self._knobs_more, self._more) or self.draw(), "value"
        )
        for control in (self.rate, self.target):
            control.observe(lambda _: self.draw(), "value")
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
            f" {gain:.3g}. The trigger shall call the class {html.escape(self._class())}.</div>"
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
        self.handed = None  # handing the same on again is a change too
        self.handed = dict(self.overrides)
        looks.say(
            self.note,
            f"Handed on: {self.designed} for class {self._class()}, {self.rate.value:.1%}"
            " poisoned.",
        )

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

    def _build(
        self, name: str, box: w.VBox, controls: dict[str, w.Widget], values: dict | None = None
    ) -> None:
        """Controls for the parameters of one trigger, read off its signature."""
        controls.clear()
        if name != _NONE:
            for key in keywords(TRIGGERS[name])[1:]:
                if key != "pattern":
                    controls[key] = self._control(name, key, (values or {}).get(key))
        for control in controls.values():
            control.observe(lambda _: self.draw(), "value")
        box.children = tuple(controls.values())

    def _control(self, name: str, key: str, value: Any) -> w.Widget:
        default = inspect.signature(TRIGGERS[name]).parameters[key].default
        side = min(self.data.shape[1:]) if self.data is not None else 32
        looks_like = {
            "description": _WORDS.get(key, key),
            "style": {"description_width": "118px"},
            "layout": w.Layout(width="330px"),
        }
        if key == "corner":
            return w.Dropdown(
                options=[(c.replace("_", " "), c) for c in CORNERS],
                value=value or default,
                **looks_like,
            )
        if key == "size":
            least = 3 if "grid" in name or name == "cl" else 2
            return w.IntSlider(
                value or max(least, round(side * 3 / 32)), min=1, max=side, **looks_like
            )
        if key in ("margin", "pattern_seed"):
            return w.IntSlider(
                default if value is None else value, min=0, max=max(1, side // 2), **looks_like
            )
        if key == "frequency":
            return w.FloatSlider(
                default if value is None else value,
                min=0.5,
                max=side / 2,
                step=0.5,
                readout_format=".1f",
                **looks_like,
            )
        return w.FloatSlider(
            default if value is None else value, min=0, max=1, step=0.01, **looks_like
        )


def _plain(value: Any) -> Any:
    """Values that YAML writes without tags of its own."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, torch.Tensor) else value
