"""A preset and overrides, resolved into one value that makes all parts of a run.

``settings("quick/digits", {"sv.alpha": 0.2})`` is one resolved :class:`Settings`; its
methods make the data set, the networks, the sources and the defenses that it describes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from abdlab.attacks.optimize import PGD
from abdlab.attacks.poison import Attack, Poisoned, poison_many
from abdlab.attacks.triggers import Trigger, trigger_from
from abdlab.checkpoint import load_model
from abdlab.data import Dataset, load
from abdlab.defenses import DEFENSES, Defense, Late
from abdlab.distill import distill
from abdlab.errors import check_keys, did_you_mean, keywords
from abdlab.evaluate import Exam
from abdlab.labels import Label
from abdlab.models import build
from abdlab.objectives import OBJECTIVES, objective_of
from abdlab.owned import (
    IMAGES,
    NONE,
    UNSAID,
    check_shape,
    is_foreign,
    make_network,
    named_by,
    size_told,
    told_by,
    unlabelled,
)
from abdlab.presets import ATTACKS, PRESETS, SCALES
from abdlab.purifiers import PURIFIERS, Purifier
from abdlab.registry import imported
from abdlab.sources import SOURCES, Source
from abdlab.sources.source import AUGMENT
from abdlab.train import train
from abdlab.values import as_dict

_MODEL = ["model", "width", "keywords"]
#: how a teacher that was not trained here is opened, and how a clean one is fine-tuned
_OPENED = ["file", "key", "ignore", "mean", "std", "tune"]
#: what an import path in a label may name
_PART = "source, defense, purifier or training objective"
_LOOP = {"exam", "exam_every", "seed", "device"}
#: fields of an :class:`~abdlab.attacks.poison.Attack` that are plain values
_ATTACK = ["rate", "target", "clean_label", "relabel", "covers"]


#: what one attack may say; "optimize" holds options of its trigger's method
#: (:mod:`abdlab.attacks.optimize`), for cl those of PGD
ATTACK = ["trigger", "params", *_ATTACK, "optimize"]


def _free(function, *taken: str) -> list[str]:
    """The keywords that a preset may set: those with a default, less what the run
    itself provides.
    """
    parameters = inspect.signature(function).parameters
    return [
        k
        for k in keywords(function)
        if parameters[k].default is not inspect.Parameter.empty and k not in taken
    ]


#: section -> the keys it may have, read off the signatures that they are handed to
SECTIONS: dict[str, list[str]] = {
    "data": ["name", "root", "size", "download", "shape", "classes"],
    # more: a list of further attacks on the same teacher, each a dict of the same keys
    "attack": [*ATTACK, "more"],
    "teacher": [*_MODEL, *_OPENED, *_free(train, *_LOOP, *AUGMENT)],
    "student": [*_MODEL, "precision", "graphs", "compile"],  # and how the distillation computes
    **{name: source.keys() for name, source in SOURCES.items()},
    **{name: _free(found) for name, found in {**DEFENSES, **PURIFIERS}.items()},
    # target and trigger are the attack's
    **{name: _free(found, "target", "trigger") for name, found in OBJECTIVES.items()},
}


def keys_of(section: str) -> list[str]:
    """The keys that a section may have; one named by an import path takes those of its class.

    Raises:
        ValueError: for a section that there is not.
    """
    if section in SECTIONS:
        return SECTIONS[section]
    if ":" not in section:
        raise ValueError(did_you_mean("section", section, SECTIONS))
    found = imported(_PART, section)
    return found.keys() if issubclass(found, Source) else _free(found)


@dataclass(frozen=True)
class Settings:
    """One experiment, resolved: ``values`` holds what the preset and the overrides set,
    by section; the rest is default.
    """

    preset: str
    values: dict[str, dict[str, Any]]
    seed: int = 0
    device: str = "auto"
    #: file of the clean model that cl's images are perturbed against;
    #: :func:`abdlab.teachers.prepare` sets it
    clean_model: str | None = field(default=None, compare=False)

    def config(self, *sections: str) -> dict:
        """Plain values as a run's folder records them: all sections, or those that the run
        depends on.
        """
        names = list(sections or self.values)
        objective = self.section("teacher").get("objective")
        if "teacher" in names and objective not in (None, *names):
            names.append(objective)
        chosen = {name: copy.deepcopy(self.section(name)) for name in names}
        return {"preset": self.preset, "seed": self.seed, **chosen}

    def overrides(self) -> dict[str, Any]:
        """What :func:`settings` needs besides the preset's name to make these values
        again, by dotted name.
        """
        plain = settings(self.preset).values
        changed = {
            f"{s}.{k}": v
            for s, values in self.values.items()
            for k, v in values.items()
            if plain[s].get(k, ...) != v
        }
        # naming a trigger brings what the preset recommends for it
        again = settings(self.preset, changed).values
        return changed | {
            f"{s}.{k}": v
            for s, values in self.values.items()
            for k, v in values.items()
            if again[s].get(k, ...) != v
        }

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        device: str | torch.device = "auto",
        rest: Settings | None = None,
    ) -> Settings:
        """The settings that a run's config.json records; sections that it did not
        depend on are those of ``rest``, or the preset's.
        """
        plain = (
            replace(rest, seed=config["seed"])
            if rest
            else settings(config["preset"], seed=config["seed"], device=device)
        )
        recorded = {k: copy.deepcopy(v) for k, v in config.items() if isinstance(v, dict)}
        for section, values in recorded.items():
            unknown = [key for key in values if key not in keys_of(section)]
            if unknown:
                raise ValueError(
                    f"this run was made by another version of abdlab: its {section} has the"
                    f" settings {', '.join(unknown)}, which there are no more. Run it anew in"
                    " another folder"
                )
        return replace(plain, values={**plain.values, **recorded})

    def dataset(self) -> Dataset:
        """The data set, on the device; of "none" and "images:PATH" without labels."""
        if not self.labelled:
            return unlabelled(self.section("data")["name"], *self.shape_and_classes(), self.device)
        own = {k: v for k, v in self.values["data"].items() if k not in ("shape", "classes")}
        return load(**own, device=self.device)

    @property
    def labelled(self) -> bool:
        """Whether there are images with labels, so that ACC can be known."""
        return self.section("data").get("name", "").partition(":")[0] not in (NONE, IMAGES)

    @property
    def opened(self) -> str | None:
        """The file of a teacher that was not trained here."""
        return self.section("teacher").get("file")

    def shape_and_classes(self) -> tuple[tuple[int, int, int], int | list[str]]:
        """(C, H, W) and the classes of a run without labelled images: what the settings
        say, and the weights where those do not. A shape of one number is that of a
        square, and channels are the weights'. Unlabelled images of one size tell theirs.

        Raises:
            ValueError: naming the setting that is missing.
        """
        data, teacher = self.section("data"), self.section("teacher")
        classes, shape, told = data.get("classes"), data.get("shape"), None
        kind, _, folder = data["name"].partition(":")
        if shape is None and kind == IMAGES:
            shape = size_told(folder)
        short = isinstance(shape, (list, tuple)) and len(shape) < 3
        if (classes is None or short) and self.opened:
            _, told, channels = told_by(self.opened, teacher.get("key"))
            shape = [channels, *shape, *shape][:3] if short and channels else shape
        shape = check_shape(shape, "weights do not say how large images are")
        classes = told if classes is None else classes
        if classes is None:
            raise ValueError(
                "the weights do not say how many classes there are: set data.classes, a number or"
                " a list of names"
            )
        return shape, classes

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """Every attack on the teacher, the main one first; without adversaries, which
        :meth:`poison` adds.
        """
        return tuple(
            Attack(
                trigger_from(values["trigger"], values.get("params")),
                **{k: v for k, v in values.items() if k in _ATTACK},
            )
            for values in self.attack_values
        )

    @property
    def attack_values(self) -> list[dict[str, Any]]:
        """The plain values of every attack, the main one first; none for a teacher of
        which no attack is known.
        """
        attack = self.values["attack"]
        known = attack.get("trigger") is not None
        return [attack, *attack.get("more", [])] if known else []

    def unpoisoned(self) -> Settings:
        """The same settings with every attack's rate at 0 and without covers: its
        teacher has no backdoor.

        Raises:
            ValueError: for a teacher from a file: there is no such twin of it.
        """
        if self.opened:
            raise ValueError(
                f"{self.opened} is not trained here, so that it has no twin without a backdoor"
            )
        attack, *more = (
            {**{k: v for k, v in values.items() if k != "covers"}, "rate": 0.0}
            for values in self.attack_values
        )
        attack = {**attack, "more": [dict(values) for values in more]} if more else attack
        return replace(self, values={**self.values, "attack": attack})

    @property
    def trigger(self) -> Trigger | None:
        """The (main) attack's trigger; None where none is known."""
        return self.attacks[0].trigger if self.attack_values else None

    @property
    def target(self) -> int | None:
        """The class that the (main) attack's trigger calls; None where none is known."""
        return self.attacks[0].target if self.attack_values else None

    def poison(self, data: Dataset) -> Poisoned:
        """The training set with the attacks on it, drawn from the run's seed.

        Raises:
            ValueError: for an attack that needs a clean model (an optimised trigger, or
                cl), before :func:`abdlab.teachers.prepare` has made the settings ready.
        """
        attacks = [
            (
                replace(
                    attack,
                    adversary=PGD(load_model(self.clean_model), **values.get("optimize", {})),
                )
                if attack.needs_adversary and self.clean_model
                else attack
            )
            for attack, values in zip(self.attacks, self.attack_values, strict=True)
        ]
        return poison_many(
            data.train_images, data.train_labels, attacks, self.seed, len(data.classes)
        )

    def exam(self, data: Dataset) -> Exam:
        """ACC and ASR on the test split; of several attacks each, and the mean."""
        return Exam.of(data.test_images, data.test_labels, self.attacks, classes=len(data.classes))

    def teacher(self, data: Dataset) -> nn.Module:
        """An untrained teacher for the data set, or the network that its file names.

        Raises:
            ValueError: for a file that names none, and no ``teacher.model``.
        """
        if self.opened and self.section("teacher").get("model") is None:
            return named_by(self.opened)
        return self._model("teacher", data, self.seed)

    def student(self, data: Dataset) -> nn.Module:
        """An untrained student, drawn from another seed than the teacher."""
        return self._model("student", data, self.seed + 1_000_000)

    def training(self, data: Dataset) -> dict:
        """Keywords of :func:`abdlab.train.train` for the teacher."""
        name = self.section("teacher").get("objective")
        if name and OBJECTIVES.find(name).plants and not any(a.rate for a in self.attacks):
            name = None  # no attack, no backdoor
        return {
            **{k: v for k, v in self._beside_model("teacher").items() if k not in _OPENED},
            "objective": objective_of(name, self.section(name), self.target, self.trigger),
            "shift": data.shift,
            "flip": data.flip,
            "seed": self.seed,
            "device": self.device,
        }

    def distilling(self) -> dict:
        """Keywords of :func:`abdlab.distill.distill` that section "student" names."""
        return self._beside_model("student")

    def source(self, name: str, data: Dataset) -> Source:
        """A fresh source; only clean KD touches real images, the others take their
        shape.

        One that shifts or mirrors images does it as far as the data set's own fields
        say that labels stay true.
        """
        values = self.values.get(name, {})
        return SOURCES.find(name).make(data, values, lambda member: self.source(member, data))

    def sections(self, source: str) -> list[str]:
        """The sections that describe a source: its own, and those of the members of a
        mix.
        """
        return [source, *SOURCES.find(source).depends_on(self.values.get(source, {}))]

    def defenses(self, *names: str) -> list[Defense]:
        """Fresh defenses by name, in this order.

        Raises:
            ValueError: for one that there is not, or a setting that it does not take.
        """
        for name in names:
            check_keys(f"setting of {name}", self.section(name), _free(DEFENSES.find(name)))
        return [DEFENSES.find(name)(**self.section(name)) for name in names]

    def purifiers(self, *names: str) -> list[Purifier]:
        """Fresh purifiers by name, in this order; raises as :meth:`defenses` does."""
        for name in names:
            check_keys(f"setting of {name}", self.section(name), _free(PURIFIERS.find(name)))
        return [PURIFIERS.find(name)(**self.section(name)) for name in names]

    def section(self, name: str) -> dict[str, Any]:
        """What the preset and the overrides set in a section."""
        return self.values.get(name, {})

    def forks(self, label: Label, length: int) -> dict[str, int]:
        """Where each defense that begins late would begin in a run of ``length``, by name:
        all registered ones, since others may branch there, and those of the label.
        """
        late = [name for name in DEFENSES if issubclass(DEFENSES[name], Late)]
        late += [name for name in label.defenses if name not in late]
        found = {name: self.defenses(name)[0] for name in late}
        return {n: d.first_of(length) for n, d in found.items() if isinstance(d, Late)}

    def _beside_model(self, role: str) -> dict:
        """What a network's section says besides the network."""
        return {k: v for k, v in self.values[role].items() if k not in _MODEL}

    def _model(self, role: str, data: Dataset, seed: int) -> nn.Module:
        own = {k: v for k, v in self.values[role].items() if k in (*_MODEL, "mean", "std")}
        name = own.pop("model")
        # a network of this library knows how its data are normalised
        known = {} if is_foreign(name) else {"mean": data.mean, "std": data.std}
        shape = {"classes": len(data.classes), "channels": data.shape[0]}
        return make_network(name, **shape, **{**known, **own}, seed=seed)


