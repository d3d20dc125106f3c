"""What a finished run knows: its source's images, its vaccine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from abdlab.activations import stage, tsne
from abdlab.checkpoint import load_model, load_state
from abdlab.data import Dataset
from abdlab.defenses import ShuffledTeacher, ShufflingVaccine, suspicion
from abdlab.defenses.shuffled_teacher import tail_share
from abdlab.errors import CheckpointError
from abdlab.evaluate import predict
from abdlab.labels import Label
from abdlab.losses import kl
from abdlab.purifiers.bounded import KS, agreement_curve, batch_norms, bound, statistics
from abdlab.runs import Run, folder_of
from abdlab.settings import Settings
from abdlab.sources import Source
from abdlab.students import CONTROL
from abdlab.teachers import poisoned_teacher, saved_teacher


def vaccine_trials(
    root: str | Path, chosen: Settings, data: Dataset, labels: Sequence[str], tries: int = 20
) -> list[dict]:
    """How often verification accepts a shuffle, of the poisoned teacher and of the
    control's, on their students' own images.

    The images are those that the source of the first undefended method of ``labels``
    makes at its run's end, as many as the vaccine's settings pool; layers, k, sigma and
    threshold are theirs too.

    Args:
        tries: shuffles of each teacher, drawn from the seed; all are tried, whether one
            is accepted or not.

    Returns:
        one row per teacher: seed, teacher ("poisoned", "clean"), label, tries,
        accepted, share, largest (the largest suspicious share), and for the reader, off
        the test images, auc and auc_std (mean and deviation of :func:`shuffle_auc` over
        the shuffles) and picked (that of the first accepted one; None where there is
        none). Empty where no method of ``labels`` has a source that shows images.
    """
    rows, (sv,) = [], chosen.defenses(ShufflingVaccine.name)
    undefended = [label for label in labels if Label.parse(label).undefended]
    for kind, folder, settled in (
        ("poisoned", Path(root), chosen),
        ("clean", Path(root) / CONTROL, chosen.unpoisoned()),
    ):
        teacher = poisoned_teacher(folder, settled, data)
        for label in undefended:
            with suppress(CheckpointError):  # a source that shows no images
                run = Run(folder_of(folder, chosen.seed, label))
                images = synthesize(run, settled, data, teacher, sv.pool)
                break
        else:
            return []
        rng, names = torch.Generator().manual_seed(chosen.seed), sv.layer_names(teacher)
        shuffles = [ShuffledTeacher(teacher, names, sv.k, rng) for _ in range(tries)]
        shares = [
            tail_share(suspicion(shuffle, teacher, images, reverse=sv.reverse), sv.sigma)
            for shuffle in shuffles
        ]
        passed = [share > sv.threshold for share in shares]
        accepted, exam = sum(passed), settled.exam(data)
        tests = (exam.images, exam.triggered, sv.reverse)
        aucs = [shuffle_auc(shuffle, teacher, *tests) for shuffle in shuffles]
        picked = aucs[passed.index(True)] if accepted else None
        found = {"accepted": accepted, "share": accepted / tries, "largest": round(max(shares), 5)}
        spread = torch.tensor(aucs, dtype=torch.float64)
        found |= {"auc": spread.mean().item(), "auc_std": spread.std().item(), "picked": picked}
        rows.append({"seed": chosen.seed, "teacher": kind, "label": label, "tries": tries, **found})
    return rows


def shuffle_auc(
    shuffle: ShuffledTeacher, teacher: nn.Module, clean: Tensor, triggered: Tensor, reverse: bool
) -> float:
    """How well one shuffle tells triggered images from clean ones (N, C, H, W): the chance
    that a triggered one is more suspicious, in [0, 1]; .5 is a coin's.

    It needs the trigger: for readers, never for a defense.

    Args:
        reverse: see :func:`abdlab.suspicion`.
    """
    low, high = (suspicion(shuffle, teacher, x, reverse=reverse)[None] for x in (triggered, clean))
    return ((high > low.T).double() + 0.5 * (high == low.T).double()).mean().item()


def bound_curve(
    teacher: nn.Module,
    pool: Tensor,
    exam: Callable[[nn.Module], dict[str, float]],
    ks: Sequence[float] = KS,
) -> pd.DataFrame:
    """What a bound on the teacher's activations does, by its k: columns k, acc, asr
    (where the exam has one) and agreement, all shares in [0, 1].

    Args:
        pool: synthetic images (N, C, H, W), for the agreement with the teacher as it is.
        exam: see :meth:`abdlab.settings.Settings.exam`; it is for the reader alone.
        ks: in standard deviations.
    """
    agreement, recorded = agreement_curve(teacher, pool, ks), None
    if not batch_norms(teacher):
        recorded = statistics(teacher, pool)
    rows = [
        {"k": k, **exam(bound(copy.deepcopy(teacher), k, recorded)), "agreement": agreement[k]}
        for k in ks
    ]
    return pd.DataFrame(rows)


def synthesize(run: Run, chosen: Settings, data: Dataset, teacher: nn.Module, n: int) -> Tensor:
    """``n`` new images (N, C, H, W) of the generator that a run's last checkpoint
    holds, or images of its pool.

    Raises:
        CheckpointError: when the run has no checkpoint, or its source has no generator.
    """
    source = _finished_source(run, chosen, data, teacher)
    try:
        return source.synthesize(n)
    except NotImplementedError as error:
        raise CheckpointError(f"{run.path} has no generator: {error}") from None


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
    """The shuffled teacher that a run's defense used; for a run without one, the first
    shuffle that the settings draw.
    """
    state, _ = load_state(run.file("checkpoint.safetensors"))
    (sv,) = chosen.defenses(ShufflingVaccine.name)
    names = sv.layer_names(teacher)
    permutations = state["defenses"].get(sv.name, {}).get("permutations")
    return ShuffledTeacher(
        teacher, names, sv.k, torch.Generator().manual_seed(chosen.seed), permutations
    )


#: images that a map shows at most, and real ones among which the nearest is sought
MAPPED, REAL = 500, 5000


@dataclass
class Known:
    """All that is known of one run's kept images.

    Attributes:
        images: (N, C, H, W), in the order of training.
        table: one row per image: step, index in its batch, teacher's class, suspicion,
            disagreement (KL of teacher and student in nats; NaN without a student) and
            the teacher's confidence.
        logits: (N, classes) on the CPU of "teacher", "vaccine" and, where there is one,
            "student".
        reverse: whether suspicion is that of KL(T || T~).
    """

    run: Run
    label: str
    chosen: Settings
    data: Dataset | None
    teacher: nn.Module
    vaccine: ShuffledTeacher
    student: nn.Module | None
    images: Tensor
    table: pd.DataFrame
    logits: dict[str, Tensor]
    reverse: bool


def inspect_run(
    folder: str | Path, device: str = "auto", datasets: dict[str, Dataset | None] | None = None
) -> Known:
    """Load what a run knows and score its images. Nothing is trained or downloaded.

    Args:
        folder: ROOT/seedN/METHOD or METHOD@NUMBER, with samples and a checkpoint.
        device: where the networks run.
        datasets: data sets that were loaded before, by their settings; more are added.

    Raises:
        CheckpointError: for a file that is damaged.
        ValueError, OSError, KeyError: for a folder without a run's files.
    """
    run = Run(folder)
    chosen = Settings.of(run.config, device)
    data = _at_hand(chosen, {} if datasets is None else datasets)
    where = data.train_images.device if data is not None else "cpu"
    path = run.path.parent / "teacher" / "teacher.safetensors"
    known = data is not None and chosen.opened  # an architecture that its file does not name
    teacher = saved_teacher(path, chosen, data) if known else load_model(path, device=where)
    vaccine = vaccine_of(run, chosen, teacher)
    (sv,) = chosen.defenses(ShufflingVaccine.name)
    student, samples = student_of(run, chosen, data), run.samples()
    steps = sorted(samples)
    images = torch.cat([samples[step] for step in steps]).to(where)
    logits = {"teacher": predict(teacher, images).cpu()}
    with torch.no_grad():
        logits["vaccine"] = torch.cat([vaccine(part) for part in images.split(500)]).cpu()
    apart = torch.full((len(images),), float("nan"))
    if student is not None:
        logits["student"] = predict(student, images).cpu()
        apart = kl(logits["teacher"], logits["student"])
    sure, predicted = logits["teacher"].softmax(1).max(1)
    scores = suspicion(vaccine, teacher, images, reverse=sv.reverse)
    table = pd.DataFrame(
        {
            "step": [step for step in steps for _ in samples[step]],
            "index": [i for step in steps for i in range(len(samples[step]))],
            "class": predicted.tolist(),
            "suspicion": scores.cpu().tolist(),
            "disagreement": apart.tolist(),
            "confidence": sure.tolist(),
        }
    )
    label = str(Label.of_folder(run.path.name.partition("@")[0]))
    models = (teacher, vaccine, student)
    return Known(run, label, chosen, data, *models, images, table, logits, sv.reverse)


def student_of(run: Run, chosen: Settings, data: Dataset | None) -> nn.Module | None:
    """A run's student, from its end or else from its last checkpoint; None where
    neither is there, or the checkpoint's needs a data set that is not at hand.
    """
    where = data.train_images.device if data is not None else "cpu"
    if run.file("student.safetensors").exists():
        return load_model(run.file("student.safetensors"), device=where)
    if data is None or not run.file("checkpoint.safetensors").exists():
        return None
    student = chosen.student(data).to(where)
    student.load_state_dict(load_state(run.file("checkpoint.safetensors"), where)[0]["student"])
    return student.eval()


def map_points(known: Known) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE of the teacher's last stage, of at most :data:`MAPPED` images, evenly over
    training.

    Returns:
        the images' numbers (M,) and their places (M, 2).

    Raises:
        ValueError: for fewer than 8 images.
    """
    count = len(known.table)
    if count < 8:
        raise ValueError(f"a map needs at least 8 images, not {count}")
    numbers = np.unique(np.linspace(0, count - 1, min(count, MAPPED)).round().astype(int))
    layer = stage(known.teacher, -1)
    return numbers, tsne(known.teacher, layer, known.images[numbers], seed=known.chosen.seed)


def nearest(image: Tensor, data: Dataset) -> tuple[Tensor, int]:
    """The training image that is nearest to one image (C, H, W) in l2, of the first
    :data:`REAL`, and its label.
    """
    real = data.train_images[:REAL]
    found = int((real - image.clamp(0, 1)).flatten(1).norm(dim=1).argmin())
    return real[found], int(data.train_labels[found])


def _at_hand(chosen: Settings, datasets: dict[str, Dataset | None]) -> Dataset | None:
    """The data set where it is at hand; nothing is downloaded for looking."""
    key = json.dumps(chosen.values["data"], sort_keys=True)
    if key not in datasets:
        try:
            datasets[key] = chosen.dataset()
        except (ValueError, OSError, RuntimeError):
            datasets[key] = None
    return datasets[key]
