"""Everything that can be known to be wrong before anything is trained: types, names,
sizes, ranges.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch

from abdlab.attacks.optimize import PGD, options_of
from abdlab.attacks.triggers import TRIGGERS, Trigger
from abdlab.checkpoint import load_model
from abdlab.data import DATASETS, Dataset
from abdlab.defenses.shuffled_teacher import shuffled_layers
from abdlab.errors import check_keys, did_you_mean, keywords, short
from abdlab.features import precision
from abdlab.home import at_home
from abdlab.labels import TEACHER, Label
from abdlab.models import build
from abdlab.owned import IMAGES, NONE, is_foreign, unlabelled
from abdlab.probe import classes_of
from abdlab.settings import ATTACK, DEFENSES, Settings, defaults, homes_of, keys_of
from abdlab.train import train
from abdlab.values import check_plain, check_type, fits, hints

#: (channels, pixels a side, classes) of the data sets that come with one shape
SHAPES = {"digits": (1, 16, 10), "cifar10": (3, 32, 10), "gtsrb": (3, 32, 43)}

#: seeds go to torch and to scikit-learn, which takes no others
SEEDS = range(2**32 - 2_000_000)

#: what a source's miniature has at most of anything that is counted
_FEW = 2

#: what passed before: the jobs of a study differ little
_PASSED: set[str] = set()

#: what dotted names without an annotated home take
_OWN = {
    "data.name": str,
    "data.shape": list[int] | None,
    "data.classes": int | list[str] | None,
    "teacher.model": str | None,
    "teacher.file": str | None,
    "teacher.key": str | None,
    "teacher.ignore": list[str],
    "teacher.keywords": dict | None,
    "teacher.objective": str | None,
    "teacher.tune": dict | None,
    "teacher.mean": list[float] | None,
    "teacher.std": list[float] | None,
    "student.model": str,
    "student.keywords": dict | None,
    "attack.trigger": str | dict | None,
    "attack.params": dict | None,
    "attack.optimize": dict,
    "attack.more": list[dict],
    "mixed.members": dict[str, float],
}


def check(chosen: Settings, labels: Iterable[str] = ()) -> None:
    """Raise ValueError, one sentence, for settings or labels that could not run.

    Types are compared with the signatures' annotations; the attack is put on one
    image, both networks see one, and every label's source and defenses are built, all
    of it without data and in milliseconds.

    >>> from abdlab.settings import settings
    >>> check(settings("quick/digits"), ["clean", "zskt+sv+sr"])
    >>> check(settings("quick/digits"), ["zsktt"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown source 'zsktt': did you mean 'zskt'? known are ...
    """
    check_seed("seed", chosen.seed)
    _check_device(chosen.device)
    for section, values in chosen.values.items():
        for key, value in values.items():
            check_value(f"{section}.{key}", value)
    if chosen.opened and chosen.section("teacher").get("tune"):
        raise ValueError("teacher.tune is for teachers that are trained here, not for a file's")
    data = stand_in(chosen)
    with _once("attack", data.name, data.shape, chosen.values["attack"]) as new:
        if new:
            _check_attacks(chosen, data)
    for role in ("teacher", "student"):
        _check_model(chosen, role, data)
    with _one_sentence("a teacher with these settings"):
        if not chosen.opened:
            _check_training(chosen, data)
    for name in DEFENSES:  # also of those that no label names: a trunk asks where they begin
        with _once("defense", name, chosen.values[name]) as new, _one_sentence(name):
            if new:
                chosen.defenses(name)
    for text in labels:
        label = Label.parse(text)
        if label.source == TEACHER:
            if label.defenses:
                raise ValueError(f"{text!r} is a teacher, which takes purifiers and no defense")
            with _one_sentence(f"a teacher {label}"):
                chosen.purifiers(*label.purifiers)
            continue
        parts = [*chosen.sections(label.source), *label.defenses, *label.purifiers]
        models = [_network(chosen, role) for role in ("teacher", "student")]
        used = {part: chosen.values.get(part) for part in parts}
        more = (data.name, data.shape, models, chosen.distilling())
        with _once("label", str(label), used, more) as new, _one_sentence(f"a student {label}"):
            if new:
                _check_label(chosen, label, data)


def check_seed(name: str, seed: Any) -> None:
    """Raise ValueError unless a seed is a whole number that every generator takes."""
    if type(seed) is not int or seed not in SEEDS:
        raise ValueError(
            f"{name} is a whole number from 0 to {SEEDS.stop - 1:,}, not {short(seed)}"
        )


def check_value(name: str, value: Any) -> None:
    """Raise ValueError unless a value has the type of the setting with this dotted
    name; unknown names are left to :func:`abdlab.settings.settings`.
    """
    check_plain(name, value)
    section, _, key = name.partition(".")
    annotation, default = _kind(section, key)
    if name == "attack.more":
        check_type(name, value, annotation)
        for more in value:
            check_keys("setting of attack.more", more, ATTACK)
            for inner, held in more.items():
                check_value(f"attack.{inner}", held)
    elif annotation is not None:
        check_type(name, value, annotation, default)
        rate = key == "lr" or key.endswith("_lr")
        if rate and isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} is at least 0, not {value}")


def check_overrides(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an override of the wrong type; "preset" fits everywhere."""
    for name, value in given.items():
        if not isinstance(name, str):
            raise ValueError(f"a setting is named by a text such as 'sv.alpha', not {short(name)}")
        if value != "preset":
            check_value(name, value)


@lru_cache(maxsize=1024)
def _kind(section: str, key: str) -> tuple[Any, Any]:
    """(annotation, default) of a setting, off the signature that it is handed to."""
    if (name := f"{section}.{key}") in _OWN:
        return _OWN[name], None
    for home in homes_of(section):
        if key in keywords(home) and key in keys_of(section):
            return hints(home).get(key), inspect.signature(home).parameters[key].default
    return None, None


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Whatever an impossible value makes a constructor raise, as a ValueError."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be made: {type(error).__name__}: {told}") from error


def _check_device(device: str) -> None:
    try:
        if device != "auto":
            torch.device(device)
    except RuntimeError:
        known = ("auto", "cpu", "cuda", "mps")
        raise ValueError(did_you_mean("device", device, known)) from None


@contextmanager
def _once(*key: Any) -> Iterator[bool]:
    """Whether the block has not yet passed with this key of plain values."""
    with _one_sentence("these settings"):
        text = json.dumps(key, sort_keys=True)
    yield text not in _PASSED
    _PASSED.add(text)


def stand_in(chosen: Settings) -> Dataset:
    """A data set of the right shape and classes, four black images a split. Of
    ``folder:PATH`` the classes are PATH/train's folders, 2^31 where there are none yet.
    """
    values = chosen.values["data"]
    kind, _, path = values["name"].partition(":")
    if kind not in (*DATASETS, NONE, IMAGES):
        raise ValueError(did_you_mean("data set", kind, (*DATASETS, NONE, IMAGES)))
    if not chosen.labelled:
        return unlabelled(NONE, *chosen.shape_and_classes(), "cpu")
    if kind == "folder" and not path:
        raise ValueError("folder: needs a path, as in folder:data/mine")
    channels, side, classes = SHAPES.get(kind, (3, 32, None))
    side = side if values.get("size") is None else values["size"]
    if not 1 <= side <= 2048:
        raise ValueError(f"data.size is pixels a side, 1 to 2048, not {side}")
    if classes is None:
        classes = _folders(at_home(path) / "train") or 2**31
    _, shift, flip = DATASETS[kind]
    images = torch.zeros(1, 1, 1, 1).expand(4, channels, side, side)
    return Dataset(
        name=values["name"],
        train_images=images,
        train_labels=torch.zeros(4, dtype=torch.int64),
        test_images=images,
        test_labels=torch.zeros(4, dtype=torch.int64),
        classes=_Names(classes),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        shift=shift,
        flip=flip,
    )


class _Names(tuple):
    """As long as there are classes, without a name for each."""

    __slots__ = ()

    def __new__(cls, count: int):
        return super().__new__(cls, (count,))

    def __len__(self) -> int:
        return self[0]


def _folders(folder: Path) -> int:
    hidden = (".", "__MACOSX")
    return (
        sum(p.is_dir() and not p.name.startswith(hidden) for p in folder.iterdir())
        if folder.is_dir()
        else 0
    )


def _check_attacks(chosen: Settings, data: Dataset) -> None:
    for values in chosen.attack_values:
        if isinstance(spec := values.get("trigger"), str):
            for name in spec.split("+"):
                if name.strip() not in TRIGGERS:
                    raise ValueError(did_you_mean("trigger", name.strip(), TRIGGERS))
    if (chosen.opened and chosen.attack_values) and not chosen.labelled:
        raise ValueError("attack.trigger is for images with labels: name them by data.name")
    with _one_sentence("the attack"):
        attacks = chosen.attacks
    for attack, values in zip(attacks, chosen.attack_values, strict=True):
        if not 0 <= attack.target < len(data.classes):
            raise ValueError(
                f"attack.target is a class from 0 to {len(data.classes) - 1} of"
                f" {data.name}, not {attack.target}"
            )
        for part in (attack.trigger, *attack.trigger.then):
            known = hints(TRIGGERS[part.name])
            for key, value in part.params.items():
                check_type(f"{part.name}'s {key}", value, known.get(key, Any))
        if not attack.trigger.needs_pattern:
            with _one_sentence(f"the trigger {attack.trigger}"):
                attack.trigger(data.test_images[:1])
        _check_options(attack.trigger, values.get("optimize", {}), attack.needs_adversary)


def _check_options(trigger: Trigger, given: Mapping[str, Any], adversary: bool) -> None:
    if given and adversary:
        free = [key for key in keywords(PGD) if key != "model"]
        check_keys(f"option of {trigger}", given, free)
        for key, value in given.items():
            check_type(f"attack.optimize's {key}", value, hints(PGD)[key])
    elif given and trigger.then:
        raise ValueError(f"attack.optimize is for a single trigger, not for {trigger}")
    elif given:
        for key, default in options_of(trigger, **given).items():
            kind = float if isinstance(default, float) else type(default)
            if default is not None and key in given and not fits(given[key], kind):
                raise ValueError(f"attack.optimize's {key} cannot be {short(given[key])}")


def _check_model(chosen: Settings, role: str, data: Dataset) -> None:
    values = chosen.values[role]
    if (role == "teacher" and chosen.opened) or is_foreign(values.get("model") or ""):
        with _once("own", role, values, data.shape, len(data.classes)) as new:
            if new:
                classes_of(_own(chosen, role, data), torch.zeros(2, *data.shape), f"the {role}")
        return
    if values.get("model") is None:
        raise ValueError(f"{role}.model names no network: set it, for example to wrn-16-1")
    if (width := values.get("width")) is not None and not 1 <= width <= 4096:
        raise ValueError(f"{role}.width is channels, 1 to 4096, not {width}")
    classes = min(len(data.classes), 10_000)
    _seen(values["model"], width, classes, data.shape, role)


@lru_cache(maxsize=256)
def _seen(name: str, width: int | None, classes: int, shape: tuple, role: str) -> None:
    """A network without numbers sees an image without numbers: shapes alone."""
    model = shell(name, width, classes, shape)
    try:
        with torch.no_grad():
            model(torch.zeros(2, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{role}.model {name} cannot see images of {shape[1]}x{shape[2]} pixels: {told}"
        ) from None


@lru_cache(maxsize=64)
def shell(name: str, width: int | None, classes: int, shape: tuple) -> torch.nn.Module:
    """A network of these shapes that holds no numbers and costs no memory."""
    if max((int(n) for n in name.lower().split("-")[1:] if n.isdigit()), default=0) > 1000:
        raise ValueError(f"{name} is deeper or wider than 1000, which no network here is")
    with torch.device("meta"):
        return build(name, width=width, classes=classes, channels=shape[0]).eval()


def _own(chosen: Settings, role: str, data: Dataset) -> torch.nn.Module:
    """A network of the user's own, its file read where it has one."""
    model = getattr(chosen, role)(data)
    if role == "teacher" and chosen.opened:
        found = chosen.section(role)
        options = {"key": found.get("key"), "ignore": found.get("ignore") or ()}
        load_model(at_home(chosen.opened), model, **options)
    return model.eval()


def _check_training(chosen: Settings, data: Dataset) -> None:
    tune = chosen.section("teacher").get("tune") or {}
    check_keys("key of teacher.tune", tune, ("epochs", "lr", "schedule"))
    for key, value in tune.items():
        check_value(f"teacher.{key}", value)
    _check_values(chosen.training(data))
    _check_values({**chosen.training(data), **tune})


def _check_values(values: dict) -> None:
    for key, least in (("epochs", 1), ("batch_size", 1), ("lr", 0), ("weight_decay", 0)):
        if values.get(key, least) < least:
            raise ValueError(f"teacher.{key} is at least {least}, not {values[key]}")
    if not 0 <= values.get("momentum", 0) < 1:
        raise ValueError(f"teacher.momentum is a share in [0, 1), not {values['momentum']}")
    _try_training(**{k: values[k] for k in ("schedule", "precision") if k in values})


@lru_cache
def _try_training(**probe: str) -> None:
    """The real loop's own checks, on a network of a few numbers and four black images."""
    tiny = build("wrn-10-1", width=1, classes=2, channels=1)
    images, labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    stream = train(tiny, images, labels, epochs=1, lr=0.0, device="cpu", **probe)
    next(stream), stream.close()


def _check_label(chosen: Settings, label: Label, data: Dataset) -> None:
    with precision(chosen.distilling().get("precision", "float32"), torch.device("cpu")):
        source = chosen.source(label.source, data)
    if len(source) < 1:
        raise ValueError(f"{label} has no step to train: make {label.source} longer")
    _check_begins(chosen, label.source, data)
    defenses = chosen.defenses(*label.defenses)
    teacher, student = (_shell(chosen, role, data) for role in ("teacher", "student"))
    names = dict(teacher.named_modules())
    for defense in defenses:
        layers, target = (getattr(defense, key, None) for key in ("layers", "target"))
        if isinstance(target, int) and not 0 <= target < len(data.classes):
            raise ValueError(
                f"{defense.name}.target is a class from 0 to {len(data.classes) - 1} of"
                f" {data.name}, not {target}"
            )
        if isinstance(layers, int):
            shuffled_layers(teacher, layers)
        elif isinstance(layers, (list, tuple)):
            check_keys(f"layer of the teacher in {defense.name}.layers", layers, names)
    if label.purifiers:
        making = getattr(chosen, "purifiers", None)
        if making is None:
            raise ValueError(f"{label}: these settings make no purifiers, only source+defense")
        making(*label.purifiers)
    if getattr(source, "attention", 0) and hasattr(source, "_pairs"):
        networks = [_network(chosen, role) for role in ("teacher", "student")]
        with _once("pairs", source.name, source.attention_layers, networks, data.shape) as new:
            if new:
                source.device = torch.device("meta")
                source._pairs(teacher, student)


def _check_begins(chosen: Settings, name: str, data: Dataset) -> None:
    """The first pseudo-batch of a source in miniature: every number of things above
    :data:`_FEW` is that, in the source, its images and the networks. What it refuses only
    when it starts, it refuses here. Networks that are not ours are left out.
    """
    few = {
        section: {k: _few(v) for k, v in {**defaults(section), **chosen.section(section)}.items()}
        for section in chosen.sections(name)
    }
    networks = [_network(chosen, role) for role in ("teacher", "student")]
    if any(model is None or is_foreign(model) for model, _ in networks):
        return  # there is no small one of somebody's own network
    with _once("begins", name, few, data.name, data.shape, networks) as new:
        if not new:
            return
        small = replace(chosen, values={**chosen.values, **few})
        teacher, student = (
            build(model, width=_few(width or _FEW), classes=2, channels=data.shape[0])
            for model, width in networks
        )
        source = small.source(name, data)
        with catch_warnings(action="ignore"):  # one of a size of 0 comes before its error
            source.start(teacher.eval().requires_grad_(False), student, torch.device("cpu"), 0)
            source.optimizer(student)
            source.student_loss(source.batch(()))


def _few(value: Any) -> Any:
    return min(value, _FEW) if type(value) is int else value


def _shell(chosen: Settings, role: str, data: Dataset) -> torch.nn.Module:
    """The network of a role without its numbers."""
    name, width = _network(chosen, role)
    if name is None or is_foreign(name):
        return getattr(chosen, role)(data).to(torch.device("meta")).eval()
    return shell(name, width, 10, data.shape)


def _network(chosen: Settings, role: str) -> tuple[str, int | None]:
    values = chosen.values[role]
    return values.get("model"), values.get("width")
