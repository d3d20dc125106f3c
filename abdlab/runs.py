"""A run's folder: config, history, metrics, samples, figures; and many runs as one
table.

::

    runs/demo/                     one root: notebooks that name it share what is in it
      seed0/teacher/               one folder per seed and model: teacher, clean, zskt, zskt+sv, ...
        config.json                the settings that the model depends on
        history.jsonl              one line per reported Step
        metrics.json               the numbers that the run ended with
        teacher.safetensors        or student.safetensors, and the run's checkpoint.safetensors
        samples.safetensors        inputs of the student over training, by step
      seed0/clean_teacher/         the same network on clean data, to optimise an attack against
      seed0/trigger/*.json         optimised triggers, each with what it was made from
      02_distillation/             one folder per notebook: metrics.json and figures/*.png
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from abdlab.checkpoint import load_model, load_state, save_model, save_state, write_atomically
from abdlab.data import Dataset
from abdlab.defenses import Defense, ShuffledTeacher, suspicion
from abdlab.defenses.defense import plan_of, steps_of
from abdlab.defenses.shuffling_vaccine import tail_share
from abdlab.distill import Step, distill
from abdlab.errors import CheckpointError
from abdlab.evaluate import Exam
from abdlab.optimize import optimize, options_of
from abdlab.presets import Settings, keyword_default, settings
from abdlab.side_by_side import side_by_side
from abdlab.sources import Source
from abdlab.train import train
from abdlab.triggers import Trigger, trigger_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: folder below a root for :func:`clean_teacher_control`
CONTROL = "clean_teacher_control"

#: set by whoever runs a notebook without a browser: progress bars become lines on the
#: terminal
HEADLESS = "ABDLAB_HEADLESS"


class WeakTeacher(UserWarning):
    """The teacher is too weak for an experiment: its backdoor or its accuracy is poor."""


class Run:
    """One folder of results; every file in it is written atomically.

    Args:
        path: the folder, made when missing.
        config: plain values, written to config.json when given.

    Raises:
        ValueError: when the folder cannot be written to, or holds a run with another
            config.
    """

    def __init__(self, path: str | Path, config: dict | None = None):
        self.path = Path(path)
        try:
            if config is not None:
                self._check(json.loads(json.dumps(config)))
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
            if config is not None:
                self._write("config.json", config)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path}: {error.strerror or error}; choose another folder"
            ) from error

    def file(self, name: str) -> Path:
        """The path of a file in the folder, whether it exists or not."""
        return self.path / name

    @property
    def config(self) -> dict:
        """What config.json holds; empty when there is none."""
        return self._read("config.json")

    @property
    def metrics(self) -> dict:
        """What metrics.json holds; empty when there is none."""
        return self._read("metrics.json")

    def save_config(self, config: dict) -> Path:
        """Write config.json, whole: only for what became of a run's settings while it
        went on.
        """
        return self._write("config.json", config)

    def save_metrics(self, metrics: dict) -> Path:
        """Write metrics.json, whole."""
        return self._write("metrics.json", metrics)

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Write figures/NAME.png (150 dpi). pyplot forgets the figure, so that a
        notebook which returns it shows it once.
        """
        from matplotlib import pyplot

        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        return write_atomically(self.file(f"figures/{name}.png"), buffer.getvalue())

    def history(self) -> pd.DataFrame:
        """history.jsonl as a table, one row per reported step; empty when there is
        none.
        """
        path = self.file("history.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines])

    def samples(self) -> dict[int, Tensor]:
        """Images (N, C, H, W) that the student learnt from, by step."""
        path = self.file("samples.safetensors")
        return load_state(path)[0] if path.exists() else {}

    def watch(
        self,
        stream: Iterable[Step],
        label: str,
        every: int = 10,
        tell: Callable[[str, Step], None] | None = None,
    ) -> Step:
        """Consume a stream with a progress bar; keep its history and samples in the
        folder, see :meth:`keep`; return the last Step.

        An interrupt closes the stream, which saves its checkpoint, keeps the history so
        far, and goes on upwards.

        Args:
            label: stands before the bar and in the history's column "label".
            every: report each so-many-th step, besides those with an exam or an event.
            tell: called with label and Step instead of drawing a bar.
        """
        with closing(self.keep(progress(stream, label, tell), label, every)) as steps:
            last = deque(steps, maxlen=1)
        if not last:
            raise ValueError(f"{label}: the stream had no steps")
        return last.pop()

    def keep(self, stream: Iterable[Step], label: str, every: int = 10) -> Iterator[Step]:
        """The stream, while its history and samples are kept in the folder, at the
        latest when it ends or is closed.

        A stream that resumes replaces the lines of the steps that it repeats. Arguments
        are those of :meth:`watch`.
        """
        rows, shown = None, self.samples()

        def keep() -> None:
            lines = (json.dumps({k: v for k, v in row.items() if not _missing(v)}) for row in rows)
            write_atomically(
                self.file("history.jsonl"), "".join(f"{line}\n" for line in lines).encode()
            )
            if shown:
                save_state(self.file("samples.safetensors"), shown)

        try:
            for step in stream:
                if rows is None:
                    rows = [
                        r
                        for r in self.history().to_dict("records")
                        if not (r["label"] == label and r["step"] >= step.index)
                    ]
                if step.images is not None:
                    shown[step.index] = step.images
                if (
                    step.events
                    or step.acc is not None
                    or step.index % every == 0
                    or step.index == step.total
                ):
                    rows.append(
                        {
                            "label": label,
                            "step": step.index,
                            "seconds": round(step.seconds, 2),
                            **step.losses,
                        }
                    )
                    rows[-1] |= {
                        "acc": step.acc,
                        "asr": step.asr,
                        "events": list(step.events) or None,
                    }
                if step.acc is not None:
                    keep()  # what a killed run leaves behind
                yield step
        finally:
            if hasattr(stream, "close"):
                stream.close()
            if rows:
                keep()

    def _check(self, config: dict) -> None:
        """A folder's results belong to one config: going on with another would mix
        them.
        """
        for section, value in self.config.items():
            if section == "preset" or config.get(section) == value:
                continue
            if isinstance(value, dict) and isinstance(config.get(section), dict):
                keys = [
                    k
                    for k in {**value, **config[section]}
                    if value.get(k) != config[section].get(k)
                ]
                differ = ", ".join(
                    f"{section}.{k} was {_short(value.get(k))} and is"
                    f" {_short(config[section].get(k))}"
                    for k in keys
                )
            else:
                differ = f"{section} was {_short(value)} and is {_short(config.get(section))}"
            raise ValueError(
                f"{self.path} holds a run with other settings ({differ}): choose another folder, or"
                " delete that one"
            )

    def _read(self, name: str) -> dict:
        path = self.file(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, value: dict) -> Path:
        return write_atomically(
            self.file(name), (json.dumps(value, indent=2, default=str) + "\n").encode()
        )


def progress(
    stream: Iterable[Step], label: str, tell: Callable[[str, Step], None] | None = None
) -> Iterator[Step]:
    """The stream with a tqdm bar, a widget in JupyterLab and a line on a terminal;
    events are printed. ``tell`` replaces the bar.
    """
    bar = None
    try:
        for step in stream:
            if tell:
                tell(label, step)
            else:
                bar = bar or _bar(label, step.total, step.index - 1)
                _advance(bar, label, step)
            yield step
    finally:
        if bar is not None:
            bar.close()
        if hasattr(stream, "close"):
            stream.close()


def _bar(label: str, total: int, initial: int = 0):
    if os.environ.get(HEADLESS):
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm(
        total=total, initial=initial, desc=label, unit="step", mininterval=1.0, dynamic_ncols=True
    )


def _advance(bar, label: str, step: Step) -> None:
    for event in step.events:
        bar.write(f"{label}: {event}")
    if step.acc is not None:
        bar.set_postfix_str(f"{label} {_scores(step.acc, step.asr)}", refresh=False)
    bar.update()


def _scores(acc: float, asr: float | None) -> str:
    return f"ACC {acc:.1%}" + ("" if asr is None else f" ASR {asr:.1%}")


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

    It is what an attacker optimises against, and no part of a defence.
    """
    run = Run(Path(root) / f"seed{chosen.seed}" / "clean_teacher", chosen.config("data", "teacher"))
    path = run.file("teacher.safetensors")
    if not path.exists():
        model, exam = chosen.teacher(data), Exam.of(data.test_images, data.test_labels)
        stream = train(
            model, data.train_images, data.train_labels, exam=exam, **chosen.training(data)
        )
        last = run.watch(stream, "clean_teacher", every=1, tell=tell)
        metrics = {
            "label": "clean_teacher",
            "seed": chosen.seed,
            "acc": last.acc,
            "seconds": round(last.seconds, 1),
        }
        save_model(path, model, metrics)
        run.save_metrics(metrics)
    return load_model(path, device=data.train_images.device), path


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


def _optimised(
    root: str | Path, chosen: Settings, data: Dataset, trigger: Trigger, target: int, options: dict
) -> Trigger:
    """One optimised trigger: made against the clean model, or read from the file that
    holds what it was made from.
    """
    options = options_of(trigger, **options)
    request = {"trigger": trigger.card(), "target": target, "options": options, "seed": chosen.seed}
    stamp = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    path = Path(root) / f"seed{chosen.seed}" / "trigger" / f"{trigger.name}-{stamp}.json"
    model, _ = clean_teacher(root, chosen, data)
    if not path.exists():
        images, labels = data.train_images, data.train_labels
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
    try:
        return trigger_from(json.loads(path.read_text())["made"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds no trigger that abdlab wrote ({error!r}): delete it, and it is made"
            " again"
        ) from None


def poisoned_teacher(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    *,
    tell: Callable[[str, Step], None] | None = None,
) -> nn.Module:
    """The poisoned teacher of ``chosen``: trained, or loaded when ROOT/seedN/teacher
    has it already.

    Writes teacher.safetensors, whose card holds the attack and the measured ACC and
    ASR, and metrics.json. An optimised trigger, and cl, need settings that
    :func:`prepare` has made ready.

    Warns:
        WeakTeacher: before any distillation, when ASR is under 90 % or ACC is poor
            (under three quarters).
    """
    run = Run(
        Path(root) / f"seed{chosen.seed}" / "teacher", chosen.config("data", "attack", "teacher")
    )
    path = run.file("teacher.safetensors")
    if not path.exists():
        model, poisoned = chosen.teacher(data), chosen.poison(data)
        last = run.watch(
            train(
                model,
                poisoned.images,
                poisoned.labels,
                exam=chosen.exam(data),
                **chosen.training(data),
            ),
            "teacher",
            every=1,
            tell=tell,
        )
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
        }
        metrics |= _each_asr(chosen.exam(data), model)
        save_model(path, model, {"attack": attack, **metrics})
        run.save_metrics({**metrics, "poison_rate": poisoned.rate})
    check_teacher(
        run.metrics["acc"],
        run.metrics["asr"] if any(attack.rate for attack in chosen.attacks) else None,
    )
    return load_model(path, device=data.train_images.device)


def _each_asr(exam: Exam, model: nn.Module) -> dict[str, float]:
    """The ASR of every attack, as "asr/TRIGGER", where there are several; "asr" is
    their mean.
    """
    found = exam(model) if len(exam.attacks) > 1 else {}
    return {name: value for name, value in found.items() if name.startswith("asr/")}


def check_teacher(acc: float, asr: float | None) -> None:
    """Warn when a teacher is no use for an experiment on backdoors: ASR under .9, or
    ACC under .75 (shares).

    An ASR of None is that of a teacher which is not meant to have a backdoor.
    """
    if asr is not None and asr < 0.9:
        warnings.warn(
            f"the teacher's ASR is {asr:.1%}, under 90 %: its backdoor is weak (longer training, a"
            " higher poison rate or a stronger trigger)",
            WeakTeacher,
            stacklevel=3,
        )
    if acc < 0.75:
        warnings.warn(
            f"the teacher's ACC is {acc:.1%}, under 75 %: a student cannot be better (longer"
            " training, or a lower poison rate)",
            WeakTeacher,
            stacklevel=3,
        )


@dataclass
class Distillation:
    """One student on its way: what trains it, and where its results go.
    :func:`distillation` makes it.

    Attributes:
        run: the folder. label: the method.
        student, source, defenses: bound to each other once the stream has begun.
        exam: what measures the student.
        stream: of Step; pulling it trains, closing it leaves a checkpoint that resumes.
        resume_from: the checkpoint that it branches from, if any.
    """

    run: Run
    label: str
    chosen: Settings
    student: nn.Module
    source: Source
    defenses: list[Defense]
    exam: Exam
    stream: Iterator[Step]
    resume_from: Path | None

    @property
    def done(self) -> bool:
        """Whether the folder holds the finished student already."""
        return self.run.file("student.safetensors").exists() and bool(self.run.metrics)

    def finish(self, last: Step) -> dict:
        """Save the student and the metrics that the run ended with; returns the
        metrics.
        """
        metrics = self._metrics(last)
        save_model(self.run.file("student.safetensors"), self.student, metrics)
        self.run.save_metrics(metrics)
        return metrics

    def stopped(self, last: Step) -> dict:
        """Save the metrics of a run that was stopped after ``last``; its checkpoint has
        the student. Returns the metrics.
        """
        metrics = {**self._metrics(last), "stopped_at": last.index, "length": last.total}
        self.run.save_metrics(metrics)
        return metrics

    def keep_plans(self) -> None:
        """Record what was tuned while the run went on in its config, so that it resumes
        to the same numbers, and can be repeated.
        """
        config = self.run.config
        for defense in self.defenses:
            given = config[defense.name]
            for name, steps in defense.plans.items():
                if steps != steps_of(given.get(name, keyword_default(type(defense), name))):
                    given[name] = plan_of(steps)
        self.run.save_config(config)

    def _metrics(self, last: Step) -> dict:
        metrics = {"label": self.label, "seed": self.chosen.seed, "acc": last.acc, "asr": last.asr}
        return metrics | {
            "seconds": round(last.seconds, 1),
            "threads": torch.get_num_threads(),
            "branched_from": self.resume_from and str(self.resume_from),
            "defenses": {d.name: d.report() for d in self.defenses},
            **_each_asr(self.exam, self.student),
        }


def distillation(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    teacher: nn.Module,
    label: str,
    *,
    exams: int = 10,
    samples: int | None = None,
    resume_from: str | Path | None = None,
    folder: str | None = None,
    keep_all: bool = False,
) -> Distillation:
    """All that :func:`distilled` runs, as a stream that the caller pulls: a step at a
    time, and no further than wanted.

    Args:
        root, chosen, data, teacher, label, exams, resume_from: as for
            :func:`distilled`. None of the following changes a number.
        samples: how many times sample images are kept; by default as many times as
            exams.
        folder: name of the run's folder beside those of the methods, for one that is
            not shared with them: it then goes from the start, or from ``resume_from``,
            never from another method's checkpoint.
        keep_all: keep the checkpoint of every exam, to branch from.
    """
    source, *names = label.split("+")
    student, src, active = (
        chosen.student(data),
        chosen.source(source, data),
        chosen.defenses(*names),
    )
    run = Run(
        Path(root) / f"seed{chosen.seed}" / (folder or label),
        chosen.config("data", "attack", "teacher", "student", *chosen.sections(source), *names),
    )
    exam, every = chosen.exam(data), max(1, len(src) // max(1, exams))
    fork = 0 if source == "clean" else chosen.defenses("sr")[0].first_of(len(src))
    if resume_from is None and folder is None:
        resume_from = _shared_trunk(run, label, fork)
    stream = distill(
        teacher,
        student,
        src,
        defenses=active,
        exam=exam,
        exam_every=every,
        images_every=every if samples is None else max(1, len(src) // max(1, samples)),
        checkpoint=run.file("checkpoint.safetensors"),
        checkpoint_every=every,
        keep=(fork, *range(every, len(src), every)) if keep_all else (fork,),
        resume_from=resume_from,
        seed=chosen.seed,
        device=chosen.device,
        card={"label": label},
        **chosen.distilling(),
    )
    return Distillation(run, label, chosen, student, src, active, exam, stream, resume_from)


def distilled(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    teacher: nn.Module,
    label: str,
    *,
    exams: int = 10,
    resume_from: str | Path | None = None,
    tell: Callable[[str, Step], None] | None = None,
) -> tuple[nn.Module, dict]:
    """A student by its method's label: distilled, gone on with from its checkpoint, or
    loaded when it is done.

    Everything is in ROOT/seedN/LABEL: student.safetensors, metrics.json, history,
    samples. A method that shares its first part with another one in the same ROOT
    (ZSKT, and ZSKT+SR until SR begins) goes on from the checkpoint that the other one
    kept there; the numbers are the same as from scratch, because every part has a
    random generator of its own.

    Args:
        label: a source and defences, such as "clean", "zskt", "zskt+sv+sr".
        exams: how many times ACC and ASR are measured, and samples kept, over the run.
        resume_from: another checkpoint to branch from.
        tell: called with label and Step instead of drawing a progress bar.

    Returns:
        the student in eval mode, and its metrics: acc, asr, seconds, and each defence's
        report.
    """
    going = distillation(root, chosen, data, teacher, label, exams=exams, resume_from=resume_from)
    if going.done:
        return (
            load_model(going.run.file("student.safetensors"), device=data.train_images.device),
            going.run.metrics,
        )
    return going.student, going.finish(going.run.watch(going.stream, label, tell=tell))


def _shared_trunk(run: Run, label: str, fork: int) -> Path | None:
    """A checkpoint that another method, alike but for SR and with the same settings,
    kept at step ``fork``.
    """
    trunk = label.removesuffix("+sr")
    other = trunk if label.endswith("+sr") else f"{label}+sr"
    kept, mine = run.path.parent / other / f"checkpoint-{fork}.safetensors", run.config
    theirs = Run(kept.parent).config if kept.exists() else {}
    return (
        kept
        if theirs and all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())
        else None
    )


def distill_all(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    labels: Sequence[str],
    *,
    with_teacher: bool = False,
    workers: int | None = None,
) -> dict[str, dict]:
    """Several students of one teacher, as :func:`distilled` makes each; label ->
    metrics, in the order asked for.

    Methods that share no trunk can run side by side: on a CPU with several cores in
    processes of their own, each with its part of the threads; on an accelerator, which
    one small network cannot fill, in this process, see :func:`abdlab.side_by_side`.
    Numbers depend on the number of threads in the last digits, which training
    amplifies: it is in each student's metrics.

    Args:
        with_teacher: put the teacher's own metrics first, under "teacher".
        workers: methods at once, at most; by default one per thread that torch may use
            on a CPU, else 1 (not measured).
    """
    teacher = poisoned_teacher(root, chosen, data)
    trunks: dict[str, list[str]] = {}
    for label in sorted(set(labels), key=len):
        trunks.setdefault(label.removesuffix("+sr"), []).append(label)
    # the longest first, so that short ones fill the gaps
    groups = sorted(trunks.values(), key=lambda group: -sum(len(label) for label in group))
    # this process's share of the machine: in a sweep, other jobs have the rest
    cores = torch.get_num_threads()
    on_cpu = data.train_images.device.type == "cpu"
    workers = min(len(groups), workers or (cores if on_cpu else 1))
    if workers > 1 and on_cpu:
        _in_processes(root, chosen, groups, workers, max(1, cores // workers))
    elif workers > 1:
        _in_threads(root, chosen, data, groups, workers)
    results = {label: distilled(root, chosen, data, teacher, label)[1] for label in labels}
    if with_teacher:
        results = {"teacher": Run(Path(root) / f"seed{chosen.seed}" / "teacher").metrics, **results}
    return results


def clean_teacher_control(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    labels: Sequence[str],
    *,
    workers: int | None = None,
) -> dict[str, dict]:
    """The whole chain on a teacher that is not poisoned, in ROOT/clean_teacher_control:
    what do the defences cost?

    Settings and seeds are those of ``chosen``, but for the attack's rate of 0. "asr" is
    then what the trigger does to models that have never seen it.

    Returns:
        what :func:`distill_all` does, the teacher first.
    """
    return distill_all(
        Path(root) / CONTROL, chosen.unpoisoned(), data, labels, with_teacher=True, workers=workers
    )


def vaccine_trials(
    root: str | Path, chosen: Settings, data: Dataset, labels: Sequence[str], tries: int = 20
) -> list[dict]:
    """How often verification accepts a shuffle, of the poisoned teacher and of the
    control's, on their students' own images.

    The images are those that the source of the first undefended method of ``labels``
    makes at its run's end, as many as the settings of "sv" pool; layers, k, sigma and
    threshold are theirs too.

    Args:
        tries: shuffles of each teacher, drawn from the seed; all are tried, whether one
            is accepted or not.

    Returns:
        one row per teacher: seed, teacher ("poisoned", "clean"), label, tries,
        accepted, share, largest (the largest suspicious share). Empty where no method
        of ``labels`` has a source that shows images.
    """
    rows, (sv,), undefended = (
        [],
        chosen.defenses("sv"),
        [label for label in labels if "+" not in label],
    )
    for kind, folder, settled in (
        ("poisoned", Path(root), chosen),
        ("clean", Path(root) / CONTROL, chosen.unpoisoned()),
    ):
        teacher = poisoned_teacher(folder, settled, data)
        for label in undefended:
            with suppress(CheckpointError):  # a source that shows no images
                images = synthesize(
                    Run(folder / f"seed{chosen.seed}" / label), settled, data, teacher, sv.pool
                )
                break
        else:
            return []
        rng, names = torch.Generator().manual_seed(chosen.seed), sv.layer_names(teacher)
        shuffles = (ShuffledTeacher(teacher, names, sv.k, rng) for _ in range(tries))
        shares = [
            tail_share(suspicion(shuffle, teacher, images, reverse=sv.reverse), sv.sigma)
            for shuffle in shuffles
        ]
        accepted = sum(share > sv.threshold for share in shares)
        found = {"accepted": accepted, "share": accepted / tries, "largest": round(max(shares), 5)}
        rows.append({"seed": chosen.seed, "teacher": kind, "label": label, "tries": tries, **found})
    return rows


class _Board:
    """One bar that counts the steps of several students, and tells their latest scores."""

    def __init__(self):
        self.done, self.total, self.latest, self.bar = {}, {}, {}, None

    def show(self, label: str, step: Step) -> None:
        self.bar = self.bar or _bar("students", 0)
        # a student that goes on from a checkpoint has only the rest before it
        self.total.setdefault(label, step.total - step.index + 1)
        new = step.index - self.done.get(label, step.index - 1)
        self.bar.total = sum(self.total.values())
        for event in step.events:
            self.bar.write(f"{label}: {event}")
        if step.acc is not None:
            self.latest[label] = _scores(step.acc, step.asr)
            self.bar.set_postfix_str(
                ", ".join(f"{k} {v}" for k, v in self.latest.items()), refresh=False
            )
        self.done[label] = step.index
        self.bar.update(new)
        if step.index == step.total:
            self.bar.write(f"{label}: {self.latest.pop(label, 'done')} after {step.seconds:.0f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _in_threads(
    root: str | Path, chosen: Settings, data: Dataset, groups: list[list[str]], workers: int
) -> None:
    """Run groups of labels side by side in this process, each group with a teacher of
    its own.
    """
    waiting, board = deque(groups), _Board()

    def stream() -> Iterator[tuple[str, Step]]:
        while waiting:
            try:
                labels = waiting.popleft()
            except IndexError:
                return  # another stream was faster
            path = Run(Path(root) / f"seed{chosen.seed}" / "teacher").file("teacher.safetensors")
            teacher = load_model(path, device=data.train_images.device)
            for label in labels:
                going = distillation(root, chosen, data, teacher, label)
                if not going.done:
                    for step in going.run.keep(going.stream, label):
                        yield label, step
                    going.finish(step)

    together = side_by_side(stream() for _ in range(workers))
    try:
        for _, (label, step) in together:
            board.show(label, step)
    finally:
        together.close()
        board.close()


def _in_processes(
    root: str | Path, chosen: Settings, groups: list[list[str]], workers: int, threads: int
) -> None:
    """Run groups of labels in spawned processes."""
    context, board = multiprocessing.get_context("spawn"), _Board()
    with context.Manager() as manager, ProcessPoolExecutor(workers, context) as pool:
        queue = manager.Queue()
        jobs = [pool.submit(_work, str(root), chosen, group, threads, queue) for group in groups]
        try:
            while not queue.empty() or not all(job.done() for job in jobs):
                try:
                    label, step = queue.get(timeout=0.5)
                except Empty:
                    continue
                board.show(label, step)
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            board.close()


def _work(root: str, chosen: Settings, labels: list[str], threads: int, queue) -> None:
    """One process's share: the labels one after the other. It ends when the process
    that reads ``queue`` is gone.
    """
    torch.set_num_threads(threads)
    data = chosen.dataset()
    teacher = load_model(
        Run(Path(root) / f"seed{chosen.seed}" / "teacher").file("teacher.safetensors"),
        device=data.train_images.device,
    )
    for label in labels:
        distilled(
            root,
            chosen,
            data,
            teacher,
            label,
            tell=lambda label, step: queue.put((label, replace(step, images=None))),
        )


def history(root: str | Path, chosen: Settings, labels: Iterable[str]) -> pd.DataFrame:
    """The histories of several methods below one root as one table."""
    return pd.concat(
        [Run(Path(root) / f"seed{chosen.seed}" / label).history() for label in labels],
        ignore_index=True,
    )


def synthesize(run: Run, chosen: Settings, data: Dataset, teacher: nn.Module, n: int) -> Tensor:
    """``n`` new images (N, C, H, W) of the generator that a run's last checkpoint
    holds, or images of its pool.

    Raises:
        CheckpointError: when the run has no checkpoint, or its source has no generator.
    """
    source = _finished_source(run, chosen, data, teacher)
    if not hasattr(source, "synthesize"):
        raise CheckpointError(
            f"{run.path} has no generator: its source {source.name} does not synthesise images"
        )
    return source.synthesize(n)


def _finished_source(run: Run, chosen: Settings, data: Dataset, teacher: nn.Module) -> Source:
    state, card = load_state(run.file("checkpoint.safetensors"), data.train_images.device)
    source = chosen.source(card["run"]["source"], data)
    source.start(
        teacher,
        chosen.student(data).to(data.train_images.device),
        data.train_images.device,
        chosen.seed,
    )
    source.restore(state["source"])
    return source


def vaccine_of(run: Run, chosen: Settings, teacher: nn.Module) -> ShuffledTeacher:
    """The shuffled teacher that a run's defence used; for a run without one, the first
    shuffle that the settings draw.
    """
    state, _ = load_state(run.file("checkpoint.safetensors"))
    (sv,) = chosen.defenses("sv")
    names = sv.layer_names(teacher)
    permutations = state["defenses"].get("sv", {}).get("permutations")
    return ShuffledTeacher(
        teacher, names, sv.k, torch.Generator().manual_seed(chosen.seed), permutations
    )


def table(root: str | Path) -> pd.DataFrame:
    """Every run below ``root`` as one row: its folder and the plain values of its
    metrics.json.
    """
    rows = []
    for path in sorted(Path(root).rglob("metrics.json")):
        values = json.loads(path.read_text())
        plain = {k: v for k, v in values.items() if isinstance(v, (str, int, float)) or v is None}
        rows.append({"run": str(path.parent.relative_to(root)), **plain})
    return pd.DataFrame(rows)


def _short(value: Any) -> str:
    """A value as an error message quotes it: a pattern's kilobytes help nobody."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}... ({len(text)} characters)"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
