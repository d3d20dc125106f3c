"""What the issue asks of a GPU. Where torch sees none every line says "not measured":
no figure stands for one that was not taken.
"""

import copy
import functools
import statistics
import subprocess
import sys
import time

import pytest
import torch
from measure import ENDLESS, MAIN, TINY, Loops, clock, interleave, settle

from abdlab import ZSKT, SelfRetrospection, ShufflingVaccine, distill, settings, side_by_side, train
from abdlab.models import place

pytestmark = pytest.mark.benchmark
GPU = torch.cuda.is_available()
#: how our loop can compute there; on a CPU, where tiny sizes test this file, there are
#: no graphs
WAYS = {
    "eager": {},
    "graphs": {"graphs": GPU},
    "bf16": {"precision": "bf16"},
    "graphs, bf16": {"graphs": GPU, "precision": "bf16"},
}
#: pseudo-batches before the clock starts, in which pieces are captured, and of each
#: measurement
WARM, BATCHES, LONG = (1, 1, 2) if TINY else (10, 20, 2000)
PAPER = 80_000


def several(function, count):
    """``function`` called so many times in succession; what it returned last."""

    def call():
        for _ in range(count):
            result = function()
        return result

    return call


@functools.cache
def paces(device):
    """Name of the way -> (student steps per second, times the naive loop's), all in
    turns.
    """
    loops = {way: Loops(MAIN, device, **options) for way, options in WAYS.items()}
    for each in loops.values():
        several(each.ours, WARM)()
    sides = {way: clock(several(each.ours, BATCHES), device) for way, each in loops.items()}
    count = 1 if TINY else 5
    found = interleave(naive=clock(several(loops["eager"].theirs, count), device), **sides)
    naive = 10 * count / found.pop("naive").best
    return {
        way: (10 * BATCHES / timed.best, 10 * BATCHES / timed.best / naive)
        for way, timed in found.items()
    }


def student_steps(way, device):
    steps, times = paces(device)[way]
    return f"{steps:.0f} student steps/s", f"{times:.1f}x the eager naive loop in the same run"


def seconds_each(device, count, *defenses):
    """Seconds per pseudo-batch, over so many, with graphs in bf16 and these defenses
    from the start.
    """
    teacher, student = MAIN.networks()
    source = ZSKT(MAIN.shape, pseudo_batches=ENDLESS, batch_size=MAIN.batch, width=MAIN.generator)
    stream = distill(
        teacher, student, source, defenses=defenses, device=device, **WAYS["graphs, bf16"]
    )
    several(lambda: next(stream), WARM)()
    settle(device)
    began = time.perf_counter()
    several(lambda: next(stream), count)()
    settle(device)
    return (time.perf_counter() - began) / count


def whole_run(device):
    def vaccine():
        return ShufflingVaccine(layers=MAIN.layers, warmup=0, verify=False)

    most = seconds_each(device, LONG, vaccine())
    last = seconds_each(device, BATCHES, vaccine(), SelfRetrospection(start=0))
    minutes = PAPER * (0.99 * most + 0.01 * last) / 60
    return (
        f"{minutes:.1f} min",
        (
            f"graphs, bf16, SV, and SR in the last 1 %; from {LONG} pseudo-batches, and {BATCHES}"
            " with SR"
        ),
    )


