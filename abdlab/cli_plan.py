"""What dry runs tell: of a notebook its students, of a study its jobs, with the time that
they take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abdlab import batch
from abdlab.forecast import Forecast, forecast, forecast_teacher, in_all, told_time
from abdlab.labels import TEACHER
from abdlab.settings import Settings
from abdlab.studies.gpu import gpu_hours
from abdlab.studies.job import status_of
from abdlab.studies.study import Study
from abdlab.studies.sweep import estimate

#: seconds for which a study's dry run times kinds of jobs
PATIENCE = 60


def run(say: Callable[[str], None], known: Mapping[str, dict], given: Mapping, root: Path) -> None:
    """Say what the teacher and each student of a notebook take that are not done in the
    folder yet; nothing for a notebook that trains none.
    """
    if not {"preset", "overrides"} <= known.keys():
        return
    chosen, labels = batch.asked(known, given)
    try:
        found = _timed(chosen, labels, root)
    except (ValueError, OSError) as error:
        say(f"no estimate: {error}")
        return
    for line in (*found, in_all(found)):
        if line:
            say(str(line))


def _timed(chosen: Settings, labels: list[str], root: Path | None = None) -> list[Forecast]:
    """The teacher, where it is trained and not done, and the students."""
    data = chosen.dataset()
    done = root is not None and (root / f"seed{chosen.seed}" / TEACHER / "metrics.json").exists()
    teacher = [] if chosen.opened or done else [forecast_teacher(chosen, data)]
    return [*teacher, *forecast(root, chosen, data, labels)]


def study(console: Console, planned: Study, out: Path, slots: int) -> None:
    """Print a study's jobs, and about how long those that are left take: by the jobs that
    are done, or else by timing one of each kind.
    """
    grid = Table(title=escape(planned.title), title_justify="left", box=None)
    for heading in ("job", "notebook", "state"):
        grid.add_column(heading, overflow="fold")
    states = {job.key: status_of(out, job)["state"] for job in planned.all_jobs}
    for job in planned.all_jobs:
        grid.add_row(escape(job.name), job.notebook, states[job.key])
    console.print(grid)
    left, seconds = estimate(planned, out, slots)
    console.print(
        f"{len(planned.jobs)} jobs and {len(planned.teachers)} shared teachers, {left} to run,"
        f" {slots} at a time",
        highlight=False,
    )
    if seconds is not None:
        told = f"about {told_time(max(60, seconds))}, by the jobs that are done"
    else:
        told = _by_kind(planned, [j for j in planned.all_jobs if states[j.key] != "done"], slots)
    console.print(told, highlight=False)
    if hours := gpu_hours(planned, [j for j in planned.jobs if states[j.key] != "done"]):
        console.print(hours, highlight=False, soft_wrap=True)
    console.print(f"folder: {out}", highlight=False, soft_wrap=True)


def _by_kind(planned: Study, jobs: list, slots: int) -> str:
    """A sentence on the time of these jobs; those of one kind differ in seed and trigger
    alone, and one of them is timed.
    """
    kinds: dict[str, list[tuple[Settings, list[str], int, bool]]] = {}
    for job in jobs:
        known = batch.parameters_of(
            batch.as_notebook(job.notebook, planned.notebooks[job.notebook])
        )
        if not {"preset", "overrides"} <= known.keys():
            return "no estimate: no job of these notebooks is done yet"
        chosen, labels = batch.asked(known, job.parameters)
        seeds = len(job.parameters.get("seeds", [None]))
        kind = kind_of(chosen, labels, bool(job.needs))
        kinds.setdefault(kind, []).append((chosen, labels, seeds, bool(job.needs)))
    began, total, timed = time.monotonic(), 0.0, 0
    for members in kinds.values():
        chosen, labels, _, given = members[0]
        if time.monotonic() - began > PATIENCE:
            break
        try:
            found = _timed(chosen, labels)
        except (ValueError, OSError) as error:
            return f"no estimate: {error}"
        each = sum(f.seconds or 0.0 for f in found if not (given and f.label == TEACHER))
        total += each * sum(seeds for _, _, seeds, _ in members)
        timed += len(members)
    rest = f"; the other {len(jobs) - timed} were not timed" if timed < len(jobs) else ""
    return (
        f"about {told_time(max(60, total / slots))} on this machine, by a few timed steps of each"
        f" kind of job ({timed} jobs, {len(kinds)} kinds){rest}"
    )


def kind_of(chosen: Settings, labels: list[str], has_teacher: bool) -> str:
    """What jobs have in common that take equally long: all but seed and attack."""
    rest: dict[str, Any] = {k: v for k, v in chosen.values.items() if k != "attack"}
    return json.dumps([rest, labels, has_teacher], sort_keys=True, default=str)
