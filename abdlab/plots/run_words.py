"""What sets runs apart, in words short enough for a legend, and what happened in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from abdlab.labels import Label, name_of
from abdlab.runs import Run
from abdlab.settings import defaults

#: what a config says that is no setting of the method: named otherwise, or not a choice
_ASIDE = ("preset", "seed", "classes", "threads", "weights")
#: settings that a legend names, at most
_NAMED = 3
#: what an event says -> the kind of its mark
_KINDS = ((" -> ", "turned"), (" off", "ends"), (" on from", "begins"))


@dataclass(frozen=True)
class Shown:
    """One run, as figures of many runs need it.

    Attributes:
        name: its folder, relative to a root.
        label: its method; "" where it names none.
        seed: None where it is not known.
        config, metrics: what its files hold. history: one row per reported step.
    """

    name: str
    label: str
    seed: int | None
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: pd.DataFrame

    @classmethod
    def of(cls, run: Run, name: str) -> Shown:
        """From a run's folder."""
        history = run.history()
        metrics, config = (v if isinstance(v, dict) else {} for v in (run.metrics, run.config))
        label = metrics.get("label")
        if not isinstance(label, str):
            label = str(history["label"].iloc[-1]) if len(history) else ""
        seed = config.get("seed", metrics.get("seed"))
        return cls(name, label, seed if isinstance(seed, int) else None, config, metrics, history)

    @property
    def number(self) -> str:
        """ "@3" of a tuner's run METHOD@3; else ""."""
        found = re.search(r"@\d+$", self.name)
        return found[0] if found else ""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config by dotted names.

    >>> flat({"seed": 1, "attack": {"rate": 0.1, "params": {"size": 5}}})
    {'seed': 1, 'attack.rate': 0.1, 'attack.params.size': 5}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        deeper = flat(value) if isinstance(value, Mapping) else None
        found |= {key: value} if not deeper else {f"{key}.{k}": v for k, v in deeper.items()}
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each config the settings in which not all agree, by dotted name.

    A setting that nobody set stands at its signature's default. The section of a part
    that only some of the methods have is compared among those: the methods' names say the
    rest. A config that is empty (a folder without settings) differs in nothing.

    >>> differing([{"sv": {"alpha": 0.5, "k": 4}}, {"sv": {"k": 4}}, {}])
    [{'sv.alpha': 0.5}, {'sv.alpha': 0.1}, {}]
    >>> differing([{"sv": {"alpha": 0.5}}, {"sv": {"alpha": 0.9}, "tu": {"weight": 1}}])
    [{'sv.alpha': 0.5}, {'sv.alpha': 0.9}]
    """
    sections = dict.fromkeys(key for config in configs for key in config if key not in _ASIDE)
    found: list[dict[str, Any]] = [{} for _ in configs]
    for section in sections:
        values = {
            i: flat({section: {**value, **_defaults(section), **value}})
            if isinstance(value := config[section], Mapping)
            else {section: value}
            for i, config in enumerate(configs)
            if section in config
        }
        for key in dict.fromkeys(key for value in values.values() for key in value):
            texts = {json.dumps(value.get(key), default=str) for value in values.values()}
            if len(texts) > 1:
                for i, value in values.items():
                    found[i][key] = value.get(key)
    return found


def spoken(value: Any) -> str:
    """A setting's value for a person; a plan as what it was turned to, and where.

    >>> spoken([[0, 0.01], [115, 0.09]]), spoken(0.50), spoken(None)
    ('0.01 to 0.09 at 115', '0.5', 'none')
    """
    if _is_plan(value):
        first, *turned = value
        return f"{first[1]:g}" + "".join(f" to {v:g} at {at}" for at, v in turned)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def legends(runs: Sequence[Shown]) -> list[str]:
    """One line per run that says what sets it apart: its method, and the settings in
    which it differs from the others; no two are the same.

    >>> empty = pd.DataFrame()
    >>> plans = 0.01, [[0, 0.01], [115, 0.09]]
    >>> runs = [Shown(f"zskt+sv@{i}", "zskt+sv", 0, {"sv": {"alpha": p}}, {}, empty)
    ...         for i, p in enumerate(plans, 1)]
    >>> legends(runs)
    ['ZSKT+SV @1: alpha 0.01', 'ZSKT+SV @2: alpha 0.01 to 0.09 at 115']
    """
    apart = differing([run.config for run in runs])
    seen: dict[str, set] = {}
    for own in apart:
        for key, value in own.items():
            seen.setdefault(key, set()).add(json.dumps(value, default=str))
    short = Counter(key.rpartition(".")[2] for key in {k for own in apart for k in own})
    several = len({run.seed for run in runs}) > 1
    found = []
    for run, own in zip(runs, apart, strict=True):
        # what tells most runs apart comes first, and of that what defends
        defends = _defenses(run.label)
        keys = sorted(own, key=lambda k, d=defends: (-len(seen[k]), k.partition(".")[0] not in d))
        own = {key: own[key] for key in keys}
        words = [
            f"{key.rpartition('.')[2] if short[key.rpartition('.')[2]] == 1 else key}"
            f" {spoken(value)}"
            for key, value in own.items()
        ]
        if len(words) > _NAMED:
            words = [*words[:_NAMED], f"{len(words) - _NAMED} more"]
        words += [f"seed {run.seed}"] if several and run.seed is not None else []
        head = name_of(run.label) if run.label else run.name
        found.append(f"{head} {run.number}".strip() + (f": {', '.join(words)}" if words else ""))
    double = Counter(found)
    return [f"{t} ({r.name})" if double[t] > 1 else t for t, r in zip(found, runs, strict=True)]


def same_but_seed(runs: Sequence[Shown]) -> list[list[Shown]]:
    """The runs in groups of one method and one set of settings, whatever their seeds;
    in the order in which they come. Runs without settings stay alone, and so does a
    second run of a seed.
    """
    groups: dict[Any, list[Shown]] = {}
    for run in runs:
        kept = {k: v for k, v in run.config.items() if k not in ("seed", "threads", "weights")}
        key: Any = (run.label, json.dumps(kept, sort_keys=True, default=str))
        if not run.config or any(r.seed == run.seed for r in groups.get(key, [])):
            key = run.name
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def marks(history: pd.DataFrame) -> list[tuple[int, str, str]]:
    """What happened in a run: (step, kind, sentence) of each event of its history.

    Kinds: "turned" (a weight), "begins" and "ends" (a defense), "other".

    >>> marks(pd.DataFrame({"step": [1, 9], "events": [None, ["sv: alpha 0.1 -> 0.5"]]}))
    [(9, 'turned', 'sv: alpha 0.1 -> 0.5')]
    """
    if "events" not in history:
        return []
    return [
        (int(step), next((kind for text, kind in _KINDS if text in event), "other"), event)
        for step, events in zip(history["step"], history["events"], strict=True)
        for event in (events if isinstance(events, list) else ())
    ]


def table_of(runs: Sequence[Shown]) -> pd.DataFrame:
    """The histories of several runs as one table, column "run" first; every value as
    history.jsonl has it.
    """
    parts = [run.history.assign(run=run.name) for run in runs if len(run.history)]
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    return whole[["run", *(c for c in whole.columns if c != "run")]]


def csv_of(runs: Sequence[Shown]) -> str:
    """:func:`table_of` as CSV: each number as history.jsonl writes it, nothing where a
    step has none, events as a JSON list.
    """
    table = table_of(runs).astype(object)
    table = table.where(table.notna(), None)
    return table.map(lambda v: json.dumps(v) if isinstance(v, list) else v).to_csv(index=False)


def _defenses(label: str) -> tuple[str, ...]:
    try:
        return Label.parse(label).defenses
    except ValueError:
        return ()


def _defaults(section: str) -> dict[str, Any]:
    """A section's defaults; none of a part that is no longer there to be asked."""
    try:
        return defaults(section)
    except ValueError:
        return {}


def _is_plan(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(step, (list, tuple)) and len(step) == 2 for step in value)
    )
