"""A method's label as a value: what it is made of, what it is called, where it stands."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

#: what a label looks like, for error messages
GRAMMAR = "purifier+purifier/source+defense+defense, such as zskt+sv+sr or bounded/cmi+tc"

#: the source of a label that names a teacher itself, plain or purified: bounded/teacher
TEACHER = "teacher"

#: the source that needs real data: its students are the floor, and this is their folder
FLOOR = "clean"

#: how figures and tables name models that are no plain method
_SPOKEN = {TEACHER: "teacher", FLOOR: "clean KD"}

#: one part: a registered name, or an import path my_pkg.mine:Noise
_PART = re.compile(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*)?")


@dataclass(frozen=True)
class Label:
    """A method by its parts: ``purifier+purifier/source+defense+defense``.

    >>> label = Label.parse("bounded+unlearn/cmi+tc")
    >>> label.source, label.defenses, label.purifiers
    ('cmi', ('tc',), ('bounded', 'unlearn'))
    >>> str(label), label.folder
    ('bounded+unlearn/cmi+tc', 'bounded+unlearn,cmi+tc')

    Attributes:
        source: where the student's inputs come from; "teacher" for a teacher itself.
        defenses: in the order in which they act.
        purifiers: in the order in which they clean the teacher.
    """

    source: str
    defenses: tuple[str, ...] = ()
    purifiers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | Label) -> Label:
        """The label that a text names. Whether its parts exist is the registries' to say.

        Raises:
            ValueError: for a text that is no label, or names a part twice.
        """
        if isinstance(text, Label):
            return text
        *before, after = str(text).split("/")
        purifiers = before[0].split("+") if before else []
        source, *defenses = after.split("+")
        parts = [*purifiers, source, *defenses]
        if len(before) > 1 or not all(_PART.fullmatch(part) for part in parts):
            raise ValueError(f"a method is {GRAMMAR}, not {str(text)!r}")
        twice = next((part for part in parts if parts.count(part) > 1), None)
        if twice:
            raise ValueError(f"{str(text)!r} names {twice} twice: each part of a method acts once")
        return cls(source, tuple(defenses), tuple(purifiers))

    @classmethod
    def of_folder(cls, name: str) -> Label:
        """The label that has this :attr:`folder`.

        >>> str(Label.of_folder("bounded,cmi+my_pkg.mine.Noise"))
        'bounded/cmi+my_pkg.mine:Noise'

        Raises:
            ValueError: for a name that is no label's folder.
        """
        return cls.parse(re.sub(r"\.(\w+)(?=[+/]|$)", r":\1", name.replace(",", "/")))

    def __str__(self) -> str:
        after = "+".join((self.source, *self.defenses))
        return "/".join((*(["+".join(self.purifiers)] if self.purifiers else []), after))

    @property
    def folder(self) -> str:
        """The name of its folder: the label without characters that paths give a meaning."""
        return str(self).replace("/", ",").replace(":", ".")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts; each has a section in the settings."""
        return (*self.purifiers, self.source, *self.defenses)

    @property
    def defense(self) -> str:
        """All that defends, without the source: "bounded/" + "tc"; "" when nothing does."""
        before = "+".join(self.purifiers) + "/" if self.purifiers else ""
        return before + "+".join(self.defenses)

    @property
    def undefended(self) -> bool:
        """Whether it has neither defense nor purifier."""
        return not self.defenses and not self.purifiers

    @property
    def spoken(self) -> str:
        """How figures and tables call it: "teacher", "clean KD", "ZSKT+SV", "BOUNDED/CMI+TC"."""
        own = _SPOKEN.get(self.source, _short(self.source).upper())
        after = "+".join((own, *(_short(name).upper() for name in self.defenses)))
        before = "+".join(map(_short, self.purifiers))
        return f"{before}/{after}" if before else after

    def without(self, names: Collection[str]) -> Label:
        """The same method without these defenses."""
        return replace(self, defenses=tuple(d for d in self.defenses if d not in names))

    def forks(self, names: Collection[str]) -> list[Label]:
        """The methods that train alike until one of these defenses begins, itself left out.

        >>> [str(other) for other in Label.parse("zskt+sr").forks(["sr"])]
        ['zskt']
        >>> [str(other) for other in Label.parse("zskt").forks(["sr"])]
        ['zskt+sr']
        """
        trunk = self.without(names)
        family = [trunk, *(replace(trunk, defenses=(*trunk.defenses, name)) for name in names)]
        return [other for other in family if other != self]


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def name_of(label: str | Label) -> str:
    """How figures and tables call a model, see :attr:`Label.spoken`."""
    return "clean teacher" if label == "clean_teacher" else Label.parse(label).spoken


def in_order(labels: Iterable[str]) -> list[str]:
    """Each label once: teachers, clean KD, then source by source as they come, from
    undefended to all defenses.
    """
    labels = list(dict.fromkeys(labels))
    parsed = {label: Label.parse(label) for label in labels}
    sources = list(dict.fromkeys(label.source for label in parsed.values()))
    first = [name for name in _SPOKEN if name in sources]
    sources = [*first, *(name for name in sources if name not in first)]

    def place(text: str) -> tuple[int, int, int]:
        label = parsed[text]
        return sources.index(label.source), len(label.purifiers), len(label.defenses)

    return sorted(labels, key=place)
