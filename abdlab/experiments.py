"""Several experiments, each with a teacher of its own: what an attacker or a defense
changes is seen beside what it was before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path

import torch

from abdlab.data import pick_device
from abdlab.labels import Label
from abdlab.processes import spawned
from abdlab.runs import is_measured
from abdlab.settings import Settings
from abdlab.stream import stages
from abdlab.students import distill_all
from abdlab.teachers import prepare
from abdlab.threads import share, threads


def distill_each(
    experiments: Mapping[str | Path, Settings],
    labels: Sequence[str],
    *,
    with_teacher: bool = False,
    workers: int | None = None,
) -> dict[str, dict[str, dict]]:
    """Several experiments, teachers included, as :func:`abdlab.prepare` and
    :func:`abdlab.distill_all` make each; root -> label -> metrics.

    On a CPU with several cores they run side by side, in processes of their own with the
    threads of :func:`abdlab.threads.threads` each. What is there already is read, so the
    same call goes on after a stop.

    Args:
        experiments: root -> settings. No two may share a root.
        labels: methods, the same for each experiment.
        with_teacher: put each teacher's own metrics first, under "teacher".
        workers: experiments at once, at most; by default as many as share the threads that
            torch may use here on a CPU, else 1.

    Raises:
        ValueError: for a label that is none, before anything is trained.

    >>> distill_each({}, ["zskt"])
    {}
    """
    for label in labels:
        Label.parse(label)
    places = {str(root): chosen for root, chosen in experiments.items()}
    on_cpu = all(pick_device(chosen.device).type == "cpu" for chosen in places.values())
    left = {
        root: chosen
        for root, chosen in places.items()
        if not all(is_measured(root, chosen.seed, label) for label in labels)
    }
    workers = min(len(left), workers or (share() if on_cpu else 1))
    if workers > 1:
        _in_processes(left, labels, workers)
    return {
        root: _experiment(root, chosen, labels, with_teacher=with_teacher)
        for root, chosen in places.items()
    }


def _experiment(root: str, chosen: Settings, labels: Sequence[str], **options) -> dict[str, dict]:
    """One of them: the attack is made ready, then teacher and methods are made or read."""
    data = chosen.dataset()
    return distill_all(root, prepare(root, chosen, data), data, labels, **options)


def _in_processes(places: Mapping[str, Settings], labels: Sequence[str], workers: int) -> None:
    """Let spawned processes fill the folders, an experiment each at a time."""
    tell = stages("experiments")
    with spawned(workers) as pool:
        jobs = {
            pool.submit(_fill, root, chosen, list(labels)): root for root, chosen in places.items()
        }
        tell(f"{workers} at once", 0, len(jobs))
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            tell(f"{jobs[job]} is there", done, len(jobs))


def _fill(root: str, chosen: Settings, labels: list[str]) -> None:
    """One process's share: an experiment, its methods one after the other."""
    torch.set_num_threads(threads())
    _experiment(root, chosen, labels, workers=1)
