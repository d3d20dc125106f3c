"""The knobs of a method, read off its defenses' own signatures: what can be turned while
a run goes on, and what is settled when it begins.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as w

from abdlab.defenses import DEFENSES
from abdlab.defenses.late import Late
from abdlab.defenses.plans import plan_of, steps_of, then, tunable, until
from abdlab.errors import keywords
from abdlab.labels import Label
from abdlab.settings import Settings, keyword_default
from abdlab.widgets import looks

#: parameter -> words beside its knob; others have their own name
_WORDS = {
    "k": "k (copies)",
    "layers": "shuffled layers",
    "start": "start (share)",
    "stop": "stop (share)",
    "lr": "learning rate",
}
#: parameter -> a linear slider's ends and step; one whose settings lie beyond grows
_LINEAR = {
    "alpha": (0.0, 2.0, 0.01),
    "k": (1, 8, 1),
    "layers": (1, 20, 1),
    "inner_steps": (1, 20, 1),
    "start": (0.0, 0.99, 0.01),
    "warmup": (0.0, 0.99, 0.01),
    "stop": (0.0, 1.0, 0.01),
}
#: parameter -> a logarithmic slider's ends, as powers of ten
_LOG = {"weight": (-3, 3), "lr": (-5, -2)}


@dataclass(frozen=True)
class Knob:
    """One control for one parameter of one defense.

    Attributes:
        section: the defense, as labels and settings name it.
        live: whether it can be turned while a run goes on.
        late: whether its defense has no effect before it begins.
        control: an ipywidget with a ``value``.
    """

    section: str
    key: str
    live: bool
    late: bool
    control: w.Widget

    @property
    def name(self) -> str:
        """The setting's dotted name."""
        return f"{self.section}.{self.key}"

    def of(self, chosen: Settings) -> Any:
        """The value that settings give it; of a plan, its last one."""
        return _value(chosen, self.section, self.key, self.live)

    def adopt(self, chosen: Settings) -> None:
        """Stand as the settings have it. A value that is no number leaves it alone."""
        value = self.of(chosen)
        if _is_number(value):
            _reach(self.control, value)
            self.control.value = value


def knobs_of(chosen: Settings, section: str) -> list[Knob]:
    """Knobs for every number and switch of one defense, those that can be turned while
    it trains first.

    Parameters that the settings leave without a number (None, names of layers, texts)
    have none.

    >>> from abdlab.settings import settings
    >>> knobs = knobs_of(settings("quick/digits"), "sv")
    >>> knobs[0].name, knobs[0].live, knobs[0].control.value
    ('sv.alpha', True, 0.01)

    Raises:
        ValueError: for a defense that there is not.
    """
    kind = DEFENSES.find(section)
    found = []
    for key in keywords(kind):
        live = key in tunable(kind)
        value = _value(chosen, section, key, live)
        if _is_number(value):
            whole = isinstance(value, int) and not isinstance(_default(section, key), float)
            control = _control(key, value, whole, Label(section).spoken, about(kind, key))
            found.append(Knob(section, key, live, issubclass(kind, Late), control))
    return sorted(found, key=lambda knob: not knob.live)


def about(kind: type, key: str) -> str:
    """What a class's docstring says about one of its parameters, in an entry of its own
    or where it is first mentioned; empty when nothing.

    >>> class Noise:
    ...     '''Noise on images.
    ...
    ...     Args:
    ...         mean, std: of the noise, in [0, 1] units.
    ...     '''
    >>> about(Noise, "std")
    'of the noise, in [0, 1] units.'
    """
    text = inspect.getdoc(kind) or ""
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {8,}.+)*)", text, re.MULTILINE)
    own = (words for names, words in entries if key in names.split(", "))
    everything = [*(words for _, words in entries), *re.split(r"\n\n|(?<=\.)\s", text)]
    mentioned = (words for words in everything if f"``{key}``" in words)
    return " ".join(next(itertools.chain(own, mentioned), "").split())


