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

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TextIO

import nbformat
import pandas as pd
import yaml
from filelock import FileLock
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from abdlab.batch import check_parameters, execute, find_notebook, parameters, run_kernel
from abdlab.checkpoint import write_atomically
from abdlab.errors import check_keys
from abdlab.presets import settings
from abdlab.runs import table as runs_table

#: what a study's YAML file may say
KEYS = (
    "title",
    "notebook",
    "parameters",
    "grid",
    "zip",
    "list",
    "seeds",
    "exclude",
    "timeout",
    "retries",
    "threads",
)
#: sections of the settings on which a poisoned teacher depends
TEACHER_SECTIONS = ("data", "attack", "teacher")
#: what jobs that share a teacher take over from it
_HANDED_ON = ("config.json", "history.jsonl", "metrics.json")


@dataclass(frozen=True)
class Job:
    """One run of one notebook.

    Attributes:
        folder: relative to the study's own, ends in ``key``.
        key: hash of the notebook's code, the parameters and abdlab's own code.
        parameters: of the notebook, checked, without ``run``.
        axes: what sets it apart in its study: axis name -> value.
        needs: keys of the teachers that it takes over.
    """

    folder: str
    key: str
    notebook: str
    parameters: dict[str, Any]
    axes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, for a person."""
        return Path(self.folder).name


@dataclass(frozen=True)
class Study:
    """Jobs, and the teachers that they share; ``notebooks`` holds the text of every
    notebook by name.

    Attributes:
        timeout: seconds per job, None is no limit. retries: of a job whose kernel or
            worker died.
        threads: of a job's arithmetic, so that numbers do not depend on how many jobs
            run side by side.
    """

    title: str
    jobs: tuple[Job, ...]
    teachers: tuple[Job, ...]
    notebooks: dict[str, str]
    axes: dict[str, list]
    timeout: float | None = None
    retries: int = 2
    threads: int = 1

    @property
    def all_jobs(self) -> tuple[Job, ...]:
        """Teachers first."""
        return (*self.teachers, *self.jobs)


class Engine(Protocol):
    """Where jobs run: a picklable dict in, a future of a result dict out. It raises
    when a worker dies, and only then.
    """

    #: jobs at a time
    slots: int

    def submit(self, spec: dict) -> Future: ...

    def close(self, now: bool = False) -> None:
        """Let the workers end; ``now`` does not wait for their jobs."""


class _Loader(yaml.SafeLoader):
    """YAML's plain values; also 1e-3, as everybody writes it, is a number, which YAML
    1.1 takes for a text.
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_study(path: str | Path) -> Study:
    """A study from a YAML file.

    Its keys: ``notebook`` (a name or a path), ``parameters`` of all jobs, and axes:
    ``grid`` (every combination of the values of several names), ``zip`` (values of
    several names in step), ``list`` (whole sets of parameters), ``seeds``; ``exclude``
    (sets of values: a job that has all of one set is left out; a list stands for any of
    its values); ``title``, ``timeout`` (seconds per job), ``retries``, ``threads``. A
    name with a dot is a setting and goes to the notebook's ``overrides``; any other is
    one of the notebook's parameters.

    Raises:
        ValueError: for a name, type, preset or axis that is wrong, before anything is
            started.
        FileNotFoundError: when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no study {path}: a study is a YAML file, see notebooks/studies"
        )
    try:
        given = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} must hold keys and values ({', '.join(KEYS)}), not {type(given).__name__}"
        )
    check_keys(f"key of {path.name}", given, KEYS)
    if "notebook" not in given:
        raise ValueError(
            f"{path.name} does not say which notebook to run: add, for example, notebook:"
            " 02_distillation"
        )
    beside = path.parent / str(given["notebook"])
    notebook = find_notebook(beside if beside.is_file() else given["notebook"])
    return make_study(
        notebook, **{k: v for k, v in given.items() if k != "notebook"}, default_title=path.stem
    )


def make_study(
    notebook: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence] | None = None,
    zip: Mapping[str, Sequence] | None = None,
    list: Sequence[Mapping] | None = None,
    seeds: Sequence[int] | None = None,
    exclude: Sequence[Mapping] | None = None,
    title: str | None = None,
    timeout: float | None = None,
    retries: int = 2,
    threads: int = 1,
    default_title: str = "study",
) -> Study:
    """The same from Python, see :func:`read_study`."""
    path = find_notebook(notebook)
    known, text = _parameters_of(path), path.read_text()
    if timeout is not None and not (_is_number(timeout) and timeout > 0):
        raise ValueError(f"timeout is seconds above 0 per job, not {timeout!r}")
    for name, value, least in (("retries", retries, 0), ("threads", threads, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")
    base = _mapping("parameters", parameters)
    choices, axes = [], {}
    for name, values in _mapping("grid", grid).items():
        choices.append([{name: value} for value in _axis(f"grid.{name}", values)])
    in_step = {name: _axis(f"zip.{name}", values) for name, values in _mapping("zip", zip).items()}
    if in_step:
        lengths = {name: len(values) for name, values in in_step.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{n} has {k}" for n, k in lengths.items())
            raise ValueError(f"the axes of zip go in step and need as many values each: {told}")
        choices.append([dict(_pairs(in_step, i)) for i in range(len(next(iter(in_step.values()))))])
    if list is not None:
        choices.append([_mapping("an entry of list", entry) for entry in _axis("list", list)])
    if seeds is not None:
        if not {"seed", "seeds"} & known.keys():
            raise ValueError(f"{path.stem} has no parameter seed or seeds: leave seeds out")
        one = "seed" in known
        choices.append([{"seed": s} if one else {"seeds": [s]} for s in _axis("seeds", seeds)])
    jobs, teachers, out = {}, {}, [_mapping("an entry of exclude", e) for e in exclude or []]
    named = {name for group in choices for entry in group for name in entry}
    for entry in out:
        check_keys("name in exclude", entry, {*named, *base})
    for parts in itertools.product(*choices):
        names = [name for part in parts for name in part]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} is set by two axes: keep it in one")
        chosen = {name: value for part in parts for name, value in part.items()}
        if any(
            all(_matches({**base, **chosen}.get(k), v) for k, v in entry.items()) for entry in out
        ):
            continue
        checked = _checked(path, {**base, **chosen}, known)
        needs = []
        for teacher in _teachers(path, checked, known):
            teachers.setdefault(teacher.key, teacher)
            needs.append(teacher.key)
        key = _key(text, checked)
        jobs.setdefault(
            key, Job(f"jobs/{_slug(chosen)}-{key}", key, path.stem, checked, chosen, tuple(needs))
        )
        for name, value in chosen.items():
            if value not in axes.setdefault(name, []):
                axes[name].append(value)
    if not jobs:
        raise ValueError("the study has no jobs: every combination is excluded")
    texts = {path.stem: text}
    if teachers:
        texts["01_poisoning"] = find_notebook("01_poisoning").read_text()
    return Study(
        title or default_title,
        tuple(jobs.values()),
        tuple(teachers.values()),
        texts,
        axes,
        timeout,
        retries,
        threads,
    )


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
        engine: see :mod:`abdlab.engines`.
        tell: called with the status table when it has changed.
        shipped: workers do not see ``out``: files travel with the jobs and their
            results.

    Raises:
        ValueError: when the folder cannot be written to, or its disk is full.
    """
    out = Path(out)
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


