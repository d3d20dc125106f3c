"""The benchmarks run to their report at tiny sizes. What they measure is for ``make
bench``, on an idle machine.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    return measure


@pytest.mark.slow
def test_the_report_has_every_table_with_figures(measure, tmp_path):
    path = tmp_path / "README.md"
    settings = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ABDLAB_", "COV_"))
    }
    settings |= {"ABDLAB_BENCH": "tiny", "ABDLAB_BENCH_README": str(path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        BENCHMARKS,
        "-m",
        "benchmark",
    ]
    done = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider"],
        env=settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    text = path.read_text()
    assert text in done.stdout
    parts = dict(zip(*[iter(re.split(r"^## (.*)$", text, flags=re.M)[1:])] * 2, strict=True))
    assert list(parts) == list(measure.SECTIONS)
    for name, part in parts.items():
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        assert len(rows) > 2, name
        assert not re.search(r"\b(nan|inf)\b", part), name
    against = parts["Against the naive loop"]
    for what in (
        "pseudo-batch",
        "pseudo-batch, SV",
        "SR step, order 1",
        "SR step, order 2",
        "CMI, a KD step",
        "OOD step",
    ):
        assert re.search(
            rf"^\| {what} \|.*\| cpu \| [\d.e-]+ \| [\d.e-]+ \| [\d.]+x \|", against, re.M
        ), what
    assert "teacher epoch of 16 images, bf16" in against
    assert re.search(r"^\| SV \|.*[+-][\d.]+% \|$", parts["What an option adds"], re.M)
    for source in ("zskt", "cmi", "ood"):
        assert f"| {source} | quick/digits | trained |" in parts["Implicit term of SR"]
    gpu = [line for line in parts["On a GPU"].splitlines() if line.startswith("|")][2:]
    for what in (
        "student steps, graphs, bf16",
        "80,000 pseudo-batches",
        "CIFAR-10 teacher",
        "warm start",
        "side by side",
    ):
        assert sum(what in line for line in gpu) == 1, what
    if not torch.cuda.is_available():
        assert all("| not measured | torch sees no GPU here |" in line for line in gpu)
    for method in ("zskt", "zskt+sv+tu"):
        assert re.search(
            rf"^\| {re.escape(method)} \| bf16 \| 0, 1, 2 \| [\d.]+ ± [\d.]+ \|",
            parts["bf16 against float32"],
            re.M,
        )
    assert "these figures mean nothing" in text
    assert ("not measured" in text) == (not torch.cuda.is_available())
    for private in (platform.node(), str(Path.home()), str(BENCHMARKS), str(tmp_path)):
        assert not private or private not in text


@pytest.fixture
def tiny_double(measure, monkeypatch, double):
    monkeypatch.setattr(
        measure, "MAIN", measure.Size("wrn-10-1", "wrn-10-1", (3, 8, 8), 8, 4, 3, 4)
    )
    return measure


@pytest.mark.parametrize("vaccine", [False, True])
def test_the_naive_pseudo_batch_computes_what_ours_does(tiny_double, vaccine):
    loops = tiny_double.Loops(tiny_double.MAIN, "cpu", vaccine=vaccine)
    for _ in range(2):
        ours, theirs = loops.ours(), loops.theirs()
        assert theirs.keys() == {
            "generator",
            "kd",
            "attention",
            *(["sv_synthesis"] if vaccine else []),
        }
        # the naive loop's learning rates are constant: ours fall by a cosine over a run
        # that is long
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("perturb", "order"), [("teacher", 2), ("student", 1), ("student", 2)])
def test_the_naive_sr_step_computes_what_ours_does(tiny_double, perturb, order):
    step = tiny_double.SRStep("cpu", perturb, order)
    ours, theirs = step.ours()[1], step.theirs()[1]
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-9)
    torch.testing.assert_close(
        step.gradients["ours"], step.gradients["naive"], rtol=1e-9, atol=1e-12
    )


def test_losses_that_differ_fail_a_benchmark(measure):
    measure.agree({"kd": 1.001}, {"kd": 1.0}, "cpu", kd=1e-2)
    with pytest.raises(AssertionError, match=r"kd is 1\.02 in ours and 1\.0 in the naive loop"):
        measure.agree({"kd": 1.02}, {"kd": 1.0}, "cpu", kd=1e-2)


def test_sides_are_called_in_turns_and_the_best_call_counts(measure):
    called, seconds = [], iter([9.0, 5.0, 2.0, 1.0, 3.0, 2.0])
    sides = {
        name: lambda name=name: (next(seconds), called.append(name) or len(called))
        for name in ("ours", "naive")
    }
    found = measure.interleave(3, **sides)
    assert called == ["ours", "naive"] * 3
    assert [(f.first, f.best, f.spread) for f in found.values()] == [(1, 2.0, 0.5), (2, 1.0, 1.0)]
