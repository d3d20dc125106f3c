"""What the benchmarks share: sizes, both loops from one start, interleaved timing, and
the report.

Environment variables: ``ABDLAB_BENCH=tiny`` takes sizes that end in seconds, to test
the benchmarks themselves; ``ABDLAB_BENCH_README`` is a file that the report is written
to, by the benchmarks that add to it alone; ``ABDLAB_BENCH_RUN`` is a run's folder whose
students test_implicit_term.py takes.
"""

import copy
import datetime
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import literal
import torch
from naive import NaiveZSKT, self_retrospection

from abdlab import ZSKT, SelfRetrospection, ShufflingVaccine, build
from abdlab.defenses import Defense
from abdlab.distill import distill, seed_of
from abdlab.graphs import Captured
from abdlab.models import normalization, place

TINY = os.environ.get("ABDLAB_BENCH") == "tiny"
#: calls of each side
REPEATS = 2 if TINY else 3
THREADS = 1 if TINY else os.cpu_count() or 1
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: what tolerances are multiplied by: a GPU convolves in TF32
SLACK = {"cpu": 1, "cuda": 20}
#: pseudo-batches of a run that no benchmark reaches the end of
ENDLESS = 10_000

#: the report's tables in their order, and what a reader must know of each
SECTIONS = {
    "Against the naive loop": (
        f"Seconds are the least of {REPEATS} calls, ours and naive in turns in one process; spread"
        " is how much longer the slowest took, the first one aside (naive, ours). A pseudo-batch"
        " is 1 generator step and 10 student steps. The SR step is one student step with 10 inner"
        " steps; *official* is delta for the teacher, order 2, clean logits anew in each inner"
        " step. What the naive side does is in `naive.py`. Losses of both sides are compared; two"
        " that do not compute the same (bf16, SR's orders) each have a partner that does."
    ),
    "What an option adds": (
        "Our own loop with the option against our own without it, from the calls above."
    ),
    "Peak memory": (
        "Growth of the process's resident memory over its networks (on a GPU: of torch's allocated"
        " memory), in MB, in the first pseudo-batch with 1 student step, each in a fresh process."
        " For SR the naive side is *official*."
    ),
    "Scaling": "One plain pseudo-batch, the better of two; one setting changes at a time.",
    "Runs side by side": (
        "Plain pseudo-batches of several runs at once, in processes of their own that share the"
        " cores (or the GPU)."
    ),
    "On a GPU": (
        "What the paper's sizes take on a GPU; a line without a figure says why. Our loop and the"
        " naive one (eager, float32) run in turns in one process. torch multiplies in TF32 there"
        " where it does by default. What one H100 did: [GPU.md](GPU.md)."
    ),
    "Profile": (
        "Shares of torch's own time by operation, forward and backward, in one of our"
        " pseudo-batches (with SR: of 1 student step)."
    ),
    "Implicit term of SR": (
        "Norm of the gradient through delta over that of the direct gradient, of SR's term for a"
        " student's weights, on batches of images of its own source (order 2 adds the former),"
        " after delta's 10 Adam steps; settings are those of the signature."
    ),
    "bf16 against float32": (
        "Students of the quick preset on digits, on the CPU, at the end of their runs: mean ±"
        " standard deviation over seeds. The same teachers, in float32. Apart: the difference of"
        " the two precisions' means, of ACC and of ASR, in standard errors; up to 2 or 3 is seed"
        " noise."
    ),
}


@dataclass(frozen=True)
class Size:
    """Networks and batches: ``generator`` and ``width`` are channels, ``layers`` are
    shuffled by the vaccine.
    """

    teacher: str
    student: str
    shape: tuple[int, int, int]
    batch: int
    generator: int
    layers: int
    width: int | None = None

    def __str__(self):
        return (
            f"{self.teacher} to {self.student}, {'x'.join(map(str, self.shape))}, batch"
            f" {self.batch}"
        )

    def networks(self):
        """An untrained teacher and student."""
        return [
            build(n, channels=self.shape[0], width=self.width, seed=i)
            for i, n in enumerate((self.teacher, self.student))
        ]


