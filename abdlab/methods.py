"""Which methods there are: every source with every set of defenses that makes sense."""

from __future__ import annotations

import itertools

from abdlab.defenses import DEFENSES
from abdlab.defenses.late import Late
from abdlab.labels import Label
from abdlab.sources import SOURCES, CleanKD


def methods(*own: str) -> list[str]:
    """Labels of all methods that the registries allow, source by source.

    A source goes without a defense, with each one alone, and with one that acts from
    the start followed by one that begins late. Clean KD is left out: it is the floor
    that methods are compared with.

    Args:
        own: labels that come too, their sources first. They may name import paths and
            purifiers.

    >>> len(methods()) == len(set(methods()))
    True
    >>> methods("zskt+my_pkg.mine:Noise")[0]
    'zskt'
    >>> "zskt+my_pkg.mine:Noise" in methods("zskt+my_pkg.mine:Noise")
    True

    Raises:
        ValueError: for a text that is no label.
    """
    given = [Label.parse(label) for label in own]
    late = [name for name, found in DEFENSES.items() if issubclass(found, Late)]
    early = [name for name in DEFENSES if name not in late]
    sets = [(), *((name,) for name in DEFENSES), *itertools.product(early, late)]
    sets = dict.fromkeys([*sets, *(label.defenses for label in given)])
    sources = [name for name, found in SOURCES.items() if found is not CleanKD]
    sources = dict.fromkeys([*(label.source for label in given), *sources])
    every = [str(Label(source, defenses)) for source in sources for defenses in sets]
    return list(dict.fromkeys([*every, *map(str, given)]))
