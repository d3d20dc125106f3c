"""One job of a study: a notebook run in its own folder, in whatever process."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from filelock import FileLock

from abdlab.batch import as_notebook, run_kernel
from abdlab.checkpoint import write_atomically
from abdlab.labels import Label
from abdlab.runs import table as runs_table
from abdlab.studies.study import Job


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
    # where notebooks are run, and not where their kernels import this: it takes 2 s
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    for name, source in spec.get("copies", {}).items():
        write_atomically(folder / name, Path(source).read_bytes())
    for name, data in spec.get("files", {}).items():
        write_atomically(folder / name, data)
    given = {**spec["parameters"], **({"run": str(folder)} if spec["takes_run"] else {})}
    notebook = as_notebook(spec["notebook"], spec["text"])
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
                spec.get("home"),
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
    """ACC and ASR of the job's most defended student, the last one with most defenses
    and purifiers; of its teacher when it has no student.
    """
    found = runs_table(folder)
    if found.empty or not {"label", "acc"} <= set(found.columns):
        return {}
    ran = found["acc"].notna() | found.get("seconds", found["acc"]).notna()
    found = found[found["label"].notna() & ran]  # an unknown ACC is None
    if found.empty:
        return {}
    rank = found["label"].map(_rank)
    row = found.loc[rank.sort_values(kind="stable").index[-1]]
    asr = row.get("asr")
    return {
        "label": row["label"],
        "acc": None if pd.isna(row["acc"]) else float(row["acc"]),
        "asr": None if pd.isna(asr) else float(asr),
    }


def _rank(label: str) -> int:
    """How much a model defends: a teacher less than any student, and the clean one,
    against which an attack was optimised, less than that.
    """
    below = {"teacher": -1, "clean_teacher": -2}
    return below[label] if label in below else len(label_of(label).parts) - 1


def label_of(text: str) -> Label:
    """A metrics.json's label; one that a notebook made up is a source of its own."""
    try:
        return Label.parse(text)
    except ValueError:
        return Label(str(text))


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