def settings(
    preset: str = "quick/digits",
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    scales: str | None = None,
) -> Settings:
    """Resolve a preset and overrides.

    Args:
        preset: a name of :data:`PRESETS`.
        overrides: values by dotted name, such as ``{"zskt.pseudo_batches": 100,
            "sv.cap": None}``, or the text of such a dict. The text "preset" stands for
            the preset's value; None is a value like any other. Naming another
            ``attack.trigger`` drops the preset's ``attack.params`` and takes what
            :data:`ATTACKS` recommends for it with this preset, as does a trigger in
            ``attack.more``.
        scales: "printed" or "code", a key of :data:`SCALES`: the losses as the paper
            prints them or as its code scales them; None keeps the preset's own.

    Raises:
        ValueError: for an unknown preset, section, key or scales, with a "did you
            mean".
    """
    if scales is not None and scales not in SCALES:
        raise ValueError(did_you_mean("scales", scales, SCALES))
    if preset not in PRESETS:
        raise ValueError(did_you_mean("preset", preset, PRESETS))
    values = copy.deepcopy(PRESETS[preset])
    overrides = as_dict("overrides", overrides or {})
    known = dict(SECTIONS)
    named = {name.rpartition(".")[0] for name in overrides}
    known |= {section: keys_of(section) for section in named if ":" in section}
    every = [f"{section}.{key}" for section, keys in known.items() for key in keys]
    check_keys("setting", overrides, every)
    overrides = {key: value for key, value in overrides.items() if value != "preset"}
    if overrides.get("teacher.file") is not None:  # nothing is known but what is said
        overrides = {**UNSAID, **overrides}
    attack, advised = values.setdefault("attack", {}), ATTACKS.get(preset, {})
    if (trigger := overrides.get("attack.trigger", attack.get("trigger"))) != attack.get("trigger"):
        attack.pop("params", None)
        attack |= copy.deepcopy(advised.get(str(trigger), {}))
    for section, scaled in SCALES.get(scales, {}).items():
        values.setdefault(section, {}).update(scaled)
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        values.setdefault(section, {})[key] = value
    for i, more in enumerate(attack.get("more", [])):
        check_keys("setting of attack.more", more, ATTACK)
        if "trigger" not in more:
            raise ValueError(f"attack.more: attack {i + 1} names no trigger")
    if attack.get("more"):
        attack["more"] = [
            {**copy.deepcopy(advised.get(str(more["trigger"]), {})), **more}
            for more in attack["more"]
        ]
    for section in known:
        check_keys(f"setting of {section}", values.setdefault(section, {}), known[section])
    return Settings(preset, values, seed, str(device))


#: whose signatures hold a section's defaults; every other section is a source or a
#: defense of that name
_HOMES = {
    "data": (load,),
    "attack": (Attack,),
    "teacher": (train, build, make_network),
    "student": (build, distill, make_network),
}


def homes_of(section: str) -> list[Callable]:
    """Whose signatures hold a section's settings; none for an unknown section."""
    if ":" in section:
        return [imported(_PART, section)]
    registered = (names.get(section) for names in (SOURCES, DEFENSES, PURIFIERS, OBJECTIVES))
    return list(_HOMES.get(section) or [home for home in registered if home])


def defaults(section: str) -> dict[str, Any]:
    """What the settings of a section are when nobody sets them, off the signatures.

    Settings without such a default are left out (attack.params, which are the trigger's
    own); an unknown section has none.
    """
    homes = homes_of(section)
    found = {key: keyword_default(home, key) for home in homes for key in keywords(home)}
    known = {key: found[key] for key in keys_of(section) if key in found} if homes else {}
    return {key: value for key, value in known.items() if value is not inspect.Parameter.empty}


def keyword_default(function, name: str) -> Any:
    """The default that a signature gives: the one home of the number."""
    return inspect.signature(function).parameters[name].default
