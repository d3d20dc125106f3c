"""Triggers inverted on the student, and unlearnt by it."""

from __future__ import annotations

from abdlab.defenses.self_retrospection import SelfRetrospection


class TriggerUnlearning(SelfRetrospection):
    """Ours."""

    @property
    def name(self) -> str:
        return "tu"
