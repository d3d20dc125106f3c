"""The user's half of a run: students distilled from a teacher, by a method's label."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty

import torch
from torch import nn

from abdlab.checkpoint import load_model, save_model
from abdlab.data import Dataset
from abdlab.defenses import Defense
from abdlab.defenses.plans import plan_of, plans, steps_of
from abdlab.distill import distill, seed_of
from abdlab.evaluate import Exam
from abdlab.home import at_home
from abdlab.labels import TEACHER, Label
from abdlab.probe import classes_of
from abdlab.processes import spawned
from abdlab.purifiers import load_purified, purify, save_purified
from abdlab.runs import Run, config_of, folder_of, refuse_other_settings
from abdlab.settings import Settings, keyword_default
from abdlab.side_by_side import side_by_side
from abdlab.sources import Source
from abdlab.stream import Step, _Board
from abdlab.teachers import _each_asr, answered, poisoned_teacher, saved_teacher
from abdlab.threads import computing_with, pulled_with, share, threads

#: folder below a root for :func:`clean_teacher_control`
CONTROL = "clean_teacher_control"


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
            for name, steps in plans(defense).items():
                if steps != steps_of(given.get(name, keyword_default(type(defense), name))):
                    given[name] = plan_of(steps)
        self.run.save_config(config)

    def _metrics(self, last: Step) -> dict:
        metrics = {"label": self.label, "seed": self.chosen.seed, "acc": last.acc, "asr": last.asr}
        with computing_with(self.run.threads):
            answers = answered(self.run, self.exam, self.student)
            each = _each_asr(self.exam, self.student)
        return metrics | {
            "seconds": round(last.seconds, 1),
            "threads": self.run.threads,
            "branched_from": self.resume_from and str(self.resume_from),
            "defenses": {d.name: d.report() for d in self.defenses},
            **each,
            **answers,
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
    label = Label.parse(label)
    teacher = purified_teacher(root, chosen, data, teacher, label.purifiers)
    student, active = chosen.student(data), chosen.defenses(*label.defenses)
    source = chosen.source(label.source, data)
    path = Path(root) / f"seed{chosen.seed}" / (folder or label.folder)
    run = Run(path, _config(chosen, data, label))
    exam, every = chosen.exam(data), max(1, len(source) // max(1, exams))
    forks = chosen.forks(label, len(source))
    if resume_from is None and folder is None:
        resume_from = _shared_trunk(run, label, forks)
    marks = sorted({*forks.values()} - {0})
    stream = distill(
        teacher,
        student,
        source,
        defenses=active,
        exam=exam,
        exam_every=every,
        images_every=every if samples is None else max(1, len(source) // max(1, samples)),
        checkpoint=run.file("checkpoint.safetensors"),
        checkpoint_every=every,
        keep=(*marks, *range(every, len(source), every)) if keep_all else marks,
        resume_from=resume_from,
        seed=chosen.seed,
        device=chosen.device,
        card={"label": str(label)},
        **chosen.distilling(),
    )
    stream = pulled_with(run.threads, stream)
    return Distillation(run, str(label), chosen, student, source, active, exam, stream, resume_from)


def _config(chosen: Settings, data: Dataset, label: Label) -> dict:
    """What the config.json of a method's run says, or of a purified teacher's."""
    own = ()
    if label.source != TEACHER:
        own = ("student", *chosen.sections(label.source), *label.defenses)
    return config_of(chosen, data, "data", "attack", "teacher", *own, *label.purifiers)


def check_folders(root: str | Path, chosen: Settings, data: Dataset, labels: Iterable[str]) -> None:
    """Raise ValueError where a method's folder, or its purified teacher's, holds a run
    with other settings: now, and not when an hour of work has come to it. Nothing is
    written.
    """
    methods = [Label.parse(label) for label in labels]
    purified = [Label(TEACHER, purifiers=m.purifiers) for m in methods if m.purifiers]
    for label in dict.fromkeys([*purified, *methods]):
        refuse_other_settings(folder_of(root, chosen.seed, label), _config(chosen, data, label))


def purified_teacher(
    root: str | Path, chosen: Settings, data: Dataset, teacher: nn.Module, names: Sequence[str]
) -> nn.Module:
    """A teacher that went through these purifiers: cleaned once, then loaded from its own
    folder, ROOT/seedN/NAMES,teacher; the teacher itself where there are none.

    ACC and ASR in its metrics are for the reader: no purifier sees the test images.
    """
    if not names:
        return teacher
    label = Label(TEACHER, purifiers=tuple(names))
    run = Run(folder_of(root, chosen.seed, label), _config(chosen, data, label))
    path, device = run.file("teacher.safetensors"), data.train_images.device
    if not path.exists():
        began = time.perf_counter()
        seed = seed_of(chosen.seed, "purifier", str(label))
        steps = chosen.purifiers(*names)
        with computing_with(run.threads):
            model = purify(teacher, steps, data.shape, device=device, seed=seed)
            seconds, exam = round(time.perf_counter() - began, 1), chosen.exam(data)
            scores = {"acc": None, "asr": None, **exam(model), **answered(run, exam, model)}
        metrics = {"label": str(label), "seed": chosen.seed, **scores, "seconds": seconds}
        metrics |= {"purified": list(model.purified), "threads": run.threads}
        save_purified(path, model, metrics)
        run.save_metrics(metrics)
    model = load_purified(path, chosen.teacher(data), device=device)
    if chosen.opened:  # it may answer with more than its logits
        classes_of(model, torch.zeros(2, *data.shape, device=device), "the teacher")
    return model


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
    (ZSKT, and ZSKT+TU until TU begins) goes on from the checkpoint that the other one
    kept there; the numbers are the same as from scratch, because every part has a
    random generator of its own.

    Args:
        label: a method (:class:`abdlab.labels.Label`), such as "clean", "zskt+sv+tu" or
            "bounded/cmi"; or a purified teacher, "bounded/teacher".
        exams: how many times ACC and ASR are measured, and samples kept, over the run.
        resume_from: another checkpoint to branch from.
        tell: called with label and Step instead of drawing a progress bar.

    Returns:
        the student in eval mode, and its metrics: acc, asr, seconds, and each defense's
        report.
    """
    method = Label.parse(label)
    if method.source == TEACHER:
        model = purified_teacher(root, chosen, data, teacher, method.purifiers)
        return model, Run(folder_of(root, chosen.seed, method)).metrics
    going = distillation(root, chosen, data, teacher, label, exams=exams, resume_from=resume_from)
    if going.done:
        return (
            load_model(going.run.file("student.safetensors"), device=data.train_images.device),
            going.run.metrics,
        )
    return going.student, going.finish(going.run.watch(going.stream, label, tell=tell))