def teacher_to_92(device):
    options = {
        "precision": "bf16",
        "schedule": "onecycle",
        "lr": 0.4,
        "batch_size": 512,
        "epochs": 24,
    }
    chosen = settings(
        "paper/cifar10/zskt", {f"teacher.{k}": v for k, v in options.items()}, device=device
    )
    if TINY:
        options |= {"epochs": 1, "batch_size": 8}
        chosen = settings(
            "quick/digits", {f"teacher.{k}": v for k, v in options.items()}, device=device
        )
    try:
        data = chosen.dataset()
    except (FileNotFoundError, ValueError) as error:
        return "not measured", str(error).splitlines()[0]
    data = data.subset(train=32, test=8) if TINY else data
    poisoned, exam = chosen.poison(data), chosen.exam(data)
    examined, best = 0.0, 0.0
    began = time.perf_counter()

    def measured(model):
        nonlocal examined
        settle(device)
        at = time.perf_counter()
        found = exam(model)
        settle(device)
        examined += time.perf_counter() - at
        return found

    for step in train(
        chosen.teacher(data),
        poisoned.images,
        poisoned.labels,
        exam=measured,
        exam_every=1,
        **chosen.training(data),
    ):
        seconds, best = time.perf_counter() - began - examined, max(best, step.acc)
        if step.acc >= 0.92:
            return (
                f"{seconds:.0f} s",
                (
                    f"epoch {step.index} of {step.total}, ASR {step.asr:.1%}; exams, {examined:.0f}"
                    " s, aside"
                ),
            )
    return f"{best:.1%} ACC at most", f"in {seconds:.0f} s; exams aside"


START = """
import sys
from abdlab import ZSKT, build, distill
names = ({teacher!r}, {student!r})
teacher, student = (build(name, channels={channels}, width={width}) for name in names)
source = ZSKT({shape}, pseudo_batches=100, batch_size={batch}, width={generator})
stream = distill(teacher, student, source, device={device!r}, graphs={graphs})
for _ in range({steps}):
    next(stream)
stream.close()
"""


def warm_start(device):
    fields = {
        name: getattr(MAIN, name)
        for name in ("teacher", "student", "shape", "batch", "generator", "width")
    }
    code = START.format(**fields, channels=MAIN.shape[0], device=device, graphs=GPU, steps=4 * WARM)
    took = []
    for _ in range(1 if TINY else 3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)
        took.append(time.perf_counter() - began)
    return (
        f"{statistics.median(took):.1f} s",
        f"a new process to its pseudo-batch {4 * WARM}, with everything captured",
    )


def in_one_process(device):
    """Pseudo-batches per second of several runs in one process, against one."""
    found = {}
    for runs in (1, 2) if TINY else (1, 2, 4, 8):
        networks = [
            tuple(place(copy.deepcopy(n), torch.device(device)) for n in MAIN.networks())
            for _ in range(runs)
        ]
        streams = [
            distill(
                *pair,
                ZSKT(
                    MAIN.shape, pseudo_batches=ENDLESS, batch_size=MAIN.batch, width=MAIN.generator
                ),
                seed=seed,
                device=device,
                **WAYS["graphs, bf16"],
            )
            for seed, pair in enumerate(networks)
        ]
        together = side_by_side(streams)
        several(lambda together=together: next(together), runs * WARM)()
        began = time.perf_counter()
        several(lambda together=together: next(together), runs * BATCHES)()
        found[runs] = runs * BATCHES / (time.perf_counter() - began)
        together.close()
    return (
        ", ".join(f"{runs}: {pace / found[1]:.2f}x" for runs, pace in found.items()),
        (
            f"runs: pseudo-batches per second against one run's {found[1]:.2f}; threads and CUDA"
            " streams, graphs, bf16"
        ),
    )


FIGURES = {
    **{f"student steps, {way}": functools.partial(student_steps, way) for way in WAYS},
    f"{PAPER:,} pseudo-batches, extrapolated": whole_run,
    "a poisoned CIFAR-10 teacher to 92 % ACC": teacher_to_92,
    "warm start": warm_start,
    "runs side by side in one process": in_one_process,
}


@pytest.mark.parametrize("what", FIGURES)
def test_on_a_gpu(report, what):
    if GPU or TINY:
        figure, note = FIGURES[what]("cuda" if GPU else "cpu")
        assert figure
        assert note
    if not GPU:
        figure, note = "not measured", "torch sees no GPU here"
    report.add("On a GPU", what=what, size=MAIN, figure=figure, note=note)
