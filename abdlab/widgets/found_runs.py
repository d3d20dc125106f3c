"""The runs below a folder as rows of a table, and the notes that stand beside them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from abdlab.checkpoint import write_atomically
from abdlab.defenses import DEFENSES
from abdlab.defenses.plans import tunable
from abdlab.home import at_home
from abdlab.labels import Label, name_of
from abdlab.plots import color_of
from abdlab.plots.run_words import spoken
from abdlab.settings import defaults
from abdlab.widgets.branches import method_of, parent_of

#: a run's file for what a person wrote about it
NOTES = "notes.txt"
#: headings of :func:`row_of`
COLUMNS = (
    *("run", "method", "seed", "ACC (%)", "ASR (%)", "robust (%)", "trigger", "weights"),
    *("notes", "state", "date", "seconds", "threads"),
)
_NUMBERS = ("acc", "asr", "robust", "seconds", "threads")


def runs_below(root: str | Path) -> list[dict[str, Any]]:
    """Every run below a folder, finished or not: run (its folder, relative), label,
    seed, acc, asr, robust, state, seconds, threads, trigger, weights, notes, date, and
    the names of numbers that metrics.json says are unknown.

    acc, asr, robust (shares in [0, 1]), seconds and threads are None where metrics.json
    has no number there; label is "" where it names no method (a notebook's own folder),
    and so are trigger and weights where no settings tell them. date is when a file of
    the run was last written, in this machine's time.
    """
    found = []
    root = at_home(root)
    folders = (
        {path.parent for name in ("config.json", "metrics.json") for path in root.rglob(name)}
        if root.is_dir()
        else set()
    )
    for folder in sorted(folders - {root}):
        metrics, beside = _mapping(folder / "metrics.json"), folder.parent.name
        config = _mapping(folder / "config.json")
        inside = beside.startswith("seed") and beside[4:].isdigit()
        seed = metrics.get("seed", int(beside[4:]) if inside else None)
        if "stopped_at" in metrics:
            state = f"stopped at {metrics['stopped_at']} of {metrics.get('length', '?')}"
        elif metrics:
            state = "done"
        else:
            state = "unfinished" if (folder / "history.jsonl").exists() else "begun"
        if parent := parent_of(folder):
            state += f", off {parent}"
        label = _label(metrics.get("label") or (method_of(folder.name) if inside else ""))
        found.append(
            {
                "run": str(folder.relative_to(root)),
                "label": label,
                "seed": seed,
                "state": state,
                **{key: number(metrics.get(key)) for key in _NUMBERS},
                "unknown": [key for key in _NUMBERS if metrics.get(key, 0) is None],
                "trigger": _trigger(config),
                "weights": weights_of(label, config) if label else "",
                "notes": notes_of(folder),
                "date": _date(folder),
            }
        )
    return found


def number(value: Any) -> float | None:
    """A number as it is, and None for what is none: notebooks keep dicts and lists of
    scores under the same names.

    >>> number(0.5), number({"zskt": 0.9}), number(float("nan")), number(True)
    (0.5, None, None, None)
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if fits and math.isfinite(value) else None


def weights_of(label: str, config: Mapping[str, Any]) -> str:
    """What the run's defenses can be turned to, as it was: the first setting of each that
    may change while it trains, and every one that the config sets.

    >>> weights_of("zskt+sv", {"sv": {"alpha": [[0, 0.01], [115, 0.09]]}})
    'sv alpha 0.01 to 0.09 at 115'
    """
    words = []
    for section in Label.parse(label).defenses:
        with suppress(ValueError):
            given, plain = config.get(section, {}), defaults(section)
            keys = tunable(DEFENSES.find(section))
            keys = [key for i, key in enumerate(keys) if key in given or (not i and key in plain)]
            words += [f"{section} {key} {spoken(given.get(key, plain.get(key)))}" for key in keys]
    return ", ".join(words)


def notes_of(folder: Path) -> str:
    """What a person wrote about a run; "" where nobody did."""
    try:
        return (folder / NOTES).read_text().strip()
    except (OSError, ValueError):
        return ""


def save_notes(folder: Path, text: str) -> None:
    """Keep a person's notes beside the run; an empty text removes them."""
    if text.strip():
        write_atomically(folder / NOTES, f"{text.strip()}\n".encode())
    else:
        (folder / NOTES).unlink(missing_ok=True)


def row_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run as a row of :class:`abdlab.widgets.looks.Rows`, its cells under
    :data:`COLUMNS`.
    """

    def share(key: str) -> str:
        value = run[key]
        if value is None:
            return "unknown" if key in run["unknown"] else ""
        return f"{100 * value:.1f}"

    def whole(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    return {
        "id": run["run"],
        "color": color_of(run["label"]) if run["label"] else "",
        "cells": [
            run["run"],
            name_of(run["label"]) if run["label"] else "notebook",
            "" if run["seed"] is None else str(run["seed"]),
            *(share(key) for key in ("acc", "asr", "robust")),
            *(run[key] for key in ("trigger", "weights")),
            re.sub(r"\s+", " ", run["notes"]),
            *(run[key] for key in ("state", "date")),
            *(whole(run[key]) for key in ("seconds", "threads")),
        ],
    }


def _trigger(config: Mapping[str, Any]) -> str:
    attack = config.get("attack")
    attack = attack if isinstance(attack, Mapping) else {}
    if not attack.get("trigger"):
        teacher = config.get("teacher")
        return "unknown" if isinstance(teacher, Mapping) and teacher.get("file") else ""
    more = attack.get("more") or ()
    return f"{attack['trigger']}" + (f" and {len(more)} more" if more else "")


def _date(folder: Path) -> str:
    names = ("metrics.json", "history.jsonl", "config.json")
    times = [(folder / name).stat().st_mtime for name in names if (folder / name).exists()]
    return datetime.fromtimestamp(max(times)).strftime("%Y-%m-%d %H:%M") if times else ""


def _mapping(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing where it is damaged, or no mapping."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _label(text: Any) -> str:
    """A method's label; "" for what is none."""
    try:
        return str(text) if text == "clean_teacher" else str(Label.parse(text))
    except ValueError:
        return ""
