"""What a finished run knows: its source's images, its vaccine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from abdlab.checkpoint import load_state
from abdlab.data import Dataset
from abdlab.defenses import ShuffledTeacher, suspicion
from abdlab.defenses.shuffled_teacher import tail_share
from abdlab.errors import CheckpointError
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.sources import Source
from abdlab.students import CONTROL
from abdlab.teachers import poisoned_teacher


def vaccine_trials(
    root: str | Path, chosen: Settings, data: Dataset, labels: Sequence[str], tries: int = 20
) -> list[dict]:
    """How often verification accepts a shuffle, of the poisoned teacher and of the
    control's, on their students' own images.

    The images are those that the source of the first undefended method of ``labels``
    makes at its run's end, as many as the settings of "sv" pool; layers, k, sigma and
    threshold are theirs too.

    Args:
        tries: shuffles of each teacher, drawn from the seed; all are tried, whether one
            is accepted or not.

    Returns:
        one row per teacher: seed, teacher ("poisoned", "clean"), label, tries,
        accepted, share, largest (the largest suspicious share). Empty where no method
        of ``labels`` has a source that shows images.
    """
    rows, (sv,), undefended = (
        [],
        chosen.defenses("sv"),
        [label for label in labels if "+" not in label],
    )
    for kind, folder, settled in (
        ("poisoned", Path(root), chosen),
        ("clean", Path(root) / CONTROL, chosen.unpoisoned()),
    ):
        teacher = poisoned_teacher(folder, settled, data)
        for label in undefended:
            with suppress(CheckpointError):  # a source that shows no images
                images = synthesize(
                    Run(folder / f"seed{chosen.seed}" / label), settled, data, teacher, sv.pool
                )
                break
        else:
            return []
        rng, names = torch.Generator().manual_seed(chosen.seed), sv.layer_names(teacher)
        shuffles = (ShuffledTeacher(teacher, names, sv.k, rng) for _ in range(tries))
        shares = [
            tail_share(suspicion(shuffle, teacher, images, reverse=sv.reverse), sv.sigma)
            for shuffle in shuffles
        ]
        accepted = sum(share > sv.threshold for share in shares)
        found = {"accepted": accepted, "share": accepted / tries, "largest": round(max(shares), 5)}
        rows.append({"seed": chosen.seed, "teacher": kind, "label": label, "tries": tries, **found})
    return rows


def synthesize(run: Run, chosen: Settings, data: Dataset, teacher: nn.Module, n: int) -> Tensor:
    """``n`` new images (N, C, H, W) of the generator that a run's last checkpoint
    holds, or images of its pool.

    Raises:
        CheckpointError: when the run has no checkpoint, or its source has no generator.
    """
    source = _finished_source(run, chosen, data, teacher)
    if not hasattr(source, "synthesize"):
        raise CheckpointError(
            f"{run.path} has no generator: its source {source.name} does not synthesise images"
        )
    return source.synthesize(n)


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
    """The shuffled teacher that a run's defence used; for a run without one, the first
    shuffle that the settings draw.
    """
    state, _ = load_state(run.file("checkpoint.safetensors"))
    (sv,) = chosen.defenses("sv")
    names = sv.layer_names(teacher)
    permutations = state["defenses"].get("sv", {}).get("permutations")
    return ShuffledTeacher(
        teacher, names, sv.k, torch.Generator().manual_seed(chosen.seed), permutations
    )
