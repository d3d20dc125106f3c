"""What a run takes, told before it begins: a few steps of a short copy of it are timed.

The copy has networks, a source and defenses of its own, built from the same settings with
fewer and shorter rounds, and its defenses begin half-way; so nothing of it reaches the
run, whose numbers stay the same. ``abdlab run`` and ``abdlab defend`` show what the
notebooks print of this, and the dry run of a study adds it up.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median_low

import torch
from torch import nn

from abdlab.data import Dataset
from abdlab.defenses import Late
from abdlab.distill import distill
from abdlab.errors import Diverged
from abdlab.evaluate import Exam, predict
from abdlab.features import frozen, mode
from abdlab.labels import TEACHER, Label
from abdlab.purifiers import Purifier
from abdlab.runs import is_measured
from abdlab.settings import Settings, keyword_default
from abdlab.sources import SOURCES
from abdlab.teachers import opened_teacher
from abdlab.threads import computing_with, threads
from abdlab.train import train

#: the short copy's settings, where a source has them and more than that
_FEW = {"pseudo_batches": 6, "rounds": 3, "kd_steps": 4, "synthesis_steps": 2, "epochs": 3}
#: a run of fewer pseudo-batches is over before it is timed
WORTH = 30
#: exams that a run holds
_EXAMS = 10
#: images of one exam that are timed
_EXAMINED = 256


@dataclass(frozen=True)
class Forecast:
    """About what one student takes.

    Attributes:
        label: the method, or "teacher".
        steps: its pseudo-batches; epochs of a teacher; 0 of a purified one.
        seconds: of everything, exams and purifiers included; None where it is too short
            to be timed.
        megabytes: the process's memory at its highest (the device's, on a GPU), with all
            images that a pool will hold; None where that is not known.
    """

    label: str
    steps: int
    seconds: float | None = None
    megabytes: float | None = None

    def __str__(self) -> str:
        unit = "epochs" if self.label == TEACHER else "pseudo-batches"
        if self.seconds is None:
            return f"{self.label}: {self.steps:,} {unit}, too few to be timed"
        memory = "" if self.megabytes is None else f" and {round(self.megabytes, -1):.0f} MB"
        length = f" for {self.steps:,} {unit}" if self.steps else ""
        return f"{self.label}: about {told_time(self.seconds)}{memory}{length}"


def told_time(seconds: float) -> str:
    """A duration as people say it.

    >>> told_time(42.0), told_time(128.0), told_time(2100.0), told_time(12_000.0)
    ('42 s', '2 min 10 s', '35 min', '3 h 20 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        minutes, rest = divmod(10 * round(seconds / 10), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    minutes = 10 * round(minutes / 10) if minutes < 1000 else 60 * round(minutes / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours:,} h {rest} min" if rest else f"{hours:,} h"


def forecast(
    root: str | Path | None,
    chosen: Settings,
    data: Dataset,
    labels: Sequence[str],
    teacher: nn.Module | None = None,
) -> list[Forecast]:
    """About how long each student takes here that is not done yet, and how much memory.

    A dozen pseudo-batches of a short copy are computed for each, seconds on a CPU. The
    run's own networks and random numbers are not touched. Other work on the machine, and
    methods side by side, make it longer.

    Args:
        root: the folder in which done students lie; None counts all of them.
        labels: methods, as :func:`abdlab.students.distill_all` takes them.
        teacher: None times with an untrained one of the same kind.

    >>> from abdlab import settings
    >>> chosen = settings("quick/digits", {"zskt.pseudo_batches": 8}, device="cpu")
    >>> print(*forecast(None, chosen, chosen.dataset(), ["zskt"]))
    zskt: 8 pseudo-batches, too few to be timed
    """
    found = []
    with _apart(chosen.device), computing_with(threads()):
        for label in map(Label.parse, dict.fromkeys(map(str, labels))):
            if _is_done(root, chosen, label):
                continue
            if teacher is None:
                teacher = untrained(chosen, data)
            cleaning = _purifying(chosen, data, teacher, label, root)
            if label.source == TEACHER:
                found.append(Forecast(str(label), 0, cleaning))
                continue
            steps = len(chosen.source(label.source, data))
            if steps < WORTH:
                found.append(Forecast(str(label), steps))
                continue
            with suppress(Diverged):
                seconds, megabytes = _student(chosen, data, teacher, label)
                found.append(Forecast(str(label), steps, seconds + cleaning, megabytes))
    return found


def forecast_teacher(chosen: Settings, data: Dataset) -> Forecast:
    """The same of the poisoned teacher's training: three mini-batches are timed."""
    with _apart(chosen.device), computing_with(threads()):
        options = chosen.training(data)
        count = len(data.train_images)
        size = min(options.get("batch_size", keyword_default(train, "batch_size")), count)
        epochs = options.get("epochs", keyword_default(train, "epochs"))
        model, few = chosen.teacher(data), slice(3 * size)
        images, labels = data.train_images[few], data.train_labels[few]
        _, twice = list(train(model, images, labels, **{**options, "epochs": 2}))
        once = twice.seconds / 2
        each = once / max(1, len(images) // size)
        seconds = epochs * each * (count // size)
        seconds += _EXAMS * _exam_seconds(model, chosen.exam(data))
        return Forecast(TEACHER, epochs, seconds, _highest(data.train_images.device))


def untrained(chosen: Settings, data: Dataset) -> nn.Module:
    """A teacher that takes as long as the run's: its file's, or an untrained one."""
    if chosen.opened:
        return opened_teacher(chosen, data)
    return chosen.teacher(data).to(data.train_images.device).eval()


def in_all(forecasts: Iterable[Forecast]) -> str:
    """What several take one after the other, in words; empty for fewer than two.

    >>> in_all([Forecast("zskt", 640, 70.0), Forecast("cmi", 400, 60.0)])
    'in all: about 2 min 10 s, one after the other'
    """
    timed = [each.seconds for each in forecasts if each.seconds is not None]
    if len(timed) < 2:
        return ""
    return f"in all: about {told_time(sum(timed))}, one after the other"


@contextmanager
def _apart(device):
    """What the block draws, warns of and allocates stays in it."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _forget_highest()
        yield


def _is_done(root: str | Path | None, chosen: Settings, label: Label) -> bool:
    """Whether a method's metrics lie in the folder, of which nothing is made here."""
    return root is not None and is_measured(root, chosen.seed, label)


def _student(chosen, data, teacher, label) -> tuple[float, float | None]:
    """(seconds, megabytes) of one distillation, without purifiers."""
    real, short = chosen.source(label.source, data), _shortened(chosen, data, label.source)
    defenses, late = chosen.defenses(*label.defenses), []
    period = getattr(short, "kd_steps", 0)
    half = min(len(short) - 1, 3 if not period else period + period // 2)
    for defense in defenses:
        if isinstance(defense, Late):
            late.append(defense.first_of(len(real)))
            defense.start_share = half / len(short)
        if getattr(defense, "renewals", 0):
            defense.renewals = 1
    student = chosen.student(data)
    wanted = min(len(short), 2 * half if late else max(3, period + 1))
    began = time.perf_counter()
    stream = distill(
        copy.deepcopy(teacher),
        student,
        short,
        defenses=defenses,
        device=chosen.device,
        seed=chosen.seed,
        **chosen.distilling(),
    )
    ends = [step.seconds for step in islice(stream, wanted)]
    beginning = time.perf_counter() - began - ends[-1]
    times = [after - before for before, after in zip([0.0, *ends], ends, strict=False)]
    stream.close()
    renewals = sum(getattr(d, "renewals", 0) for d in chosen.defenses(*label.defenses))
    seconds = _added_up(times, half, real, short, min(late, default=len(real)), renewals)
    seconds += beginning * getattr(real, "patches", 1) / getattr(short, "patches", 1)
    seconds += _EXAMS * _exam_seconds(student, chosen.exam(data))
    highest = _highest(data.train_images.device)
    if highest is not None and period:  # a pool of bytes, and as much while a batch joins
        image = torch.Size(data.shape).numel()
        highest += 2 * image * (real.pool_size - short.pool_size) / 1e6
    return seconds, highest


def _shortened(chosen: Settings, data: Dataset, name: str):
    """The source with few pseudo-batches, rounds and steps, and else as it is."""
    values = dict(chosen.values)
    for section in (name, *SOURCES.find(name).depends_on(chosen.section(name))):
        kind, own = SOURCES.find(section), dict(chosen.section(section))
        known = {key: own.get(key, keyword_default(kind, key)) for key in [*kind.keys()]}
        few = {**_FEW, "patches": 2 * known.get("batch_size", 1)}
        own |= {k: min(few[k], v) for k, v in known.items() if k in few and isinstance(v, int)}
        if "kd_steps" in known and "warmup" in known:  # rounds that are all synthesis
            own["warmup"] = 0
        values[section] = own
    return replace(chosen, values=values).source(name, data)


def _added_up(times, half, real, short, begins, renewals) -> float:
    """Seconds of the whole run from those of the short one's pseudo-batches.

    Late defenses begin at ``half`` of it, and at ``begins`` of the whole. What stands
    out in the first pseudo-batch, and where they begin, is counted once.
    """
    length, period = len(real), getattr(short, "kd_steps", 0)

    def plain(steps: Iterable[int]) -> list[float]:
        return [times[i] for i in steps if i < len(times) and not (period and i % period == 0)]

    def synthesis(at: int, usual: float) -> float:
        if not period or at >= len(times):
            return 0.0
        return max(0.0, times[at] - usual) * real.synthesis_steps / short.synthesis_steps

    early = plain(range(1, half)) or times[:1]
    usual = median_low(early)
    made = synthesis(period, usual)
    first = (
        times[0] - usual - (made * short.synthesis_steps / real.synthesis_steps if period else 0)
    )
    seconds = max(0.0, first) + min(begins, length) * usual
    rounds = -(-begins // real.kd_steps) if period else 0
    warm = getattr(real, "warmup", 0) if period else 0
    seconds += (rounds + warm) * made
    if begins < length and len(times) > half:
        after = plain(range(half + 1, len(times))) or times[half:]
        late = median_low(after)
        seconds += (length - begins) * late + max(0.0, times[half] - late)
        seconds += renewals * (max(after) - late)
        seconds += (real.rounds - rounds) * synthesis(2 * period, late) if period else 0.0
    return seconds


def _exam_seconds(model: nn.Module, exam: Exam) -> float:
    images = exam.images[:_EXAMINED]
    if not len(images):
        return 0.0
    count = len(exam.images) + sum(len(images) for images, _ in exam.attacks.values())
    predict(model, images[:2])
    began = time.perf_counter()
    predict(model, images).sum().item()
    return (time.perf_counter() - began) * count / len(images)


def _purifying(chosen, data, teacher, label, root) -> float:
    """Seconds that the label's purifiers take; 0 where the purified teacher is there."""
    if not label.purifiers:
        return 0.0
    made = Label(TEACHER, purifiers=label.purifiers)
    if _is_done(root, chosen, made):
        return 0.0
    return purifying_seconds(teacher, data, chosen.purifiers(*label.purifiers))


def purifying_seconds(teacher: nn.Module, data: Dataset, purifiers: Sequence[Purifier]) -> float:
    """About how long these purifiers take: the passes of images that they and the pool
    need, times the time of one, which is measured.
    """
    each = sum(purifier.passes(len(data.classes)) for purifier in purifiers)
    return (384 * 40 + each) * seconds_per_image(teacher, data)


def seconds_per_image(model: nn.Module, data: Dataset) -> float:
    """Of one image's way forwards and backwards through a network, the best of three."""
    best, where = float("inf"), data.train_images.device
    images = torch.zeros(32, *data.shape, device=where)
    model = model.to(where)
    with mode(model, training=False), frozen(model):
        for _ in range(3):
            began = time.perf_counter()
            given = images.clone().requires_grad_()
            torch.autograd.grad(model(given).float().sum(), [given])[0].sum().item()
            best = min(best, time.perf_counter() - began)
    return best / len(images)


def _forget_highest() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux: the highest resident size is counted anew
        Path("/proc/self/clear_refs").write_text("5")


def _highest(device: torch.device) -> float | None:
    """MB that the process held at most since :func:`_forget_highest` (where the system
    can forget; else since it began), or the device; None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
