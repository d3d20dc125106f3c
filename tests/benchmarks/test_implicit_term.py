"""How large the gradient through delta is beside the direct one, on trained students:
whether SR's order 2 is worth its time.

Students are those of a run's folder (``ABDLAB_BENCH_RUN``), or the quick preset's with
shortened training.
"""

import json
import os
import statistics
from pathlib import Path

import pytest
import torch
from measure import TINY

from abdlab import SelfRetrospection, distilled, load_model, poisoned_teacher, settings, synthesize
from abdlab.defenses.self_retrospection import IMPLICIT_LR, implicit_gradient, universal_delta
from abdlab.features import frozen
from abdlab.losses import kl
from abdlab.models import normalization
from abdlab.runs import Run
from abdlab.settings import Settings

pytestmark = pytest.mark.benchmark
SHORT = {
    "zskt.pseudo_batches": 160,
    "cmi.rounds": 4,
    "deepinversion.rounds": 4,
    "ood.patches": 1024,
    "ood.epochs": 20,
}
if TINY:
    SHORT = {
        "teacher.epochs": 1,
        "zskt.pseudo_batches": 2,
        "zskt.batch_size": 8,
        "cmi.rounds": 1,
        "cmi.synthesis_steps": 1,
    }
    SHORT |= {
        "cmi.kd_steps": 2,
        "cmi.synthesis_batch": 8,
        "cmi.width": 4,
        "ood.patches": 64,
        "ood.epochs": 1,
    }
SOURCES = ["zskt", "cmi", "ood"] if TINY else ["zskt", "cmi", "deepinversion", "ood"]


def norm(gradients):
    """l2 norm over all weights."""
    return torch.stack([g.norm() for g in gradients]).norm().item()


def sizes(student, images, scale, seed):
    """(||direct||, ||implicit||) for one batch (B, C, H, W), as
    :class:`~abdlab.SelfRetrospection` computes both.
    """
    sr, rng = SelfRetrospection(order=2), torch.Generator().manual_seed(seed)
    start = (sr.init_std * torch.randn((1, *images.shape[1:]), generator=rng)).to(images.device)
    with frozen(student.train(), weights=False):
        with frozen(student):
            clean = student(images).detach()
            delta = universal_delta(
                student, images, clean, start, scale, sr.inner_steps, sr.inner_lr, sr.penalty
            )
        loss = kl(student(images), student(images + delta * scale)).mean()
        direct = torch.autograd.grad(loss, list(student.parameters()))
        implicit = implicit_gradient(
            student, images, delta, scale, sr.penalty, IMPLICIT_LR, sr.implicit_steps
        )
    return norm(direct), norm(implicit)


def students(root):
    """(source, settings, student's file): all finished students of a folder of runs, or
    shortened ones of the quick preset.
    """
    if folder := os.environ.get("ABDLAB_BENCH_RUN"):
        for path in sorted(Path(folder).rglob("student.safetensors")):
            config, label = (
                Run(path.parent).config,
                json.loads((path.parent / "metrics.json").read_text())["label"],
            )
            if label != "clean":
                yield label, Settings.of(config, "cpu"), path
        return
    for source in SOURCES:
        chosen = settings("quick/digits", SHORT, device="cpu")
        data = chosen.dataset().subset(train=64, test=20) if TINY else chosen.dataset()
        quiet = {"tell": lambda label, step: None}
        distilled(
            root,
            chosen,
            data,
            poisoned_teacher(root, chosen, data, **quiet),
            source,
            exams=1,
            **quiet,
        )
        yield source, chosen, Run(root / f"seed{chosen.seed}" / source).file("student.safetensors")


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_implicit_term_by_source(report, tmp_path):
    batches, size = (2, 8) if TINY else (8, 32)
    for label, chosen, path in students(tmp_path):
        data = chosen.dataset()
        teacher = load_model(path.parents[1] / "teacher" / "teacher.safetensors")
        scale = torch.tensor(normalization(teacher, data.shape[0])[1]).view(1, -1, 1, 1)
        images = synthesize(Run(path.parent), chosen, data, teacher, batches * size).split(size)
        for state, student in (("trained", load_model(path)), ("untrained", chosen.student(data))):
            pairs = [sizes(student, part, scale, seed) for seed, part in enumerate(images)]
            assert all(direct > 0 for direct, _ in pairs)
            ratios = [implicit / direct for direct, implicit in pairs]
            report.add(
                "Implicit term of SR",
                source=label,
                preset=chosen.preset,
                student=state,
                acc=f"{Run(path.parent).metrics['acc']:.1%}" if state == "trained" else "",
                mean_direct=f"{statistics.fmean(direct for direct, _ in pairs):.2g}",
                ratio_median=f"{statistics.median(ratios):.2g}",
                ratio_largest=f"{max(ratios):.2g}",
                batches=f"{batches} of {size}",
            )