MAIN = Size("wrn-16-2", "wrn-16-1", (3, 32, 32), 128, 64, 5)
SMALL = Size("wrn-10-2", "wrn-10-1", (1, 16, 16), 32, 24, 3)
SCALED = Size("wrn-10-1", "wrn-10-1", (3, 32, 32), 64, 32, 3, 16)
if TINY:
    MAIN, SMALL, SCALED = (
        Size("wrn-10-1", "wrn-10-1", (channels, 8, 8), 8, 4, 3, 4) for channels in (3, 1, 3)
    )


class Clock(Defense, Captured):
    """No defense: it notes when the student steps of a pseudo-batch begin, where that
    is wanted.
    """

    captures, timing = True, False

    def observe(self, batch):
        if self.timing:
            settle(self.device)
            self.began = time.perf_counter()

    def passed(self):
        """Seconds since then."""
        settle(self.device)
        return time.perf_counter() - self.began


class Loops:
    """Our ZSKT run and the naive one, from the same networks and with the same noise.

    Args:
        vaccine: both with SV, unverified, from the first pseudo-batch on.
        defenses: of our side only. options: of our side's :func:`abdlab.distill`, such
            as precision.
    """

    def __init__(self, size, device, *, vaccine=False, defenses=(), student_steps=10, **options):
        device = torch.device(device)
        settings = {
            "pseudo_batches": ENDLESS,
            "batch_size": size.batch,
            "width": size.generator,
            "student_steps": student_steps,
        }
        teacher, self.student = size.networks()
        self.steps = student_steps
        twins = [
            place(copy.deepcopy(net), device, "float32").requires_grad_(True)
            for net in (teacher.eval(), self.student.train())
        ]
        source, self.clock = ZSKT(size.shape, **settings), Clock()
        source.start(*twins, device, seed_of(0, "source", "zskt"))
        self.naive = NaiveZSKT(source, *twins)
        vaccines = [
            ShufflingVaccine(layers=size.layers, warmup=0, verify=False) for _ in range(2 * vaccine)
        ]
        for twin in vaccines[1:]:
            twin.start(*twins, device, seed_of(0, "defense", twin.name), ENDLESS)
            twin.before(0)
            self.naive.copies = literal.shuffled_teachers(twins[0], twin.vaccine.permutations)
        active = [*vaccines[:1], *defenses, self.clock]
        self.stream = distill(
            teacher,
            self.student,
            ZSKT(size.shape, **settings),
            defenses=active,
            device=device,
            **options,
        )

    def ours(self):
        return next(self.stream).losses

    def theirs(self):
        return self.naive.pseudo_batch(self.steps)


class SRStep:
    """The student step with SR of a pseudo-batch with one, ours and naive, as sides of
    :func:`interleave`.

    Args:
        perturb: whose answer delta changes. order: of the naive side, and of ours where
            the student is perturbed (for the teacher there is no gradient through
            delta, and ours has order 1 only).

    ``gradients`` are those of the first step, one vector per side, clipped.
    """

    weight = 1000.0  # so that SR's gradient shows beside that of attention transfer

    def __init__(self, device, perturb, order):
        ours = order if perturb == "student" else 1
        sr = SelfRetrospection(start=0, lr=None, weight=self.weight, perturb=perturb, order=ours)
        self.order, self.loops, self.gradients = (
            order,
            Loops(MAIN, device, defenses=[sr], student_steps=1),
            {},
        )
        self.loops.clock.timing = True
        self.rng, loop = (
            torch.Generator().manual_seed(seed_of(0, "defense", sr.name)),
            self.loops.naive,
        )
        self.victim, self.init_std = (
            {"student": loop.student, "teacher": loop.teacher}[perturb],
            sr.init_std,
        )
        self.scale = torch.tensor(
            normalization(loop.teacher, MAIN.shape[0])[1], device=device
        ).view(1, -1, 1, 1)

    def ours(self):
        losses = self.loops.ours()
        seconds = self.loops.clock.passed()
        self.gradients.setdefault("ours", flat_gradient(self.loops.student))
        return seconds, losses

    def theirs(self):
        loop, device = self.loops.naive, self.scale.device
        noise = loop.source.noise()
        loop.generator_step(noise)
        start = (self.init_std * torch.randn((1, *MAIN.shape), generator=self.rng)).to(device)

        def sr(images):
            value, gradients = self_retrospection(
                loop.student, self.victim, images, start, self.scale, self.order
            )
            return self.weight * value, [self.weight * g for g in gradients]

        seconds, losses = clock(lambda: loop.student_step(noise, sr), device)()
        self.gradients.setdefault("naive", flat_gradient(loop.student))
        return seconds, losses


