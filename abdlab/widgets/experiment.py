"""The experiment that the tuner's runs belong to: how another teacher is taken over, and
what is known of the one that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abdlab.data import Dataset
from abdlab.defend import identity
from abdlab.owned import UNSAID
from abdlab.settings import Settings, settings


def with_teacher(first: Settings, overrides: Mapping[str, Any], preset: str = "") -> Settings:
    """An experiment about another teacher: what was said of students, sources and
    defenses stays, everything about the old teacher goes.

    Args:
        overrides: the new teacher's attack and data, or its file, by dotted name.
        preset: another one that suits its images; empty keeps the experiment's.

    Raises:
        ValueError: for overrides that no settings take.

    >>> made = with_teacher(settings("quick/digits", {"sv.alpha": 0.5}), {"attack.trigger": "sig"})
    >>> str(made.trigger), made.values["sv"]["alpha"]
    ('sig', 0.5)
    """
    new = {name.partition(".")[0] for name in overrides}
    kept = {k: v for k, v in first.overrides().items() if k.partition(".")[0] not in new}
    if first.opened:  # what was settled because its file was a stranger's
        kept = {k: v for k, v in kept.items() if not k.startswith("teacher.")}
        kept = {k: v for k, v in kept.items() if UNSAID.get(k, ...) != v}
    return settings(
        preset or first.preset, {**kept, **overrides}, seed=first.seed, device=first.device
    )


def unknown(chosen: Settings) -> tuple[str, ...]:
    """Those of "acc" and "asr" that no run of an experiment can know.

    >>> unknown(settings("quick/digits"))
    ()
    """
    if not chosen.labelled:
        return ("acc", "asr")
    return () if chosen.attacks else ("asr",)


def who(chosen: Settings, root: Path, data: Dataset | None = None) -> str:
    """The teacher in one line, with the ACC and ASR that a root's folder knows.

    Args:
        root: the folder of results of this experiment.
        data: names the classes, where it is at hand.
    """
    try:
        metrics = json.loads((root / f"seed{chosen.seed}/teacher/metrics.json").read_text())
    except (OSError, json.JSONDecodeError):
        metrics = {}
    text = identity(chosen, metrics, data.classes if data is not None else ())
    return f"{text[0].upper()}{text[1:]}"