class Knobs(w.VBox):
    """All knobs of one method. Knobs that nobody turned leave the settings as they are.

    >>> from abdlab.settings import settings
    >>> chosen = settings("quick/digits")
    >>> knobs = Knobs()
    >>> knobs.show("zskt+sv", chosen)
    >>> knobs["sv.alpha"].control.value = 0.5
    >>> knobs.applied(chosen).values["sv"]["alpha"]
    0.5

    Args:
        turned: called with a knob and its new value, whoever turned it.
    """

    def __init__(self, turned: Callable[[Knob, Any], None] = lambda _knob, _value: None):
        self._turned, self._quiet = turned, False
        self._all: dict[str, list[Knob]] = {}
        self._before: dict[str, Any] = {}
        self._sections: tuple[str, ...] = ()
        super().__init__()

    def __getitem__(self, name: str) -> Knob:
        """A knob of the method by its setting's dotted name. Raises KeyError."""
        return next(knob for knob in self.shown if knob.name == name)

    @property
    def shown(self) -> list[Knob]:
        """The knobs of the method that is shown."""
        return [knob for section in self._sections for knob in self._all[section]]

    def show(self, label: str, chosen: Settings) -> None:
        """Show the knobs of a method, as the settings have them."""
        sections = Label.parse(label).defenses
        for section in sections:
            if section not in self._all:
                self._all[section] = knobs_of(chosen, section)
                for knob in self._all[section]:
                    knob.control.observe(
                        lambda change, knob=knob: self._hear(knob, change), "value"
                    )
        if sections != self._sections or not self.children:
            self._sections = sections
            self._lay_out()
        self._quiet = True
        for knob in self.shown:
            knob.adopt(chosen)
        self._quiet = False
        self._before = self.values()

    def values(self) -> dict[str, Any]:
        """Where each knob stands, by its name."""
        return {knob.name: knob.control.value for knob in self.shown}

    @property
    def before(self) -> dict[str, Any]:
        """Where each stood when nobody had turned it yet."""
        return dict(self._before)

    def applied(self, base: Settings, index: int | None = None) -> Settings:
        """The settings with what was turned. A live value holds from pseudo-batch
        ``index`` on; None: throughout.
        """
        values = {section: dict(options) for section, options in base.values.items()}
        for knob in self.shown:
            value = knob.control.value
            if value == self._before[knob.name]:
                continue
            section = values.setdefault(knob.section, {})
            if index is not None and knob.live:
                value = then(section.get(knob.key, _default(knob.section, knob.key)), index, value)
            section[knob.key] = value
        return replace(base, values=values)

    def lock(self, *, busy: bool, begun: bool, branches: bool) -> None:
        """Disable what can no longer change: live knobs never; the others while a run
        is ``busy`` or has ``begun``, and where it ``branches`` those of defenses that
        act from the start.
        """
        for knob in self.shown:
            settled = busy or begun or (branches and not knob.late)
            knob.control.disabled = settled and not knob.live

    def turn_back(self, name: str, value: Any) -> None:
        """Put a knob where it stood, telling nobody."""
        self._quiet, self[name].control.value, self._quiet = True, value, False

    def _hear(self, knob: Knob, change: dict) -> None:
        if not self._quiet:
            self._turned(knob, change["new"])

    def _lay_out(self) -> None:
        live = [knob.control for knob in self.shown if knob.live]
        parts = []
        for section in self._sections:
            settled = [knob.control for knob in self._all[section] if not knob.live]
            if settled:
                parts.append((f"{Label(section).spoken}: settled when a run begins", settled))
        folded = w.Accordion(
            [w.VBox(controls) for _, controls in parts], titles=[title for title, _ in parts]
        )
        nothing = looks.said("This method has no defense to tune.", "quiet")
        self.children = (*live, *([folded] if parts else [])) or (nothing,)


def trimmed(base: Settings, label: str, index: int) -> Settings:
    """The settings of a run up to pseudo-batch ``index``: values that it changed later
    on are none of its branch's.
    """
    values = {section: dict(options) for section, options in base.values.items()}
    for section in Label.parse(label).defenses:
        for key in tunable(DEFENSES.find(section)):
            if key in values.get(section, {}):
                values[section][key] = plan_of(until(values[section][key], max(1, index)))
    return replace(base, values=values)


def check_branch(label: str, old: Settings, new: Settings, index: int, length: int) -> None:
    """A branch repeats from scratch only when nothing that it changes had an effect
    before it.

    Args:
        index: the pseudo-batch at which it branches off a run of ``length``.

    Raises:
        ValueError: when a defense that begins late had begun and is now another one, or
            would have begun before the branch.
    """
    for section in Label.parse(label).defenses:
        was, now = (chosen.defenses(section)[0] for chosen in (old, new))
        if not isinstance(now, Late):
            continue
        changed = [
            key
            for key in keywords(type(now))
            if key not in tunable(now)
            and _value(old, section, key, False) != _value(new, section, key, False)
        ]
        spoken = Label(section).spoken
        if changed and was.first_of(length) < index:
            raise ValueError(
                f"{spoken} is on since step {was.first_of(length)}: branch off earlier to change"
                f" its {', '.join(changed)}"
            )
        if now.first_of(length) < index <= was.first_of(length):
            raise ValueError(
                f"{spoken} would have begun at step {now.first_of(length)}, before the branch at"
                f" {index}: start it later"
            )


def _value(chosen: Settings, section: str, key: str, live: bool) -> Any:
    value = chosen.values.get(section, {}).get(key, _default(section, key))
    return steps_of(value)[-1][1] if live and value is not inspect.Parameter.empty else value


def _default(section: str, key: str) -> Any:
    return keyword_default(DEFENSES.find(section), key)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def _control(key: str, value: float, whole: bool, whose: str, text: str) -> w.Widget:
    common = {
        "description": f"{whose}: {_WORDS.get(key, key.replace('_', ' '))}",
        "tooltip": text,
        "style": {"description_width": "160px"},
        "layout": w.Layout(width="390px"),
    }
    if isinstance(value, bool):
        return w.Checkbox(value, indent=False, **common)
    kinds = (w.IntSlider, w.IntText) if whole else (w.FloatSlider, w.FloatText)
    if key in _LOG and value > 0:
        low, high = _LOG[key]
        made = w.FloatLogSlider(
            min=low, max=high, step=0.05, readout_format=".2g", continuous_update=False, **common
        )
    elif key in _LINEAR:
        low, high, step = _LINEAR[key]
        made = kinds[0](min=low, max=high, step=step, continuous_update=False, **common)
    else:
        made = kinds[1](continuous_update=False, **common)
    _reach(made, value)
    made.value = value
    return made


def _reach(control: w.Widget, value: float) -> None:
    """Move a slider's ends so that it can stand at the value."""
    if isinstance(control, w.FloatLogSlider):
        value = math.log10(value) if value > 0 else control.min
    if isinstance(control, (w.FloatLogSlider, w.FloatSlider, w.IntSlider)):
        control.max, control.min = max(control.max, value), min(control.min, value)
