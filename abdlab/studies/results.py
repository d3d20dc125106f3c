"""What a study has reached: its state, its results and their report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from abdlab.batch import execute
from abdlab.checkpoint import write_atomically
from abdlab.home import at_home
from abdlab.processes import alive
from abdlab.runs import table as runs_table
from abdlab.studies.job import _read_json, label_of, status_of
from abdlab.studies.study import Study, open_study


def status(out: str | Path) -> pd.DataFrame:
    """The state of a study's jobs as its folder has it, one row each: name, kind,
    state, seconds, acc, asr, attempts, error, and a column per axis.

    Raises:
        ValueError: when the folder holds no study.
    """
    out, study = at_home(out), open_study(out)
    return _frame(
        study,
        {
            job.key: {**status_of(Path(out), job), **_live(Path(out) / job.folder)}
            for job in study.all_jobs
        },
    )


def results(out: str | Path) -> pd.DataFrame:
    """Every model of every finished job, one row each: the job's axes, then label,
    source, defense, seed, acc, asr (shares).

    ``source`` is where the images came from (zskt), ``defense`` all of the label that
    defends ("sv+sr"; "none" where nothing does). ``model`` is equal for models that
    several jobs trained alike (undefended students, above all), so that a mean can
    count each one once.
    """
    out, study, frames = at_home(out), open_study(out), []
    triggers = {teacher.key: teacher.axes["attack.trigger"] for teacher in study.teachers}
    for job in study.jobs:
        if status_of(Path(out), job)["state"] != "done":
            continue
        found = runs_table(Path(out) / job.folder)
        if found.empty or not {"label", "acc"} <= set(found.columns):
            continue
        # of a teacher without labelled images ACC is unknown, and the run has its seconds
        ran = found["acc"].notna() | found.get("seconds", found["acc"]).notna()
        found = found[found["label"].notna() & ran].copy()
        for column in {"acc", "asr"} & {*found}:
            found[column] = pd.to_numeric(found[column])
        parsed = [label_of(label) for label in found["label"]]
        found["source"] = [label.source for label in parsed]
        found["defense"] = [label.defense or "none" for label in parsed]
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
    out = at_home(out)
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


def _model_id(folder: Path) -> str:
    """A hash of what the model depends on, from its run's config.json; the folder
    itself when there is none.
    """
    config = {k: v for k, v in _read_json(folder / "config.json").items() if k != "preset"}
    text = json.dumps([folder.name, config], sort_keys=True) if config else str(folder)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _live(folder: Path) -> dict:
    """What a running job has reached: the last ACC and ASR of its histories. One whose
    process is gone is "stopped".
    """
    entry = _read_json(folder / "status.json")
    if entry.get("state") != "running":
        return {}
    if entry["host"] == os.uname().nodename and not alive(entry["pid"]):
        return {**entry, "state": "stopped"}
    histories = sorted(folder.glob("seed*/*/history.jsonl"), key=lambda p: p.stat().st_mtime)
    for line in reversed(histories[-1].read_text().splitlines() if histories else []):
        row = json.loads(line)
        if "acc" in row:
            entry |= {"label": row["label"], "acc": row["acc"], "asr": row.get("asr")}
            break
    return {**entry, "seconds": round(time.time() - entry["started"], 1)}


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
        title=f"{escape(title)}: {', '.join(told)} of {len(frame)}{_time_left(frame)}",
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
