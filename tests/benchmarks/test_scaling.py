"""How a pseudo-batch grows with its sizes, what runs side by side do to each other, and
where memory and time go.
"""

import functools
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import psutil
import pytest
import torch
from measure import (
    DEVICES,
    MAIN,
    SCALED,
    SMALL,
    THREADS,
    TINY,
    Loops,
    SRStep,
    agree,
    clock,
    interleave,
    ratio,
    settle,
)
from torch.profiler import ProfilerActivity, profile

pytestmark = [pytest.mark.benchmark, pytest.mark.parametrize("device", DEVICES)]
BATCHES, IMAGES, WIDTHS = (
    ((4,), (12,), (8,)) if TINY else ((32, 64, 128, 256), (16, 32, 64), (8, 16, 32))
)
AXES = [("batch", value, replace(SCALED, batch=value)) for value in BATCHES]
AXES += [("image size", value, replace(SCALED, shape=(3, value, value))) for value in IMAGES]
AXES += [("width", value, replace(SCALED, width=value, generator=2 * value)) for value in WIDTHS]


@pytest.mark.parametrize(
    ("axis", "value", "size"), AXES, ids=[f"{axis} {value}" for axis, value, _ in AXES]
)
def test_pseudo_batch(report, axis, value, size, device):
    loops = Loops(size, device)
    found = interleave(2, ours=clock(loops.ours, device), naive=clock(loops.theirs, device))
    agree(found["ours"].first, found["naive"].first, device, generator=1e-3, kd=1e-2)
    report.add(
        "Scaling",
        axis=axis,
        value=value,
        size=size,
        device=device,
        **ratio(found["naive"], found["ours"]),
        ours_ms_per_image=f"{1000 * found['ours'].best / size.batch:.2f}",
    )


OFFICIAL = "SR, delta for the teacher"
#: what is run for its memory and its profile; a step with SR is always alone
KINDS = {
    "plain": lambda device, steps=1: Loops(MAIN, device, student_steps=steps),
    "SV": lambda device, steps=1: Loops(MAIN, device, vaccine=True, student_steps=steps),
    "SR, order 1": lambda device, steps=1: SRStep(device, "student", 1),
    "SR, order 2": lambda device, steps=1: SRStep(device, "student", 2),
    OFFICIAL: lambda device, steps=1: SRStep(device, "teacher", 2),
}
if TINY:
    KINDS = {"plain": KINDS["plain"]}
#: starts processes that have nothing behind them, and their imports only once
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "abdlab"])


def peak(kind, side, device):
    """MB by which memory grows at most in one call of a side; for a process of its own."""
    torch.set_num_threads(THREADS)
    call, process, highest, done = (
        getattr(KINDS[kind](device), side),
        psutil.Process(),
        [0],
        threading.Event(),
    )
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(highest[0], process.memory_info().rss) - before) / 2**20


def test_peak_memory(report, device):
    @functools.cache
    def of(kind, side):
        with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
            return pool.submit(peak, kind, side, device).result()

    for kind in KINDS:
        naive, ours = of(OFFICIAL if kind.startswith("SR") else kind, "theirs"), of(kind, "ours")
        figures = {
            "naive_MB": f"{naive:.0f}",
            "ours_MB": f"{ours:.0f}",
            "ours_to_naive": f"{ours / naive:.2f}",
        }
        report.add("Peak memory", what=kind, size=MAIN, device=device, **figures)


def meet(barrier):
    """A worker's first call: where it waits for the others."""
    global _barrier
    _barrier = barrier


def pace(device, threads, batches):
    """Pseudo-batches per second of one run among others, all of which begin together
    once they are warm.
    """
    torch.set_num_threads(threads)
    loops = Loops(SMALL, device)
    loops.ours()
    _barrier.wait(120)
    began = time.perf_counter()
    for _ in range(batches):
        loops.ours()
    settle(device)
    return batches / (time.perf_counter() - began)


def test_runs_side_by_side(report, device):
    batches, alone = 3 if TINY else 20, None
    cores = 2 if TINY else min(max(2, THREADS), 4 if device == "cuda" else THREADS)
    for runs in dict.fromkeys((1, 2, cores)):
        threads = max(1, cores // runs) if not TINY else 1
        with ProcessPoolExecutor(
            runs, mp_context=CONTEXT, initializer=meet, initargs=(CONTEXT.Barrier(runs),)
        ) as pool:
            total = sum(
                f.result()
                for f in [pool.submit(pace, device, threads, batches) for _ in range(runs)]
            )
        alone = alone or total
        report.add(
            "Runs side by side",
            runs=runs,
            threads_each=threads,
            size=SMALL,
            device=device,
            pseudo_batches_per_s=f"{total:.3g}",
            against_one_run=f"{total / alone:.2f}x",
        )


def share(name):
    """The group of an operation."""
    return next(
        (
            group
            for key, group in (("conv", "convolution"), ("batchnorm", "batch norm"))
            if key in name.lower().replace("_", "")
        ),
        "else",
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != OFFICIAL])
def test_profile(report, kind, device):
    call, on_gpu = KINDS[kind](device, 10).ours, device == "cuda"
    call()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ) as found:
        call()
        settle(device)
    spent = {"convolution": 0.0, "batch norm": 0.0, "else": 0.0}
    most = {}
    for event in found.key_averages():
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[share(event.key)] += seconds
        if share(event.key) == "else":
            most[event.key] = seconds
    total = sum(spent.values())
    assert spent["convolution"] > 0
    shares = {group.replace(" ", "_"): f"{seconds / total:.1%}" for group, seconds in spent.items()}
    largest = ", ".join(
        f"{name} {seconds / total:.1%}"
        for name, seconds in sorted(most.items(), key=lambda e: -e[1])[:3]
    )
    report.add("Profile", what=kind, size=MAIN, device=device, **shares, most_of_else=largest)
