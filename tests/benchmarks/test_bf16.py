"""Whether a run in bf16 ends where one in float32 does: ACC and ASR over three seeds,
undefended and defended, on real digits.
"""

import shutil
import statistics
import time

import pytest
from measure import TINY

from abdlab import distilled, poisoned_teacher, settings

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher"),
]
SEEDS, LABELS = (0, 1, 2), ("zskt", "zskt+sv+tu")
SHORT = {}
if TINY:
    SHORT = {
        "teacher.epochs": 1,
        "teacher.model": "wrn-10-1",
        "teacher.width": 4,
        "student.width": 4,
        "zskt.pseudo_batches": 4,
        "zskt.batch_size": 8,
        "zskt.student_steps": 1,
        "zskt.width": 4,
    }
    SHORT |= {"tu.inner_steps": 1, "tu.triggers": 1, "tu.renewals": 0}


def spread(values):
    """Mean and standard deviation of shares, in %."""
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def apart(one, other):
    """The difference of two means over its standard error, both from as many seeds."""
    noise = ((statistics.variance(one) + statistics.variance(other)) / len(one)) ** 0.5
    gap = abs(statistics.fmean(one) - statistics.fmean(other))
    return f"{gap / noise:.1f}" if noise else "0" if gap == 0 else "no spread"


def test_three_seeds(report, tmp_path):
    found, seconds = {}, {}
    for seed in SEEDS:
        for precision in ("float32", "bf16"):
            root = tmp_path / precision
            chosen = settings(
                "quick/digits", {**SHORT, "student.precision": precision}, seed=seed, device="cpu"
            )
            data = chosen.dataset().subset(train=64, test=40) if TINY else chosen.dataset()
            if precision != "float32":  # both learn from the same teacher
                shutil.copytree(
                    tmp_path / "float32" / f"seed{seed}" / "teacher",
                    root / f"seed{seed}" / "teacher",
                )
            teacher = poisoned_teacher(root, chosen, data, tell=lambda label, step: None)
            for label in LABELS:
                began = time.perf_counter()
                _, metrics = distilled(
                    root, chosen, data, teacher, label, exams=1, tell=lambda label, step: None
                )
                found.setdefault((label, precision), []).append((metrics["acc"], metrics["asr"]))
                seconds.setdefault((label, precision), []).append(time.perf_counter() - began)
    for label in LABELS:
        plain, half = (
            list(zip(*found[label, precision], strict=True)) for precision in ("float32", "bf16")
        )
        for precision, (acc, asr) in (("float32", plain), ("bf16", half)):
            report.add(
                "bf16 against float32",
                method=label,
                precision=precision,
                seeds=", ".join(map(str, SEEDS)),
                **{"ACC_%": spread(acc), "ASR_%": spread(asr)},
                apart=f"{apart(plain[0], half[0])}, {apart(plain[1], half[1])}"
                if precision == "bf16"
                else "",
                s_each=f"{statistics.fmean(seconds[label, precision]):.0f}",
            )
