"""abdlab: does the student that I distilled from a stranger's model carry its backdoor,
and how do I get rid of it?

Data-free knowledge distillation from poisoned teachers and the defense ABD (Hong et
al., ICML 2023, arXiv 2306.02368). This module hands names on and defines nothing.
"""

from abdlab.attacks.optimize import PGD, optimize
from abdlab.attacks.photographs import poison_photograph
from abdlab.attacks.poison import Attack, Poisoned, poison, poison_many, triggered_test
from abdlab.attacks.triggers import TRIGGERS, Trigger, trigger_from
from abdlab.audit import Audit, audit, audit_student
from abdlab.checkpoint import load_model, read_card, save_model
from abdlab.data import Dataset, augment, load, pick_device
from abdlab.defenses import (
    SelfRetrospection,
    ShuffledTeacher,
    ShufflingVaccine,
    TriggerUnlearning,
    VaccineNotFound,
    suspicion,
)
from abdlab.distill import distill
from abdlab.errors import CheckpointError, Diverged
from abdlab.evaluate import Exam, accuracy, agreement, attack_success, predict, trigger_size
from abdlab.experiments import distill_each
from abdlab.features import record
from abdlab.forecast import forecast
from abdlab.inspection import synthesize, vaccine_of, vaccine_trials
from abdlab.models import build
from abdlab.presets import PRESETS, SCALES
from abdlab.purifiers import PURIFIERS, purify
from abdlab.runs import Run, folder_of, history, table
from abdlab.settings import Settings, settings
from abdlab.side_by_side import side_by_side
from abdlab.sources import (
    CGDFKD,
    CMI,
    DAFL,
    DFAD,
    DFQ,
    NAYER,
    OOD,
    ZSKT,
    Choi,
    CleanKD,
    DeepInversion,
    FastDFKD,
    Mixed,
)
from abdlab.stream import Step, progress, stages
from abdlab.students import clean_teacher_control, distill_all, distillation, distilled
from abdlab.teachers import WeakTeacher, clean_teacher, poisoned_teacher, prepare, ready_triggers
from abdlab.train import train
from abdlab.values import merged

__version__ = "0.1.0"

__all__ = [
    "CGDFKD",
    "CMI",
    "DAFL",
    "DFAD",
    "DFQ",
    "NAYER",
    "OOD",
    "PGD",
    "PRESETS",
    "PURIFIERS",
    "SCALES",
    "TRIGGERS",
    "ZSKT",
    "Attack",
    "Audit",
    "CheckpointError",
    "Choi",
    "CleanKD",
    "Dataset",
    "DeepInversion",
    "Diverged",
    "Exam",
    "FastDFKD",
    "Mixed",
    "Poisoned",
    "Run",
    "SelfRetrospection",
    "Settings",
    "ShuffledTeacher",
    "ShufflingVaccine",
    "Step",
    "Trigger",
    "TriggerUnlearning",
    "VaccineNotFound",
    "WeakTeacher",
    "accuracy",
    "agreement",
    "attack_success",
    "audit",
    "audit_student",
    "augment",
    "build",
    "clean_teacher",
    "clean_teacher_control",
    "distill",
    "distill_all",
    "distill_each",
    "distillation",
    "distilled",
    "folder_of",
    "forecast",
    "history",
    "load",
    "load_model",
    "merged",
    "optimize",
    "pick_device",
    "poison",
    "poison_many",
    "poison_photograph",
    "poisoned_teacher",
    "predict",
    "prepare",
    "progress",
    "purify",
    "read_card",
    "ready_triggers",
    "record",
    "save_model",
    "settings",
    "side_by_side",
    "stages",
    "suspicion",
    "synthesize",
    "table",
    "train",
    "trigger_from",
    "trigger_size",
    "triggered_test",
    "vaccine_of",
    "vaccine_trials",
]
