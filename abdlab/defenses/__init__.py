"""Defenses against an inherited backdoor. A new one is one file and one row here."""

from abdlab.defenses.defense import Defense
from abdlab.defenses.late import Late
from abdlab.defenses.prior import Prior
from abdlab.defenses.self_retrospection import SelfRetrospection
from abdlab.defenses.shuffled_teacher import ShuffledTeacher, suspicion
from abdlab.defenses.shuffling_vaccine import ShufflingVaccine, VaccineNotFound
from abdlab.defenses.trigger_consistency import TriggerConsistency
from abdlab.defenses.trigger_unlearning import TriggerUnlearning
from abdlab.registry import Registry

#: name -> class, as presets and parameter cells name them
DEFENSES = Registry(
    "defense",
    {
        "sv": ShufflingVaccine,
        "sr": SelfRetrospection,
        "tu": TriggerUnlearning,
        "tc": TriggerConsistency,
        "prior": Prior,
    },
)

__all__ = [
    "DEFENSES",
    "Defense",
    "Late",
    "Prior",
    "SelfRetrospection",
    "ShuffledTeacher",
    "ShufflingVaccine",
    "TriggerConsistency",
    "TriggerUnlearning",
    "VaccineNotFound",
    "suspicion",
]