def _shared_trunk(run: Run, label: Label, forks: Mapping[str, int]) -> Path | None:
    """The latest checkpoint of another method with the same settings that trains alike up
    to there: until a defense begins that only one of both has.

    Args:
        forks: where each defense that begins late begins, by name.
    """
    mine, found = run.config, {}
    for other in label.forks(forks):
        begins = min(forks[name] for name in {*label.defenses} ^ {*other.defenses})
        kept = run.path.parent / other.folder / f"checkpoint-{begins}.safetensors"
        theirs = Run(kept.parent).config if kept.exists() else {}
        if theirs and all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys()):
            found[begins] = kept
    return found[max(found)] if found else None


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
    processes of their own, each with the threads of :func:`abdlab.threads.threads`; on
    an accelerator, which one small network cannot fill, in this process, see
    :func:`abdlab.side_by_side`. The numbers are the same either way. A process loads what
    the settings name: where ``data`` is other than that, such as a subset, the methods run
    one after the other.

    Args:
        with_teacher: put the teacher's own metrics first, under "teacher".
        workers: methods at once, at most; by default as many as share the threads that
            torch may use here on a CPU, else 1 (not measured).
    """
    check_folders(root, chosen, data, labels)
    teacher = poisoned_teacher(root, chosen, data)
    methods = {label: Label.parse(label) for label in labels}

    def clean() -> None:  # once, before several processes look for it
        for names in dict.fromkeys(label.purifiers for label in methods.values()):
            purified_teacher(root, chosen, data, teacher, names)

    students = {label: m for label, m in methods.items() if m.source != TEACHER}
    lengths = {m.source: len(chosen.source(m.source, data)) for m in students.values()}
    late = {m.source: chosen.forks(m, lengths[m.source]) for m in students.values()}
    trunks: dict[Label, list[str]] = {}
    for label in sorted(students, key=len):
        trunk = students[label].without(late[students[label].source])
        trunks.setdefault(trunk, []).append(label)
    left = [label for label in students if not _is_done(root, chosen, label)]
    # the longest first, so that short ones fill the gaps
    groups = [group for group in trunks.values() if {*group} & {*left}]
    groups.sort(key=lambda group: -sum(len(label) for label in group))
    # this process's share of the machine: in a sweep, other jobs have the rest
    on_cpu = data.train_images.device.type == "cpu"
    workers = min(len(groups), workers or (share() if on_cpu else 1))
    if workers > 1 and on_cpu and not _named_by(chosen, data):
        workers = 1
    if workers <= 1 or not on_cpu:
        clean()
    if workers > 1:
        board = _Board(sum(lengths[students[label].source] for label in left))
        if on_cpu:
            apart = [group for group in groups if not any(students[x].purifiers for x in group)]
            _in_processes(root, chosen, groups, workers, board, clean, apart)
        else:
            _in_threads(root, chosen, data, groups, workers, board)
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
    what do the defenses cost?

    Settings and seeds are those of ``chosen``, but for the attack's rate of 0. "asr" is
    then what the trigger does to models that have never seen it.

    Returns:
        what :func:`distill_all` does, the teacher first.
    """
    return distill_all(
        Path(root) / CONTROL, chosen.unpoisoned(), data, labels, with_teacher=True, workers=workers
    )


