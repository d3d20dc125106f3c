"""The knobs of a method, read off its defenses' own signatures: what can be turned while
a run goes on, and what is settled when it begins.
"""

from __future__ import annotations

import html
import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import ipywidgets as w

from abdlab.defenses import DEFENSES
from abdlab.defenses.late import Late
from abdlab.defenses.plans import plan_of, steps_of, then, tunable, until
from abdlab.errors import keywords
from abdlab.labels import Label
from abdlab.presets import PRESETS
from abdlab.purifiers import PURIFIERS
from abdlab.settings import Settings, keyword_default
from abdlab.values import hints
from abdlab.widgets import looks
from abdlab.widgets.dial import Dial

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
    "k": (1, 8, 1),
    "layers": (1, 20, 1),
    "inner_steps": (1, 60, 1),
    "start": (0.0, 0.99, 0.01),
    "warmup": (0.0, 0.99, 0.01),
    "stop": (0.0, 1.0, 0.01),
    "fraction": (0.01, 1.0, 0.01),
    "threshold": (0.0, 0.2, 0.005),
    "agreement": (0.5, 1.0, 0.01),
}
#: parameter -> the ends of a slider that goes by decades
_LOG = {"alpha": (1e-3, 10.0), "weight": (1e-3, 1e3), "lr": (1e-5, 1e-1), "penalty": (1e-4, 1.0)}
#: parameter -> what a higher value does
_HIGHER = {
    "alpha": "keeps images further from where teacher and vaccine agree, and costs accuracy",
    "weight": "removes more of the backdoor, and costs accuracy",
    "inner_steps": "finds stronger triggers, and takes longer",
    "lr": "changes the student faster; too high undoes what it learnt",
    "start": "leaves more time to learn, and less to defend",
    "stop": "defends longer",
    "warmup": "verifies on more images, and defends less long",
    "copies": "shuffles more, and takes longer",
    "layers": "shuffles more, and the vaccine answers more at random",
    "natural": "unlearns more triggers, some of which may be a class's own features",
    "rounds": "unlearns more, and takes longer",
    "steps": "unlearns more, and takes longer",
    "triggers": "unlearns more at once, and each is seen less often",
    "renewals": "makes new triggers more often, and takes longer",
    "threshold": "refuses vaccines that find little",
}
#: parameter -> what it is, where its docstring says "see the module's head"
_HEAD = {
    "class_mean": "divide the term by the number of classes as well",
    "ascent": "weights rise on suspicious samples, as in the official code; the paper weakens them",
    "reverse": "KL(T || T~) as in the official code, not KL(T~ || T) as printed",
    "cap": "upper limit of the term, in nats; none: no limit",
}
#: the preset of the paper's own values, where a section has one
_PAPER = next(name for name in PRESETS if name.startswith("paper/"))


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
        if _is_number(value) or (value is None and getattr(self.control, "optional", False)):
            self.control.value = value


def knobs_of(chosen: Settings, section: str) -> list[Knob]:
    """Knobs for every number and switch of one defense or purifier, those that can be
    turned while it trains first.

    A number that may be None can be switched off; parameters that are names or texts
    have no knob.

    >>> from abdlab.settings import settings
    >>> knobs = knobs_of(settings("quick/digits"), "sv")
    >>> knobs[0].name, knobs[0].live, knobs[0].control.value
    ('sv.alpha', True, 0.01)

    Raises:
        ValueError: for one that there is not.
    """
    kind, found = kind_of(section), []
    for key in keywords(kind):
        live = key in tunable(kind)
        value = _value(chosen, section, key, live)
        if not _is_number(value) and not (value is None and _may_be_off(kind, key)):
            continue
        late = issubclass(kind, Late)
        found.append(Knob(section, key, live, late, _control(section, key, value, kind)))
    return sorted(found, key=lambda knob: not knob.live)


def kind_of(section: str) -> type:
    """The class of a defense or a purifier by its name. Raises ValueError for neither."""
    return PURIFIERS[section] if section in PURIFIERS else DEFENSES.find(section)


