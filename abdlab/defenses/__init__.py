"""Defences against an inherited backdoor. A new one is one file and one line here."""

from abdlab.defenses.defense import Defense
from abdlab.defenses.self_retrospection import SelfRetrospection
from abdlab.defenses.shuffled_teacher import ShuffledTeacher, suspicion
from abdlab.defenses.shuffling_vaccine import ShufflingVaccine, VaccineNotFound

#: name -> class, as presets and parameter cells name them
DEFENSES = {"sv": ShufflingVaccine, "sr": SelfRetrospection}

__all__ = [
    "DEFENSES",
    "Defense",
    "SelfRetrospection",
    "ShuffledTeacher",
    "ShufflingVaccine",
    "VaccineNotFound",
    "suspicion",
]