def _is_done(root: str | Path, chosen: Settings, label: str) -> bool:
    """Whether a student's folder holds it, finished."""
    folder = at_home(folder_of(root, chosen.seed, label))
    return all((folder / name).exists() for name in ("student.safetensors", "metrics.json"))


def _named_by(chosen: Settings, data: Dataset) -> bool:
    """Whether the settings load these very images."""
    named = chosen.dataset()
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(named, part), getattr(data, part)) for part in parts)


def _in_threads(
    root: str | Path,
    chosen: Settings,
    data: Dataset,
    groups: list[list[str]],
    workers: int,
    board: _Board,
) -> None:
    """Run groups of labels side by side in this process, each group with a teacher of
    its own.
    """
    waiting = deque(groups)

    def stream() -> Iterator[tuple[str, Step]]:
        while waiting:
            try:
                labels = waiting.popleft()
            except IndexError:
                return  # another stream was faster
            path = Run(Path(root) / f"seed{chosen.seed}" / "teacher").file("teacher.safetensors")
            teacher = saved_teacher(path, chosen, data)
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
    root: str | Path,
    chosen: Settings,
    groups: list[list[str]],
    workers: int,
    board: _Board,
    prepare: Callable[[], None],
    apart: list[list[str]],
) -> None:
    """Run groups of labels in spawned processes; those that stand ``apart`` do not need
    what this process is to ``prepare``, and begin before.
    """
    with multiprocessing.get_context("spawn").Manager() as manager, spawned(workers) as pool:
        queue = manager.Queue()
        begun = apart[: workers - 1]  # this process is one more
        jobs = [pool.submit(_work, str(root), chosen, group, queue) for group in begun]
        try:
            prepare()
            groups = [group for group in groups if group not in begun]
            jobs += [pool.submit(_work, str(root), chosen, group, queue) for group in groups]
            while not queue.empty() or not all(job.done() for job in jobs):
                try:
                    label, step = queue.get(timeout=0.5)
                except Empty:
                    continue
                board.show(label, step)
            for job in jobs:
                job.result()
        finally:
            board.close()


def _work(root: str, chosen: Settings, labels: list[str], queue) -> None:
    """One process's share: the labels one after the other. It ends when the process
    that reads ``queue`` is gone.
    """
    torch.set_num_threads(threads())
    data = chosen.dataset()
    path = Run(Path(root) / f"seed{chosen.seed}" / "teacher").file("teacher.safetensors")
    teacher = saved_teacher(path, chosen, data)
    for label in labels:
        distilled(
            root,
            chosen,
            data,
            teacher,
            label,
            tell=lambda label, step: queue.put((label, replace(step, images=None))),
        )
