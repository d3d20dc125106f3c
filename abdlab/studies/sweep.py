"""Studies: one notebook over a grid of parameters, as jobs that survive failures.

::

    OUT/
      study.json                   what was asked for: title, axes, jobs in order
      jobs/NAME-KEY/               one folder per job, addressed by its parameters,
                                   its notebook and the code
        NOTEBOOK.ipynb             the executed notebook, also up to the cell that failed
        status.json                running, done or failed; seconds, ACC and ASR, the error
        log.txt                    what the kernel printed
        seedN/...                  the runs, see abdlab.runs
      teachers/NAME-KEY/           the same for teachers that several jobs share
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cache
from pathlib import Path
from typing import Protocol

import pandas as pd

from abdlab.batch import as_notebook, parameters_of
from abdlab.checkpoint import write_atomically
from abdlab.home import at_home, home
from abdlab.studies.job import _read_json, _write_status, status_of
from abdlab.studies.results import _frame, _live
from abdlab.studies.study import Job, Study, write_study

#: what jobs that share a teacher take over from it
_HANDED_ON = ("config.json", "history.jsonl", "metrics.json")


class Engine(Protocol):
    """Where jobs run: a picklable dict in, a future of a result dict out. It raises
    when a worker dies, and only then.
    """

    #: jobs at a time
    slots: int

    def submit(self, spec: dict) -> Future: ...

    def close(self, now: bool = False) -> None:
        """Let the workers end; ``now`` does not wait for their jobs."""


def sweep(
    study: Study,
    out: str | Path,
    engine: Engine,
    *,
    tell: Callable[[pd.DataFrame, Study], None] | None = None,
    shipped: bool = False,
) -> pd.DataFrame:
    """Run what is not done yet; teachers before the jobs that need them. Returns
    :func:`status` of all.

    Jobs that are done are skipped; one that was killed goes on from its own
    checkpoints; one whose kernel or worker dies is tried again ``study.retries`` times;
    one that failed is tried anew by the next call. An interrupt stops the workers and
    goes on upwards.

    Args:
        out: the study's folder.
        engine: see :mod:`abdlab.studies.engines`.
        tell: called with the status table when it has changed.
        shipped: workers do not see ``out``: files travel with the jobs and their
            results.

    Raises:
        ValueError: when the folder cannot be written to, or its disk is full.
    """
    out = at_home(out)
    write_study(study, out)
    rows = {job.key: status_of(out, job) for job in study.all_jobs}
    waiting = [job for job in study.all_jobs if rows[job.key]["state"] != "done"]
    rows.update({job.key: {**rows[job.key], "state": "waiting", "error": None} for job in waiting})
    running: dict[Future, Job] = {}
    attempts: dict[str, int] = {}

    def show() -> None:
        if tell:
            tell(_frame(study, rows), study)

    def start(job: Job) -> None:
        attempts[job.key] = attempts.get(job.key, 0) + 1
        spec = _spec(study, job, out, attempts[job.key])
        if shipped:
            spec["files"] = {k: Path(v).read_bytes() for k, v in spec.pop("copies").items()}
        running[engine.submit(spec)] = job
        rows[job.key] = {**rows[job.key], "state": "queued"}

    try:
        show()
        while waiting or running:
            for job in [*waiting]:
                states = [rows[key]["state"] for key in job.needs]
                if any(state == "failed" for state in states):
                    waiting.remove(job)
                    rows[job.key] = {
                        **rows[job.key],
                        "state": "failed",
                        "error": "the teacher that it needs failed",
                    }
                    _write_status(out / job.folder, rows[job.key])
                elif all(state == "done" for state in states):
                    waiting.remove(job)
                    start(job)
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    result = dict(future.result())
                except Exception as error:
                    # a worker or a kernel died: whatever the engine says, it may be tried again
                    reason = f"{type(error).__name__}: {str(error).strip() or 'its worker died'}"
                    if attempts[job.key] <= study.retries:
                        rows[job.key] = {
                            **rows[job.key],
                            "state": "waiting",
                            "error": f"tried again: {reason}",
                        }
                        waiting.append(job)
                        continue
                    told = f"given up after {attempts[job.key]} tries; the last one: {reason}"
                    result = {
                        **rows[job.key],
                        "state": "failed",
                        "error": told,
                        "attempts": attempts[job.key],
                    }
                    _write_status(out / job.folder, result)
                _unpack(out / job.folder, result.pop("files", {}))
                rows[job.key] = {**rows[job.key], **result}
            for job in running.values():
                rows[job.key] = {**rows[job.key], **_live(out / job.folder)}
            show()
    except BaseException:
        engine.close(now=True)
        raise
    engine.close()
    return _frame(study, rows)


def estimate(study: Study, out: str | Path, slots: int) -> tuple[int, float | None]:
    """(jobs still to run, seconds that they will take in ``slots`` at a time), from the
    jobs of the same notebook that the folder, or a sister folder, has done; None when
    there is none."""
    out = at_home(out)
    todo = [job for job in study.all_jobs if status_of(out, job)["state"] != "done"]
    past: dict[str, list[float]] = {}
    for path in sorted(out.parent.glob("*/*/*/status.json")) if out.parent.is_dir() else []:
        entry = _read_json(path)
        if entry.get("state") == "done":
            past.setdefault(entry.get("notebook", ""), []).append(entry["seconds"])
    if any(job.notebook not in past for job in todo):
        return len(todo), None
    return len(todo), sum(sum(past[job.notebook]) / len(past[job.notebook]) for job in todo) / max(
        1, slots
    )


def _spec(study: Study, job: Job, out: Path, attempt: int) -> dict:
    teachers = {teacher.key: teacher for teacher in study.teachers}
    copies = {}
    for key in job.needs:
        source = out / teachers[key].folder
        for path in sorted(source.glob("seed*/**/*")):
            if path.is_file() and (
                path.name in _HANDED_ON or path.suffix in (".safetensors", ".json")
            ):
                copies[str(path.relative_to(source))] = str(path.resolve())
    return {
        "folder": str((out / job.folder).resolve()),
        "key": job.key,
        "notebook": job.notebook,
        "text": study.notebooks[job.notebook],
        "parameters": job.parameters,
        "takes_run": _takes_run(job.notebook, study.notebooks[job.notebook]),
        "threads": study.threads,
        "timeout": study.timeout,
        "attempt": attempt,
        "cwd": os.getcwd(),
        "home": str(home()),
        "copies": copies,
    }


@cache
def _takes_run(name: str, text: str) -> bool:
    return "run" in parameters_of(as_notebook(name, text))


def _unpack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Files that a worker sent back; the status last, so that a job counts as done when
    all of it is here.
    """
    for name, data in sorted(files.items(), key=lambda item: item[0] == "status.json"):
        write_atomically(folder / name, data)
