"""Defences against an inherited backdoor. A new one is one file and one line here."""

from abdlab.defenses.defense import Defense
from abdlab.defenses.self_retrospection import SelfRetrospection
from abdlab.defenses.shuffling_vaccine import (
    ShuffledTeacher,
    ShufflingVaccine,
    VaccineNotFound,
    suspicion,
)
from abdlab.defenses.trigger_consistency import TriggerConsistency

#: name -> class, as presets and parameter cells name them
DEFENSES = {"sv": ShufflingVaccine, "sr": SelfRetrospection, "tc": TriggerConsistency}

__all__ = [
    "DEFENSES",
    "Defense",
    "SelfRetrospection",
    "ShuffledTeacher",
    "ShufflingVaccine",
    "TriggerConsistency",
    "VaccineNotFound",
    "suspicion",
]
