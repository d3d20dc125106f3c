"""Defenses that begin late in a run."""

from __future__ import annotations

from abdlab.defenses.defense import Defense


class Late(Defense):
    """A defense without any effect before its first pseudo-batch."""

    def first_of(self, length: int) -> int:
        """The first pseudo-batch, counted from 0, at which it acts in a run of ``length``."""
        raise NotImplementedError
