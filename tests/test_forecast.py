"""What a run will take: the arithmetic by hand, and that nothing of the timed copy reaches
the run.
"""

import json
from dataclasses import replace

import pytest
import torch

from abdlab import distilled, forecast, settings, studies
from abdlab.forecast import Forecast, _added_up, forecast_teacher
from abdlab.sources import NAYER, ZSKT
from abdlab.studies.gpu import gpu_hours, speeds, student_seconds, teacher_seconds

SHORT = {
    "teacher.width": 4,
    "student.width": 4,
    "zskt.width": 4,
    "zskt.batch_size": 8,
    "zskt.student_steps": 1,
    "zskt.pseudo_batches": 30,
    "tu.inner_steps": 1,
    "tu.triggers": 1,
    "tu.renewals": 3,
    "nayer.width": 4,
}


def chosen(**more):
    return settings("quick/digits", SHORT | more, seed=3, device="cpu")


def test_a_plain_run_by_hand():
    real, short = (ZSKT((1, 8, 8), pseudo_batches=n) for n in (100, 6))
    # a first one of 5 s, then 1 s each: 4 s stand out once
    assert _added_up([5.0, 1.0, 1.0], 3, real, short, 100, 0) == 100 + 4
    # from 80 on 3 s each; the first of these takes 10 s, and a renewal 1 s more, 5 times
    found = _added_up([5.0, 1.0, 1.0, 10.0, 4.0, 3.0], 3, real, short, 80, 5)
    assert found == 80 * 1 + 4 + 20 * 3 + 7 + 5 * 1


def test_a_run_in_rounds_by_hand():
    sizes = {"kd_steps": 10, "synthesis_steps": 20, "batch_size": 4}
    real = NAYER((1, 8, 8), rounds=6, warmup=2, **sizes)
    short = NAYER((1, 8, 8), rounds=3, warmup=0, **sizes | {"kd_steps": 4, "synthesis_steps": 2})
    # 60 student steps of 1 s; a synthesis step takes (5 - 1) / 2 = 2 s, of 20 in 8 rounds
    assert _added_up([5.0, 1.0, 1.0, 1.0, 5.0], 6, real, short, 60, 0) == 60 + 8 * 20 * 2


def test_the_run_is_not_touched(digits, tmp_path):
    now, weights = chosen(), []
    teacher = now.teacher(digits).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for root, told in ((tmp_path / "plain", False), (tmp_path / "told", True)):
        if told:
            drawn = torch.get_rng_state()
            (found,) = forecast(root, now, digits, ["zskt+sv+tu"], teacher)
            assert torch.equal(torch.get_rng_state(), drawn)
            assert found.steps == 30
            assert 0 < found.seconds < 300
            assert not [*tmp_path.glob("told/*")]
        student, _ = distilled(root, now, digits, teacher, "zskt+sv+tu", tell=lambda *_: None)
        weights.append(student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert forecast(root, now, digits, ["zskt+sv+tu"], teacher) == [], "it is done"


def test_a_pool_counts_before_it_is_full(digits):
    small, large = (
        forecast(None, chosen(**{"nayer.rounds": n}), digits, ["nayer"])[0] for n in (2, 200_000)
    )
    # images of 64 bytes, 32 a round, and as much again while a round joins
    pool = 2 * 64 * 32 * 199_998 / 1e6
    assert small.megabytes + 0.9 * pool < large.megabytes
    assert large.seconds > 1000 * small.seconds


def test_what_is_told():
    told = str(Forecast("zskt+tu", 640, 128.0, 417.2))
    assert told == "zskt+tu: about 2 min 10 s and 420 MB for 640 pseudo-batches"
    assert str(Forecast("bounded/teacher", 0, 12.4)) == "bounded/teacher: about 12 s"


def test_a_teachers_epochs(digits):
    short, long = (forecast_teacher(chosen(**{"teacher.epochs": n}), digits) for n in (1, 4000))
    assert str(long).startswith("teacher: about ")
    assert str(long).endswith("for 4,000 epochs")
    assert long.seconds > 20 * short.seconds


def test_dry_runs_tell_it(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    over = json.dumps({**SHORT, "clean.epochs": 1, "teacher.epochs": 1})
    given = ["-p", "overrides", over, "-p", "defenses", "[]", "-p", "device", "cpu"]
    code, out, err = here("run", "02", *given, "--dry-run")
    assert code == 0, err
    for line in (
        r"teacher: about ",
        "clean: 4 pseudo-batches, too few to be timed",
        "zskt: about ",
        " for 30 pseudo-batches",
        "in all: about ",
    ):
        assert line in out
    (tmp_path / "study.yaml").write_text(
        "notebook: 05\n"
        "parameters: {device: cpu, methods: [zskt], overrides: " + over + "}\n"
        "seeds: [0, 1]\n"
    )
    code, out, err = here("sweep", "study.yaml", "--dry-run", "--slots", 1)
    assert code == 0, err
    told = " ".join(out.split())
    assert "2 jobs and 2 shared teachers, 4 to run, 1 at a time" in told
    assert "by a few timed steps of each kind of job (4 jobs, 2 kinds)" in told
    assert "GPU-hours" not in told, "digits are no matter for a GPU"


def test_gpu_hours_by_hand():
    pace = speeds()
    now = settings("paper/cifar10/zskt")
    steps = 80_000 * 10
    plain, eager = student_seconds(now, "zskt"), pace["plain", "eager"]
    assert plain == pytest.approx(steps / eager)
    slower = pace["vaccine", "graphs, bf16"] / pace["plain", "graphs, bf16"]
    both = 0.99 * steps / (eager * slower) + 0.01 * steps / pace["late", "graphs, bf16"]
    assert student_seconds(now, "zskt+sv+sr") == pytest.approx(both, rel=0.01)
    fast = replace(now, values={**now.values, "student": {"graphs": True, "precision": "bf16"}})
    assert student_seconds(fast, "zskt") == pytest.approx(steps / pace["plain", "graphs, bf16"])
    # 200 rounds of 400 steps on 256 images, and 220 of 5 that make them
    fastdfkd = settings("paper/cifar10/fastdfkd")
    assert student_seconds(fastdfkd, "fastdfkd") == pytest.approx(2 * (80_000 + 1_100) / eager)
    study = studies.make_study(
        5, parameters={"preset": "paper/cifar10/zskt", "methods": ["zskt"]}, seeds=[0, 1]
    )
    hours = 2 * (plain + teacher_seconds(now)) / 3600
    assert gpu_hours(study, study.jobs).startswith(f"about {hours:,.0f} GPU-hours for 2 jobs and 2")
