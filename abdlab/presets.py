"""Named settings. A preset overrides the defaults of the signatures; a caller's overrides come last.

``settings("quick/digits", {"sv.alpha": 0.2})`` is one resolved :class:`Settings`; its methods make the data set, the
networks, the sources and the defences that it describes. Sections are those of :data:`SECTIONS`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from abdlab.data import Dataset, load
from abdlab.defenses import DEFENSES, Defense
from abdlab.errors import check_keys, did_you_mean, keywords
from abdlab.evaluate import Exam
from abdlab.models import build
from abdlab.poison import Poisoned, poison
from abdlab.sources import SOURCES, CleanKD, Source
from abdlab.train import train
from abdlab.triggers import Trigger, trigger_from

_MODEL = ["model", "width"]
_LOOP = {"exam", "exam_every", "seed", "device"}
_AUGMENT = {"shift", "flip"}


def _free(function, *taken: str) -> list[str]:
    """The keywords that a preset may set: those with a default, less what the run itself provides."""
    parameters = inspect.signature(function).parameters
    return [k for k in keywords(function) if parameters[k].default is not inspect.Parameter.empty and k not in taken]


#: section -> the keys it may have, read off the signatures that they are handed to
SECTIONS: dict[str, list[str]] = {
    "data": ["name", "root", "size", "download"],
    "attack": ["trigger", "params", "rate", "target", "clean_label"],
    "teacher": [*_MODEL, *_free(train, *_LOOP, *_AUGMENT)],
    "student": _MODEL,
    "zskt": _free(SOURCES["zskt"]),
    "dafl": _free(SOURCES["dafl"]),
    "dfad": _free(SOURCES["dfad"]),
    "dfq": _free(SOURCES["dfq"]),
    "cmi": _free(SOURCES["cmi"], *_AUGMENT),
    "deepinversion": _free(SOURCES["deepinversion"], *_AUGMENT),
    "clean": _free(SOURCES["clean"], *_AUGMENT),
    "sv": _free(DEFENSES["sv"]),
    "sr": _free(DEFENSES["sr"]),
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # A laptop's CPU, minutes. Tuned on seed 0; the README has the figures over seeds 1 to 3: there SV and SR are too weak.
    "quick/digits": {
        "data": {"name": "digits"},
        "attack": {"trigger": "badnet_sq", "params": {"size": 4}, "rate": 0.1, "target": 0},
        "teacher": {"model": "wrn-10-2", "epochs": 12, "batch_size": 64, "schedule": "onecycle"},
        "student": {"model": "wrn-10-1"},
        "zskt": {"pseudo_batches": 400, "batch_size": 32, "width": 24},
        "cmi": {
            "rounds": 10,
            "synthesis_steps": 40,
            "kd_steps": 40,
            "synthesis_batch": 64,
            "batch_size": 64,
            "width": 24,
            "negatives": 512,
        },
        "deepinversion": {"rounds": 10, "synthesis_steps": 60, "kd_steps": 40, "synthesis_batch": 64, "batch_size": 64},
        "clean": {"epochs": 100, "batch_size": 64},
        # no shuffle seen on digits had the tail that verification asks for (see the README): the first one is used unseen
        "sv": {"layers": 2, "alpha": 0.55, "cap": 1.0, "verify": False},
        "sr": {"start": 0.85, "weight": 0.1, "anchor": "detached", "inner_steps": 5, "delta_every": 10, "lr": 2e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """One experiment, resolved: ``values`` holds what the preset and the overrides set, by section; the rest is default."""

    preset: str
    values: dict[str, dict[str, Any]]
    seed: int = 0
    device: str = "auto"

    def config(self, *sections: str) -> dict:
        """Plain values as a run's folder records them: all of :data:`SECTIONS`, or those that the run depends on."""
        chosen = {name: copy.deepcopy(self.values[name]) for name in sections or SECTIONS}
        return {"preset": self.preset, "seed": self.seed, **chosen}

    def dataset(self) -> Dataset:
        """The data set, on the device."""
        return load(**self.values["data"], device=self.device)

    @property
    def trigger(self) -> Trigger:
        """The attack's trigger."""
        attack = self.values["attack"]
        return trigger_from(attack["trigger"], attack.get("params"))

    @property
    def target(self) -> int:
        """The class that the trigger calls."""
        return self.values["attack"].get("target", keyword_default(poison, "target"))

    def poison(self, data: Dataset) -> Poisoned:
        """The training set with the attack on it, drawn from the run's seed."""
        options = {k: v for k, v in self.values["attack"].items() if k in ("rate", "target", "clean_label")}
        return poison(data.train_images, data.train_labels, self.trigger, seed=self.seed, **options)

    def exam(self, data: Dataset) -> Exam:
        """ACC and ASR on the test split."""
        return Exam.of(data.test_images, data.test_labels, self.trigger, self.target)

    def teacher(self, data: Dataset) -> nn.Module:
        """An untrained teacher for the data set."""
        return self._model("teacher", data, self.seed)

    def student(self, data: Dataset) -> nn.Module:
        """An untrained student, drawn from another seed than the teacher."""
        return self._model("student", data, self.seed + 1_000_000)

    def training(self, data: Dataset) -> dict:
        """Keywords of :func:`abdlab.train.train` for the teacher."""
        options = {k: v for k, v in self.values["teacher"].items() if k not in _MODEL}
        return {**options, "shift": data.shift, "flip": data.flip, "seed": self.seed, "device": self.device}

    def source(self, name: str, data: Dataset) -> Source:
        """A fresh source; only clean KD touches real images, the others take their shape.

        One that shifts or mirrors images does it as far as the data set's own fields say that labels stay true.
        """
        if name not in SOURCES:
            raise ValueError(did_you_mean("source", name, SOURCES))
        options = {k: getattr(data, k) for k in _AUGMENT & set(keywords(SOURCES[name]))} | self.values[name]
        if name == "clean":
            return CleanKD(data.train_images, data.train_labels, **options)
        return SOURCES[name](data.shape, **options)

    def defenses(self, *names: str) -> list[Defense]:
        """Fresh defences by name, "sv" and "sr"."""
        for name in names:
            if name not in DEFENSES:
                raise ValueError(did_you_mean("defence", name, DEFENSES))
        return [DEFENSES[name](**self.values[name]) for name in names]

    def _model(self, role: str, data: Dataset, seed: int) -> nn.Module:
        values = {k: v for k, v in self.values[role].items() if k in _MODEL}
        return build(
            values.pop("model"),
            **values,
            classes=len(data.classes),
            channels=data.shape[0],
            mean=data.mean,
            std=data.std,
            seed=seed,
        )


def settings(
    preset: str = "quick/digits",
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Settings:
    """Resolve a preset and overrides.

    Args:
        preset: a name of :data:`PRESETS`.
        overrides: values by dotted name, such as ``{"zskt.pseudo_batches": 100, "sv.alpha": None}``; None keeps the
            preset's value. Naming another ``attack.trigger`` drops the preset's ``attack.params``.

    Raises:
        ValueError: for an unknown preset, section or key, with a "did you mean".
    """
    if preset not in PRESETS:
        raise ValueError(did_you_mean("preset", preset, PRESETS))
    values = copy.deepcopy(PRESETS[preset])
    check_keys("setting", overrides or {}, [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys])
    overrides = {key: value for key, value in (overrides or {}).items() if value is not None}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        if name == "attack.trigger" and value != values["attack"].get("trigger") and "attack.params" not in overrides:
            values["attack"].pop("params", None)
        values.setdefault(section, {})[key] = value
    for section in SECTIONS:
        check_keys(f"setting of {section}", values.setdefault(section, {}), SECTIONS[section])
    return Settings(preset, values, seed, str(device))


def keyword_default(function, name: str) -> Any:
    """The default that a signature gives: the one home of the number."""
    return inspect.signature(function).parameters[name].default
