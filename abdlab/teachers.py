"""The attacker's half of a run: clean and poisoned teachers, trained or loaded."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from abdlab.attacks.optimize import optimize, options_of
from abdlab.attacks.triggers import Trigger, trigger_from
from abdlab.checkpoint import load_model, save_model, write_atomically
from abdlab.data import Dataset
from abdlab.errors import CheckpointError
from abdlab.evaluate import Exam
from abdlab.home import at_home
from abdlab.labels import TEACHER
from abdlab.objectives import OBJECTIVES
from abdlab.probe import classes_of, looks_saturated
from abdlab.runs import Run, config_of
from abdlab.settings import Settings, keyword_default, settings
from abdlab.stream import Step
from abdlab.threads import computing_with, threads
from abdlab.train import train

#: exams of a teacher over its training, about
EXAMS = 20


class WeakTeacher(UserWarning):
    """The teacher is too weak for an experiment: its backdoor or its accuracy is poor."""


def prepare(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    *,
    tell: Callable[[str, Step], None] | None = None,
) -> Settings:
    """The same settings, ready to attack with: every optimised trigger has its pattern,
    and cl the clean model it needs.

    The clean model is that of :func:`clean_teacher`; a trigger is optimised once and
    then read from ROOT/seedN/trigger. Settings whose attacks need neither are returned
    as they are, and nothing is trained.

    Args:
        root: the folder that the run's notebooks share.
        tell: called with label and Step instead of drawing a progress bar.
    """
    if not any(attack.trigger.needs_pattern or attack.needs_adversary for attack in chosen.attacks):
        return chosen
    _, path = clean_teacher(root, chosen, data, tell=tell)
    main, *more = (
        {**values, **_ready(root, chosen, data, attack.trigger, attack.target, values)}
        for attack, values in zip(chosen.attacks, chosen.attack_values, strict=True)
    )
    attack = {**main, "more": more} if more else main
    return replace(chosen, values={**chosen.values, "attack": attack}, clean_model=str(path))


def ready_triggers(
    root: str | Path, chosen: Settings, data: Dataset, names: Sequence[str]
) -> list[Trigger]:
    """The triggers of these names as the preset would attack with them, and the chosen
    ones last; optimised where need be.
    """
    there = [attack.trigger for attack in prepare(root, chosen, data).attacks]
    others = []
    for name in [name for name in names if name not in map(str, there)]:
        other = settings(
            chosen.preset, {"attack.trigger": name}, seed=chosen.seed, device=chosen.device
        )
        values = {**other.values["attack"], "target": chosen.target}
        others.append(trigger_from(name, values.get("params")))
        if others[-1].needs_pattern:
            ready = _ready(root, chosen, data, others[-1], chosen.target, values)
            others[-1] = trigger_from(ready["trigger"], ready.get("params"))
    return [*others, *there]


def clean_teacher(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    *,
    tell: Callable[[str, Step], None] | None = None,
) -> tuple[nn.Module, Path]:
    """The teacher's network trained alike but on clean data, and its file: trained, or
    loaded from ROOT/seedN/clean_teacher.

    It is what an attacker optimises against and fine-tunes (``teacher.tune``), and no
    part of a defense.
    """
    chosen = _benign(chosen)
    run = Run(
        Path(root) / f"seed{chosen.seed}" / "clean_teacher",
        config_of(chosen, data, "data", "teacher"),
    )
    path = run.file("teacher.safetensors")
    if not path.exists():
        model, exam = chosen.teacher(data), Exam.of(data.test_images, data.test_labels)
        training = {"exam": exam, "exam_every": _every(chosen), **chosen.training(data)}
        stream = train(model, data.train_images, data.train_labels, **training)
        with computing_with(run.threads):
            last = run.watch(stream, "clean_teacher", every=1, tell=tell)
        metrics = {
            "label": "clean_teacher",
            "seed": chosen.seed,
            "acc": last.acc,
            "seconds": round(last.seconds, 1),
            "threads": run.threads,
        }
        save_model(path, model, metrics)
        run.save_metrics(metrics)
    return load_model(path, device=data.train_images.device), path


def sleeps(chosen: Settings) -> bool:
    """Whether the backdoor is to sleep in the teacher and wake in students, so that a low
    ASR of its own is no fault (:class:`abdlab.objectives.Dormant`).

    >>> sleeps(settings("quick/digits", {"teacher.objective": "dormant"}))
    True
    """
    name = chosen.section("teacher").get("objective")
    return name is not None and OBJECTIVES.find(name).plants


def shows(chosen: Settings) -> bool:
    """Whether the teacher itself is meant to have a high ASR: something attacks it, and
    the backdoor does not sleep.

    >>> shows(settings("quick/digits")), shows(settings("quick/digits", {"attack.rate": 0.0}))
    (True, False)
    """
    return any(attack.rate for attack in chosen.attacks) and not sleeps(chosen)


def _benign(chosen: Settings) -> Settings:
    """The settings of the clean teacher: nothing is planted, nothing fine-tuned."""
    dropped = ["tune", "objective"] if sleeps(chosen) else ["tune"]
    teacher = {k: v for k, v in chosen.section("teacher").items() if k not in dropped}
    return replace(chosen, values={**chosen.values, "teacher": teacher})


def _ready(
    root: str | Path, chosen: Settings, data: Dataset, trigger: Trigger, target: int, values: dict
) -> dict:
    """What an attack's values say of its trigger, with every pattern in it."""
    parts = [Trigger(trigger.name, trigger.params), *trigger.then]
    if not trigger.needs_pattern:
        return {}
    options = values.get("optimize", {})
    if options and len(parts) > 1:
        raise ValueError(
            f"attack.optimize is for a single trigger, not for {trigger}: its parts are made with"
            " their defaults"
        )
    first, *rest = (
        _optimised(root, chosen, data, p, target, options) if p.needs_pattern else p for p in parts
    )
    return (
        {"trigger": replace(first, then=tuple(rest)).card()}
        if rest
        else {"trigger": first.name, "params": first.params}
    )