def write_study(study: Study, out: str | Path) -> None:
    """Make the folder and its study.json. Raises ValueError when that cannot be done,
    or less than 50 MB are free.
    """
    out = Path(out)
    content = {
        "title": study.title,
        "axes": study.axes,
        "teachers": [vars(job) for job in study.teachers],
        "jobs": [vars(job) for job in study.jobs],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < 50e6:
            raise ValueError(
                f"only {free / 1e6:.0f} MB are free on the disk of {out}: make room, or choose"
                " another folder"
            )
        write_atomically(out / "study.json", (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror or error}; choose another folder"
        ) from error


def status(out: str | Path) -> pd.DataFrame:
    """The state of a study's jobs as its folder has it, one row each: name, kind,
    state, seconds, acc, asr, attempts, error, and a column per axis.

    Raises:
        ValueError: when the folder holds no study.
    """
    study = open_study(out)
    return _frame(
        study,
        {
            job.key: {**status_of(Path(out), job), **_live(Path(out) / job.folder)}
            for job in study.all_jobs
        },
    )


def open_study(out: str | Path) -> Study:
    """The study that a folder holds, without its notebooks' texts. Raises ValueError
    when it holds none.
    """
    path = Path(out) / "study.json"
    if not path.is_file():
        raise ValueError(
            f"{out} holds no study (no study.json): run abdlab sweep STUDY.yaml --out {out} first"
        )
    content = json.loads(path.read_text())
    jobs, teachers = (
        tuple(Job(**{**job, "needs": tuple(job["needs"])}) for job in content[part])
        for part in ("jobs", "teachers")
    )
    return Study(content["title"], jobs, teachers, {}, content["axes"])


def results(out: str | Path) -> pd.DataFrame:
    """Every model of every finished job, one row each: the job's axes, then label,
    source, defence, seed, acc, asr (shares).

    ``source`` is the first part of the label (zskt), ``defence`` the rest ("none" when
    there is none). ``model`` is equal for models that several jobs trained alike
    (undefended students, above all), so that a mean can count each one once.
    """
    study, frames = open_study(out), []
    triggers = {teacher.key: teacher.axes["attack.trigger"] for teacher in study.teachers}
    for job in study.jobs:
        if status_of(Path(out), job)["state"] != "done":
            continue
        found = runs_table(Path(out) / job.folder)
        if found.empty or not {"label", "acc"} <= set(found.columns):
            continue
        found = found[found["label"].notna() & found["acc"].notna()].copy()
        parts = [label.partition("+") for label in found["label"]]
        found["source"], found["defence"] = [p[0] for p in parts], [p[2] or "none" for p in parts]
        found["trigger"] = triggers.get(job.needs[0]) if job.needs else None
        for name, value in job.axes.items():
            if name not in ("seed", "seeds"):
                found[name] = (
                    value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
                )
        found["job"] = job.name
        found["model"] = [_model_id(Path(out) / job.folder / run) for run in found["run"]]
        frames.append(found)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def report(out: str | Path, html: str | Path | None = None) -> Path:
    """Execute 06_sweep_report on a study's folder; returns the executed notebook,
    OUT/report/06_sweep_report.ipynb.

    Figures, summary.csv, summary.tex and metrics.json lie beside it.

    Args:
        html: also write the report as one HTML file that needs nothing else: code
            hidden, figures inside.

    Raises:
        ValueError: when the folder holds no study, or none of its jobs is done yet.
    """
    if results(out).empty:
        raise ValueError(f"no job of the study in {out} is done yet: there is nothing to report")
    done = execute(
        "06_sweep_report", Path(out) / "report" / "06_sweep_report.ipynb", {"study": str(out)}
    )
    if html:
        from nbconvert import HTMLExporter

        exporter = HTMLExporter(
            exclude_input=True, embed_images=True, mathjax_url="", require_js_url="", theme="light"
        )
        body, _ = exporter.from_filename(str(done))
        try:
            write_atomically(html, body.encode())
        except OSError as error:
            raise ValueError(f"cannot write {html}: {error.strerror or error}") from error
    return done


def estimate(study: Study, out: str | Path, slots: int) -> tuple[int, float | None]:
    """(jobs still to run, seconds that they will take in ``slots`` at a time), from the
    jobs of the same notebook that the folder, or a sister folder, has done; None when
    there is none."""
    out = Path(out)
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


def run_job(spec: Mapping[str, Any]) -> dict:
    """One job, in the worker: execute the notebook in its folder. The result is what
    status.json holds.

    A notebook that fails, or takes too long, is a result with state "failed".

    Args:
        spec: plain values, from :func:`sweep`: folder, key, notebook and its text,
            parameters, takes_run, threads, timeout, attempt, cwd, and the files to take
            over ("copies": relative name -> path, or "files": relative name -> bytes).

    Raises:
        RuntimeError: when the kernel died, which the caller may try again.
    """
    folder = Path(spec["folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # held while the job runs, and let go by the system when its process dies
        with FileLock(folder / ".lock"):
            before = _read_json(folder / "status.json")
            if before.get("state") == "done":
                return before
            began = time.time()
            entry = {
                "key": spec["key"],
                "notebook": spec["notebook"],
                "state": "running",
                "started": began,
            }
            entry |= {
                "attempts": spec["attempt"],
                "error": None,
                "host": os.uname().nodename,
                "pid": os.getpid(),
            }
            _write_status(folder, entry)
            entry |= _execute(spec, folder)
            entry["seconds"] = round(time.time() - began, 2)
            _write_status(folder, entry)
            return entry
    except OSError as error:
        if error.errno == errno.ENOSPC:
            told = f"the disk of {folder} is full: make room and run the study again"
        else:
            told = f"cannot write to {folder}: {error.strerror or error}"
        return {"key": spec["key"], "state": "failed", "error": told, "attempts": spec["attempt"]}


def _execute(spec: Mapping[str, Any], folder: Path) -> dict:
    for name, source in spec.get("copies", {}).items():
        write_atomically(folder / name, Path(source).read_bytes())
    for name, data in spec.get("files", {}).items():
        write_atomically(folder / name, data)
    given = {**spec["parameters"], **({"run": str(folder)} if spec["takes_run"] else {})}
    notebook = nbformat.reads(spec["text"], as_version=4)
    output = folder / f"{spec['notebook']}.ipynb"
    try:
        with (
            (folder / "log.txt").open("a", buffering=1) as log,
            _errors_to(log),
            _deadline(spec["timeout"]),
        ):
            run_kernel(
                notebook,
                output,
                given,
                log,
                spec["threads"],
                spec["cwd"] if Path(spec["cwd"]).is_dir() else folder,
            )
    except PapermillExecutionError as error:
        write_atomically(folder / "traceback.txt", str(error).encode())
        return {
            "state": "failed",
            "error": f"cell {error.exec_count}: {error.ename}: {error.evalue}",
        }
    except TimeoutError as error:
        return {"state": "failed", "error": str(error)}
    except DeadKernelError as error:
        raise RuntimeError(f"the kernel died ({error})") from None
    except OSError:
        raise
    except Exception as error:
        write_atomically(folder / "traceback.txt", traceback.format_exc().encode())
        return {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    (folder / "traceback.txt").unlink(missing_ok=True)
    return {"state": "done", **_scores(folder)}


@contextmanager
def _errors_to(log: TextIO) -> Iterator[None]:
    """The process's standard error, which a kernel inherits, goes to the job's log and
    not into the sweep's table.
    """
    kept = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """TimeoutError inside the block after so many seconds; no limit where the system
    has no alarm, or off the main thread.
    """
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(number, frame):
        raise TimeoutError(f"longer than the study's timeout of {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _scores(folder: Path) -> dict:
    """ACC and ASR of the job's most defended student, the last one with most defences;
    of its teacher when it has no student.
    """
    found = runs_table(folder)
    if found.empty or not {"label", "acc"} <= set(found.columns):
        return {}
    found = found[found["label"].notna() & found["acc"].notna()]
    if found.empty:
        return {}
    rank = found["label"].map(
        {"teacher": -1, "clean_teacher": -2}
    )  # the latter is what an attack was optimised against
    defences = rank.fillna(found["label"].str.count(r"\+"))
    row = found.loc[defences.sort_values(kind="stable").index[-1]]
    asr = row.get("asr")
    return {
        "label": row["label"],
        "acc": float(row["acc"]),
        "asr": None if pd.isna(asr) else float(asr),
    }


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
        "takes_run": "run" in _parameters_of_text(study.notebooks[job.notebook]),
        "threads": study.threads,
        "timeout": study.timeout,
        "attempt": attempt,
        "cwd": os.getcwd(),
        "copies": copies,
    }


def _teachers(path: Path, given: Mapping[str, Any], known: Mapping[str, dict]) -> list[Job]:
    """The poisoned teachers that a job of this notebook will look for, as runs of
    01_poisoning.
    """
    own = _parameters_of(find_notebook("01_poisoning"))
    common = {"run", "preset", "seed", "device", "overrides"}
    if (
        path.stem == "01_poisoning"
        or not {"run", "preset", "overrides"} <= known.keys()
        or given.keys() & (own.keys() - common)
    ):
        return []
    full = {name: given.get(name, known[name]["default"]) for name in known}
    overrides = {k: v for k, v in full["overrides"].items() if k.split(".")[0] in TEACHER_SECTIONS}
    out = []
    for seed in full.get("seeds", [full.get("seed", 0)]):
        values = {
            "preset": full["preset"],
            "seed": seed,
            "device": full.get("device", "auto"),
            "overrides": overrides,
        }
        key = _key(find_notebook("01_poisoning").read_text(), values)
        axes = {
            "attack.trigger": overrides.get(
                "attack.trigger", settings(full["preset"]).values["attack"]["trigger"]
            ),
            "seed": seed,
        }
        out.append(Job(f"teachers/{_slug(axes)}-{key}", key, "01_poisoning", values, axes))
    return out


def _checked(path: Path, given: Mapping[str, Any], known: Mapping[str, dict]) -> dict[str, Any]:
    """The notebook's parameters, with dotted names moved into ``overrides`` and
    everything checked.
    """
    if "run" in given:
        raise ValueError(
            "run is set by the sweep, which gives every job a folder of its own: leave it out, and"
            " use --out"
        )
    dotted = {name: value for name, value in given.items() if "." in name}
    plain = {name: value for name, value in given.items() if "." not in name}
    if dotted and "overrides" not in known:
        raise ValueError(
            f"{next(iter(dotted))} is a setting, but {path.stem} has no parameter overrides to"
            " take it"
        )
    checked = check_parameters(path, plain, known)
    if "overrides" in known and (dotted or "overrides" in checked):
        checked["overrides"] = {
            **known["overrides"]["default"],
            **checked.get("overrides", {}),
            **dotted,
        }
    if {"preset", "overrides"} <= known.keys():
        settings(checked.get("preset", known["preset"]["default"]), checked.get("overrides", {}))
    return checked


def _key(notebook: str, values: Mapping[str, Any]) -> str:
    cells = ["".join(cell["source"]) for cell in json.loads(notebook)["cells"]]
    return hashlib.sha256(
        json.dumps([cells, values, code_version()], sort_keys=True).encode()
    ).hexdigest()[:10]


@cache
def code_version() -> str:
    """A hash of abdlab's own source files: jobs of other code are other jobs."""
    here, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        total.update(str(path.relative_to(here)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


@cache
def _parameters_of(path: Path) -> dict[str, dict]:
    return parameters(path)


@cache
def _parameters_of_text(text: str) -> set[str]:
    cells = [
        c
        for c in json.loads(text)["cells"]
        if "parameters" in c.get("metadata", {}).get("tags", [])
    ]
    return set(
        re.findall(r"^(\w+)\s*[:=]", "".join("".join(c["source"]) for c in cells), re.MULTILINE)
    )


def _slug(values: Mapping[str, Any]) -> str:
    """File-name text for a job's axes, at most 80 characters."""
    words = []
    for name, value in values.items():
        short = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words.append(f"{name.rsplit('.', 1)[-1]}={short or 'none'}")
    return re.sub(r"[^\w=+.,-]+", "_", ",".join(words))[:80].strip("_.,") or "job"


def _axis(name: str, values: Any) -> list:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"the axis {name} is a list of values, not {values!r}")
    if not values:
        raise ValueError(f"the axis {name} is empty: give at least one value, or leave it out")
    return [*values]


def _mapping(what: str, value: Any) -> dict:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} holds names and values, not {value!r}")
    return {str(k): v for k, v in value.items()}


def _pairs(in_step: Mapping[str, Sequence], i: int) -> Iterator[tuple[str, Any]]:
    return ((name, values[i]) for name, values in in_step.items())


def _matches(value: Any, wanted: Any) -> bool:
    return value == wanted or (
        isinstance(wanted, (list, tuple))
        and not isinstance(value, (list, tuple))
        and value in wanted
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _model_id(folder: Path) -> str:
    """A hash of what the model depends on, from its run's config.json; the folder
    itself when there is none.
    """
    config = {k: v for k, v in _read_json(folder / "config.json").items() if k != "preset"}
    text = json.dumps([folder.name, config], sort_keys=True) if config else str(folder)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_status(folder: Path, entry: Mapping[str, Any]) -> None:
    write_atomically(folder / "status.json", (json.dumps(entry, default=str) + "\n").encode())


def status_of(out: Path, job: Job) -> dict:
    """What a job's status.json says; its state is "waiting" when there is none."""
    return {"state": "waiting", **_read_json(out / job.folder / "status.json")}


def _live(folder: Path) -> dict:
    """What a running job has reached: the last ACC and ASR of its histories. One whose
    process is gone is "stopped".
    """
    entry = _read_json(folder / "status.json")
    if entry.get("state") != "running":
        return {}
    if entry["host"] == os.uname().nodename and not _alive(entry["pid"]):
        return {**entry, "state": "stopped"}
    histories = sorted(folder.glob("seed*/*/history.jsonl"), key=lambda p: p.stat().st_mtime)
    for line in reversed(histories[-1].read_text().splitlines() if histories else []):
        row = json.loads(line)
        if "acc" in row:
            entry |= {"label": row["label"], "acc": row["acc"], "asr": row.get("asr")}
            break
    return {**entry, "seconds": round(time.time() - entry["started"], 1)}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unpack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Files that a worker sent back; the status last, so that a job counts as done when
    all of it is here.
    """
    for name, data in sorted(files.items(), key=lambda item: item[0] == "status.json"):
        write_atomically(folder / name, data)


def render(frame: pd.DataFrame, title: str, lines: int = 12) -> Table:
    """A study's state as a rich table, for a terminal or a notebook: counts and time
    left above, the jobs at work and the failed ones below (at most ``lines`` of them),
    with their last ACC and ASR."""
    counts = frame["state"].value_counts()
    told = [
        f"{counts.get(state, 0)} {state}"
        for state in ("done", "running", "queued", "waiting", "failed", "stopped")
    ]
    told = [text for text in told if not text.startswith("0 ") or text.endswith(" done")]
    grid = Table(
        title=f"{title}: {', '.join(told)} of {len(frame)}{_time_left(frame)}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading, justify in (
        ("job", "left"),
        ("state", "left"),
        ("seconds", "right"),
        ("ACC %", "right"),
        ("ASR %", "right"),
        ("", "left"),
    ):
        grid.add_column(heading, justify=justify, overflow="fold")
    order = {"running": 0, "failed": 1, "stopped": 1, "done": 2}
    shown = frame[frame["state"].isin(order)].sort_values(
        "state", key=lambda s: s.map(order), kind="stable"
    )
    # of the done ones, the latest
    shown = pd.concat(
        [shown[shown["state"] != "done"], shown[shown["state"] == "done"].iloc[::-1]]
    ).head(lines)
    for row in shown.to_dict("records"):
        numbers = [
            "" if pd.isna(row[c]) else f"{scale * row[c]:.1f}"
            for c, scale in (("seconds", 1), ("acc", 100), ("asr", 100))
        ]
        grid.add_row(
            escape(row["name"]), row["state"], *numbers, escape(row["error"] or row["label"] or "")
        )
    return grid


def watch(out: str | Path, every: float = 2.0) -> None:
    """Show a study's table in a notebook, or on a terminal, until no job is running or
    waiting; an interrupt ends it early.

    The study itself runs elsewhere: ``abdlab sweep`` in a terminal, or another kernel.
    """
    title = open_study(out).title
    with Live(render(status(out), title), refresh_per_second=1) as live:
        while (frame := status(out))["state"].isin(["running", "waiting"]).any():
            live.update(render(frame, title))
            time.sleep(every)
        live.update(render(frame, title))


def _time_left(frame: pd.DataFrame) -> str:
    """Text: the mean time of the done jobs, times those that are left, shared among
    those that run side by side.
    """
    done, running = frame[frame["state"] == "done"], (frame["state"] == "running").sum()
    left = frame["state"].isin(["running", "queued", "waiting"]).sum()
    if not left or done.empty or not running:
        return ""
    seconds = (
        max(
            0.0,
            done["seconds"].mean() * left - frame.loc[frame["state"] == "running", "seconds"].sum(),
        )
        / running
    )
    return (
        f", about {max(1, round(seconds / 60))} min left"
        if seconds >= 60
        else f", about {seconds:.0f} s left"
    )


def _frame(study: Study, rows: Mapping[str, dict]) -> pd.DataFrame:
    teachers = {job.key for job in study.teachers}
    columns = ("state", "seconds", "label", "acc", "asr", "attempts", "error")
    frame = pd.DataFrame(
        [
            {
                "name": job.name,
                "kind": "teacher" if job.key in teachers else "job",
                **{c: rows[job.key].get(c) for c in columns},
                **{
                    name: value if not isinstance(value, (list, dict)) else json.dumps(value)
                    for name, value in job.axes.items()
                },
            }
            for job in study.all_jobs
        ]
    )
    for column in ("label", "error"):  # pandas would turn a missing text into a number, NaN
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame
