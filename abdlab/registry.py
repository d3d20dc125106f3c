"""Names for classes: what a label, a preset and a parameter cell may name."""

from __future__ import annotations

import importlib
import inspect

from abdlab.errors import did_you_mean


class Registry(dict):
    """Rows of key and class. The row gives the class its ``name`` too.

    >>> class Noise: pass
    >>> sources = Registry("source", {"noise": Noise})
    >>> sources.find("noise").name
    'noise'

    A class of the user's own needs no row: it is found by its import path,
    ``my_pkg.mine:Noise``, which is then its name.
    """

    def __init__(self, what: str, rows: dict[str, type]):
        super().__init__(rows)
        self.what = what
        for key, found in rows.items():
            found.name = key

    def find(self, name: str) -> type:
        """The class of a name or an import path.

        Raises:
            ValueError: for one that there is not, with a "did you mean" or the reason.
        """
        if name in self:
            return self[name]
        if ":" not in name:
            known = did_you_mean(self.what, name, self)
            raise ValueError(f"{known}, or an import path my_pkg.mine:Name")
        return imported(self.what, name)


def imported(what: str, path: str) -> type:
    """The class at an import path, ``my_pkg.mine:Noise``; the path becomes its name.

    Raises:
        ValueError: when it cannot be imported, or is no class.
    """
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the {what} {path} cannot be imported: {error}") from None
    if not inspect.isclass(found):
        raise ValueError(f"the {what} {path} is no class but a {type(found).__name__}")
    found.name = path
    return found