def _request(chosen: Settings, trigger: Trigger, target: int, options: dict) -> tuple[dict, str]:
    """What an optimised trigger is made from, and the name of the file that holds it."""
    request = {"trigger": trigger.card(), "target": target, "options": options, "seed": chosen.seed}
    stamp = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return request, f"seed{chosen.seed}/trigger/{trigger.name}-{stamp}.json"


def _optimised(
    root: str | Path, chosen: Settings, data: Dataset, trigger: Trigger, target: int, options: dict
) -> Trigger:
    """One optimised trigger: made against the clean model, or read from the file that
    holds what it was made from.
    """
    options = options_of(trigger, **options)
    request, name = _request(chosen, trigger, target, options)
    path = at_home(root) / name
    model, _ = clean_teacher(root, chosen, data)
    if not path.exists():
        images, labels = data.train_images, data.train_labels
        with computing_with(threads()):
            made = optimize(
                trigger,
                model,
                images,
                labels,
                target,
                seed=chosen.seed,
                device=images.device,
                **options,
            )
        write_atomically(
            path, (json.dumps({**request, "made": made.card()}, indent=2) + "\n").encode()
        )
    return _made(path)


def _made(path: Path) -> Trigger:
    try:
        return trigger_from(json.loads(path.read_text())["made"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds no trigger that abdlab wrote ({error!r}): delete it, and it is made"
            " again"
        ) from None


def made_trigger(root: str | Path, chosen: Settings) -> Trigger | None:
    """The main attack's trigger with every pattern in it, as :func:`prepare` has made and
    kept them below a root; None where one is not made yet. Nothing is trained.
    """
    trigger, values = chosen.trigger, chosen.attack_values[0]
    first, *rest = [Trigger(trigger.name, trigger.params), *trigger.then]
    parts = []
    for part in (first, *rest):
        if part.needs_pattern:
            options = options_of(part, **values.get("optimize", {}))
            path = at_home(root) / _request(chosen, part, chosen.target, options)[1]
            if not path.exists():
                return None
            part = _made(path)
        parts.append(part)
    return replace(parts[0], then=tuple(parts[1:]))


def poisoned_teacher(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    *,
    tell: Callable[[str, Step], None] | None = None,
) -> nn.Module:
    """The poisoned teacher of ``chosen``: trained, opened from ``teacher.file``, or loaded
    when ROOT/seedN/teacher has it already.

    With ``teacher.tune`` (epochs, lr, schedule; else those of training) it is the
    clean teacher, trained further on the poisoned set by these values (BackWeak, arXiv
    2511.12046).

    Writes teacher.safetensors, whose card holds the attack and the measured ACC and
    ASR, and metrics.json. An optimised trigger, and cl, need settings that
    :func:`prepare` has made ready.

    Warns:
        WeakTeacher: before any distillation, when ASR is under 90 % (and meant not to
            be, see :func:`shows`) or ACC is poor (under three quarters).
    """
    run = Run(
        Path(root) / f"seed{chosen.seed}" / "teacher",
        config_of(chosen, data, "data", "attack", "teacher"),
    )
    path = run.file("teacher.safetensors")
    if not path.exists() and chosen.opened:
        _open(run, chosen, data)
    elif not path.exists():
        exam, model = chosen.exam(data), chosen.teacher(data)
        training = {"exam": exam, "exam_every": _every(chosen), **chosen.training(data)}
        if tune := chosen.section("teacher").get("tune"):
            benign, _ = clean_teacher(root, chosen, data, tell=tell)
            model.load_state_dict(benign.state_dict())
            training |= {**tune, "exam_every": 1}
        with computing_with(run.threads):
            poisoned = (chosen.unpoisoned() if sleeps(chosen) else chosen).poison(data)
            stream = train(model, poisoned.images, poisoned.labels, **training)
            last = run.watch(stream, "teacher", every=1, tell=tell)
        first, *more = (
            {**attack.card(), "rate": poisoned.rate_of(i)}
            for i, attack in enumerate(chosen.attacks)
        )
        attack = {**first, "more": more} if more else first
        metrics = {
            "label": "teacher",
            "seed": chosen.seed,
            "acc": last.acc,
            "asr": last.asr,
            "seconds": round(last.seconds, 1),
            "threads": run.threads,
        }
        with computing_with(run.threads):
            metrics |= {**_each_asr(exam, model), **answered(run, exam, model)}
        save_model(path, model, {"attack": attack, **metrics})
        run.save_metrics({**metrics, "poison_rate": poisoned.rate})
    check_teacher(
        run.metrics.get("acc"),
        run.metrics.get("asr") if shows(chosen) else None,
    )
    return saved_teacher(path, chosen, data)


def saved_teacher(path: Path, chosen: Settings, data: Dataset) -> nn.Module:
    """The teacher that a run's folder holds; one that was opened answers with its logits
    alone (:func:`abdlab.probe.classes_of`).
    """
    where = data.train_images.device
    if not chosen.opened:
        return load_model(path, device=where)
    model = load_model(path, chosen.teacher(data), where)
    classes_of(model, torch.zeros(2, *data.shape, device=where), "the teacher")
    return model


def opened_teacher(chosen: Settings, data: Dataset) -> nn.Module:
    """The teacher of ``teacher.file``, in eval mode; it answers with its logits alone.

    Warns:
        WeakTeacher: where its answers to noise look as if it expected other pixels.

    Raises:
        ValueError: for a file, an architecture or a number of classes that do not fit.
    """
    teacher, where = chosen.section("teacher"), data.train_images.device
    model = load_model(
        at_home(chosen.opened),
        chosen.teacher(data),
        where,
        key=teacher.get("key"),
        ignore=teacher.get("ignore") or (),
    )
    found = classes_of(model, torch.zeros(2, *data.shape, device=where), "the teacher")
    if found != len(data.classes):
        raise ValueError(
            f"the teacher tells {found} classes apart, and {data.name} has {len(data.classes)}: set"
            " data.classes, or name another data set"
        )
    if odd := looks_saturated(model, data.shape):
        warnings.warn(
            f"the teacher {odd}: does it expect normalised images? teacher.mean and teacher.std"
            " say how",
            WeakTeacher,
            stacklevel=3,
        )
    return model


def _open(run: Run, chosen: Settings, data: Dataset) -> None:
    """Put a teacher from a file into a run's folder, with what can be known of it."""
    began, model = time.perf_counter(), opened_teacher(chosen, data)
    exam = chosen.exam(data)
    scores = {"acc": None, "asr": None, **exam(model), **answered(run, exam, model)}
    metrics = {"label": TEACHER, "seed": chosen.seed, **scores, "file": str(chosen.opened)}
    metrics |= {"seconds": round(time.perf_counter() - began, 1)}
    save_model(run.file("teacher.safetensors"), model, metrics)
    run.save_metrics(metrics)


def _every(chosen: Settings) -> int:
    """Epochs between two exams of a teacher: 1 of a short training, so that its ACC and
    ASR are curves; of a long one as many as make :data:`EXAMS`, since an exam of every
    epoch takes a quarter of its time.
    """
    epochs = chosen.section("teacher").get("epochs", keyword_default(train, "epochs"))
    return max(1, epochs // EXAMS)


def _each_asr(exam: Exam, model: nn.Module) -> dict[str, float]:
    """The ASR of every attack, as "asr/TRIGGER", where there are several; "asr" is
    their mean.
    """
    found = exam(model) if len(exam.attacks) > 1 else {}
    return {name: value for name, value in found.items() if name.startswith("asr/")}


def answered(run: Run, exam: Exam, model: nn.Module) -> dict:
    """Keep what a finished model answers, class by class, in its run's folder; returns
    what its metrics say of that (:meth:`abdlab.runs.Run.save_details`).
    """
    classes = run.config["classes"]
    return run.save_details(exam.details(model, len(classes)), classes)


def check_teacher(acc: float | None, asr: float | None) -> None:
    """Warn when a teacher is no use for an experiment on backdoors: ASR under .9, or
    ACC under .75 (shares).

    An ASR of None is that of a teacher which is not meant to have a backdoor, or of which
    none is known; an ACC of None is unknown.
    """
    if asr is not None and asr < 0.9:
        warnings.warn(
            f"the teacher's ASR is {asr:.1%}, under 90 %: its backdoor is weak (longer training, a"
            " higher poison rate or a stronger trigger)",
            WeakTeacher,
            stacklevel=3,
        )
    if acc is not None and acc < 0.75:
        warnings.warn(
            f"the teacher's ACC is {acc:.1%}, under 75 %: a student cannot be better (longer"
            " training, or a lower poison rate)",
            WeakTeacher,
            stacklevel=3,
        )