def explained(kind: type, section: str, key: str) -> str:
    """A knob's tooltip: what its parameter does, what more of it does, and the paper's
    value where there is one.

    >>> print(explained(DEFENSES["sv"], "sv", "alpha"))
    of the synthesis term; may be a plan.
    Higher keeps images further from where teacher and vaccine agree, and costs accuracy.
    The paper has 0.1; the default is 0.1.
    """
    lines, ours = [_plainly(kind, key)], kind.__module__.startswith("abdlab.")
    higher = _HIGHER.get("copies" if lines[0].startswith("copies") else key)
    if ours and higher:
        lines.append(f"Higher {higher}.")
    default, paper = _default(section, key), PRESETS[_PAPER].get(section, {}).get(key)
    said = [f"The paper has {paper}"] if paper is not None else []
    if ours and default is not inspect.Parameter.empty:
        said.append(f"{'the' if said else 'The'} default is {default}")
    return "\n".join([*filter(None, lines), *([f"{'; '.join(said)}."] if said else [])])


def _plainly(kind: type, key: str) -> str:
    """What a parameter is, without the marks of a docstring."""
    text = about(kind, key)
    if text.startswith("see :class:") and issubclass(kind, Late):
        text = about(Late, key)
    if text.startswith("see the module"):
        text = _HEAD.get(key, "")
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return re.sub(r"[`*]+", "", text).rstrip(":")


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
        method = Label.parse(label)
        sections = (*method.defenses, *method.purifiers)
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

    def turned(self) -> dict[str, Any]:
        """The knobs that stand elsewhere than the settings had them, by name."""
        return {name: v for name, v in self.values().items() if v != self._before[name]}

    def turn(self, values: Mapping[str, Any]) -> None:
        """Put knobs where they stood, telling nobody; names that are not shown are left
        out.
        """
        self._quiet = True
        for knob in self.shown:
            if knob.name in values:
                knob.control.value = values[knob.name]
        self._quiet = False

    def turn_back(self, name: str, value: Any) -> None:
        """Put a knob where it stood, telling nobody."""
        self._quiet, self[name].control.value, self._quiet = True, value, False

    def _hear(self, knob: Knob, change: dict) -> None:
        if not self._quiet:
            self._turned(knob, change["new"])

    def _lay_out(self) -> None:
        groups, folded = [], []
        for section in self._sections:
            kind, knobs = kind_of(section), self._all[section]
            what = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
            title = f"{Label(section).spoken}: {what}"
            if live := [knob.control for knob in knobs if knob.live]:
                groups += [_title(title), *live]
            if settled := [knob.control for knob in knobs if not knob.live]:
                box = w.VBox(settled, layout=w.Layout(overflow="hidden"))
                folded.append((f"{Label(section).spoken}: settled at the start", box))
        if folded:
            titles, boxes = zip(*folded, strict=True)
            groups.append(w.Accordion(boxes, titles=titles))
        nothing = looks.said("This method has no defense to tune.", "quiet")
        self.children = tuple(groups) or (nothing,)


def _title(text: str) -> w.HTML:
    return w.HTML(f'<div class="abdlab-group">{html.escape(text)}</div>')


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
    return keyword_default(kind_of(section), key)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def _may_be_off(kind: type, key: str) -> bool:
    """Whether a parameter is a number or None, and nothing else."""
    annotation = hints(kind).get(key)
    if get_origin(annotation) not in (Union, UnionType):
        return False
    kinds = {*get_args(annotation)}
    return NoneType in kinds and kinds <= {NoneType, int, float}


def _control(section: str, key: str, value: float | None, kind: type) -> w.Widget:
    whose, text = Label(section).spoken, explained(kind, section, key)
    label = _WORDS.get(key, key.replace("_", " "))
    if isinstance(value, bool):
        layout = w.Layout(width="auto")
        return w.Checkbox(value, indent=False, description=label, tooltip=text, layout=layout)
    default = _default(section, key)
    example = value if value is not None else default
    annotated = {*get_args(hints(kind).get(key))}
    whole = (
        isinstance(example, int) and not isinstance(default, float)
        if example is not None and example is not inspect.Parameter.empty
        else float not in annotated
    )
    made = Dial(value=None, optional=True, whole=whole, label=label, tooltip=text)
    made.description = f"{whose}: {label}"
    if key in _LOG and not whole:
        made.log, (made.low, made.high) = True, _LOG[key]
    elif key in _LINEAR:
        made.low, made.high, made.step = map(float, _LINEAR[key])
    else:
        made.low, made.high, made.step = _span(example, whole)
    made.value = value
    made.optional = _may_be_off(kind, key)
    return made


def _span(value: Any, whole: bool) -> tuple[float, float, float]:
    """A slider's ends and step for a number of which nothing is known but one value."""
    size = abs(value) if isinstance(value, (int, float)) and value else 1.0
    if whole:
        high = max(4.0, 4.0 * size)
        return 0.0, high, max(1.0, float(round(high / 40)))
    return 0.0, 4 * size, size / 50