def trainable(model, device):
    """A copy on the device, every weight of which takes a gradient."""
    return place(copy.deepcopy(model), torch.device(device), "float32").requires_grad_(True)


def flat_gradient(model):
    """The gradients of all weights as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def settle(device):
    """Wait for the GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(function, device="cpu"):
    """``function`` as a side of :func:`interleave`: () -> (seconds, what it returns)."""

    def side():
        settle(device)
        began = time.perf_counter()
        result = function()
        settle(device)
        return time.perf_counter() - began, result

    return side


@dataclass
class Timed:
    """``first`` is what the first call returned; ``seconds`` are those of all calls."""

    first: dict
    seconds: list[float]

    @property
    def best(self):
        return min(self.seconds)

    @property
    def spread(self):
        """How much longer than the best call the slowest one took, as a share; without
        the first one, which warms up.
        """
        return max(self.seconds[1:] or self.seconds) / self.best - 1


def interleave(calls=REPEATS, **sides):
    """Call the sides in turn, so many times; name -> :class:`Timed`. Each side is () ->
    (seconds, result).
    """
    found = {}
    for _ in range(calls):
        for name, side in sides.items():
            seconds, result = side()
            found.setdefault(name, Timed(result, [])).seconds.append(seconds)
    return found


def agree(ours, theirs, device, **tolerances):
    """Assert that losses of both sides are equal up to a relative tolerance each, times
    the device's :data:`SLACK`.
    """
    for name, tolerance in tolerances.items():
        a, b = ours[name], theirs[name]
        assert abs(a - b) <= SLACK[device] * tolerance * abs(b) + 1e-6, (
            f"{name} is {a} in ours and {b} in the naive loop"
        )


def ratio(naive, ours):
    """The columns of seconds and their ratio, of two :class:`Timed`."""
    return {
        "naive_s": f"{naive.best:.3g}",
        "ours_s": f"{ours.best:.3g}",
        "ratio": f"{naive.best / ours.best:.2f}x",
    }


class Report:
    """Rows by section, as Markdown."""

    def __init__(self):
        self.rows, self.load = {}, os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def add(self, section, **row):
        assert section in SECTIONS
        self.rows.setdefault(section, []).append(
            {name.replace("_", " "): value for name, value in row.items()}
        )

    def compare(self, what, size, device, naive, ours, note=""):
        """One row of seconds and their ratio, of two :class:`Timed`."""
        self.add(
            "Against the naive loop",
            what=what,
            size=size,
            device=device,
            **ratio(naive, ours),
            spread=f"{naive.spread:.0%}, {ours.spread:.0%}",
            note=note,
        )

    def added(self, what, size, device, without, with_it):
        """What an option costs: two :class:`Timed` of our own loop."""
        seconds = {"without_s": f"{without.best:.3g}", "with_s": f"{with_it.best:.3g}"}
        self.add(
            "What an option adds",
            what=what,
            size=size,
            device=device,
            **seconds,
            adds=f"{with_it.best / without.best - 1:+.1%}",
        )

    def machine(self):
        """One line per fact."""
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {
            "date": datetime.date.today().isoformat(),
            "CPU": (
                f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores,"
                f" {THREADS} threads used"
            ),
            "load before": (
                "not known"
                if self.load is None
                else f"{self.load:.1f} (other programs slow both sides)"
            ),
            "GPU": ", ".join(gpus) or "not measured: torch sees none here",
            "torch": f"{torch.__version__}, Python {platform.python_version()}",
            **(
                {"sizes": "tiny, to test the benchmarks: these figures mean nothing"}
                if TINY
                else {}
            ),
        }

    def markdown(self):
        text = [
            "# Speed and memory",
            "",
            "Written by `make bench-report`. Figures are of this machine and this run, not bounds.",
            "",
        ]
        text += _table([{"": key, "this machine": value} for key, value in self.machine().items()])
        for section, note in SECTIONS.items():
            if section in self.rows:
                text += ["", f"## {section}", "", note, "", *_table(self.rows[section])]
        return "\n".join([*text, ""])


def _table(rows):
    """Markdown lines; a column that is empty in all rows is left out."""
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(str(row.get(name, "")) for row in rows)
    ]
    cells = [
        names,
        ["---"] * len(names),
        *([str(row.get(name, "")) for name in names] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in cells]
