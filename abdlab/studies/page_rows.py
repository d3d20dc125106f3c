"""A study's models as rows of the page of results: what :mod:`abdlab.studies.book` reads.

Where a study also has a teacher without a backdoor (``attack.rate: 0``), the excess is known:
a model's ASR less that of the same method's model of that teacher, under the same trigger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from abdlab.checkpoint import load_model, write_atomically
from abdlab.data import Dataset
from abdlab.home import at_home
from abdlab.labels import TEACHER
from abdlab.purifiers import load_purified
from abdlab.settings import Settings, settings
from abdlab.studies.book import KEY
from abdlab.studies.job import _read_json, label_of, status_of
from abdlab.studies.study import open_study

#: what a row has
COLUMNS = (*KEY, "acc", "asr", "robust", "excess", "threads", "note")
#: what a clean teacher's row says in ``setting``
CLEAN = "no backdoor"


def page_rows(out: str | Path, study: str) -> pd.DataFrame:
    """Every model of every finished job of a study as one row, in percent.

    Args:
        out: the study's folder. study: its name on the page.

    Raises:
        ValueError: when the folder holds no study.
    """
    out, plan = at_home(out), open_study(out)
    found: dict[tuple, _Run] = {}
    for job in plan.jobs:
        if status_of(out, job)["state"] == "done":
            rest = {k: v for k, v in job.axes.items() if not _of_the_attack(k)}
            for path in sorted((out / job.folder).glob("seed*/*/metrics.json")):
                run = _Run(path.parent, job.axes)
                if run.is_model:
                    found[json.dumps(rest, sort_keys=True), *run.key] = run
    clean = {
        (rest, run.label, run.chosen.seed): run for (rest, *_), run in found.items() if run.is_clean
    }
    data: dict[str, Dataset] = {}
    rows = []
    for (rest, *_), run in found.items():
        own = clean.get((rest, run.label, run.chosen.seed))
        rows.append({"study": study, **run.row()})
        if own and not run.is_clean:
            name = json.dumps(run.chosen.section("data"))
            data[name] = data.get(name) or run.chosen.dataset()
            floor = run.chosen.exam(data[name])(own.model(data[name]))["asr"]
            rows[-1]["excess"] = 100 * (run.metrics["asr"] - floor)
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(list(KEY))
    numbers = ["acc", "asr", "robust", "excess"]
    return frame.assign(**{n: pd.to_numeric(frame[n]).round(1) for n in numbers})


def merge(rows: pd.DataFrame, path: str | Path) -> int:
    """Put rows into a CSV file of results; returns how many of them it did not have.

    A row that is there already, the same in all of :data:`abdlab.studies.book.KEY`, is
    replaced where it stands; columns that the file does not have are added.
    """
    path = Path(path)
    old = pd.DataFrame(columns=list(KEY))
    if path.is_file():
        old = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    new = rows.astype(object).where(rows.notna(), "").astype(str)
    missing = [k for k in KEY if k not in old]
    old = old.assign(**dict.fromkeys(missing, ""))
    both = pd.concat([old, new], ignore_index=True).fillna("")
    again = both[both.duplicated(list(KEY), keep="first")]
    both = both.drop(again.index)
    places = {
        tuple(values): index
        for index, values in zip(both.index, both[list(KEY)].values, strict=True)
    }
    for _, row in again.iterrows():
        both.loc[places[tuple(row[list(KEY)])], rows.columns] = row[rows.columns]
    write_atomically(path, both.to_csv(index=False, lineterminator="\n").encode())
    return len(both) - len(old)


def setting_of(chosen: Settings, axes: Mapping[str, Any]) -> str:
    """What a run's attack and its study's other axes are, in words; "none" for the plain
    attack.

    >>> setting_of(settings("quick/digits", {"teacher.objective": "pgd"}), {"sv.alpha": 0.2})
    'pgd, sv.alpha 0.2'
    >>> setting_of(settings("quick/digits", {"teacher.tune": {"epochs": 6}}), {})
    'fine-tuned'
    """
    told = ("seed", "seeds", "methods", "preset")
    others = [f"{k} {v}" for k, v in axes.items() if k not in told and not _of_the_attack(k)]
    return ", ".join([*_attack_words(chosen), *others]) or "none"


def what_was_done(purified: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run's purifiers say that they did, in words.

    >>> what_was_done([{"name": "unlearn", "targets": [], "tried": 7}, {"k": 2.5}])
    ['class 7 on trial, left alone', 'k = 2.5']
    >>> what_was_done([{"name": "unlearn", "targets": [0, 3], "triggers": 9}])
    ['targets [0, 3]', '9 triggers unlearnt']
    """
    words = []
    for part in purified:
        if "tried" in part:
            left = "" if part["targets"] else ", left alone"
            words.append(f"class {part['tried']} on trial{left}")
        elif "targets" in part:
            words.append(f"targets {part['targets']}")
        if part.get("triggers"):
            words.append(f"{part['triggers']} triggers unlearnt")
        words += [f"k = {part['k']}"] if "k" in part else []
    return words


def _attack_words(chosen: Settings) -> list[str]:
    """What a run's attack is beyond its preset's, a part of the sentence each."""
    attacks, teacher = chosen.attacks, chosen.section("teacher")
    if not any(attack.rate for attack in attacks):
        return [CLEAN]
    words = [teacher["objective"]] if teacher.get("objective") else []
    words += ["fine-tuned"] if teacher.get("tune") else []
    words += ["all to all"] if attacks[0].all_to_all else []
    several = len(attacks) > 1
    if several:
        targets = len({attack.target for attack in attacks})
        words.append(f"{len(attacks)} triggers with {targets} target" + "s" * (targets > 1))
    usual = settings(chosen.preset).section("attack").get("rate")
    if several or chosen.attack_values[0].get("rate") != usual:
        rates = dict.fromkeys(f"{100 * attack.rate:g}" for attack in attacks)
        each = " each" if several and len(rates) == 1 else ""
        words.append(f"{' and '.join(rates)} % poisoned{each}")
    return words


def _of_the_attack(axis: str) -> bool:
    return axis.startswith("attack.") or axis in ("teacher.objective", "teacher.tune")


class _Run:
    """A finished model's folder."""

    def __init__(self, folder: Path, axes: Mapping[str, Any]):
        self.folder, self.axes = folder, axes
        self.metrics = _read_json(folder / "metrics.json")
        self.label = str(self.metrics.get("label"))
        config = _read_json(folder / "config.json")
        self.is_model = "attack" in config and "asr" in self.metrics
        self.chosen = Settings.of(config) if self.is_model else None

    @property
    def is_clean(self) -> bool:
        return not any(attack.rate for attack in self.chosen.attacks)

    @property
    def key(self) -> tuple:
        return self.label, self.chosen.seed, setting_of(self.chosen, self.axes), self._triggers()

    def row(self) -> dict:
        measured = {k: self.metrics.get(k) for k in ("acc", "asr", "robust")}
        return {
            "preset": self.chosen.preset,
            "trigger": self._triggers(),
            "method": self.label,
            "setting": setting_of(self.chosen, self.axes),
            "seed": str(self.chosen.seed),
            **{k: None if v is None else 100 * v for k, v in measured.items()},
            "threads": str(self.metrics.get("threads") or ""),
            "note": self._note(),
        }

    def model(self, data: Dataset) -> nn.Module:
        """The trained network, on the data's device."""
        where, label = data.train_images.device, label_of(self.label)
        if label.source != TEACHER:
            return load_model(self.folder / "student.safetensors", device=where)
        path = self.folder / "teacher.safetensors"
        return (load_purified if label.purifiers else load_model)(path, device=where)

    def _triggers(self) -> str:
        counts = Counter(str(attack.trigger) for attack in self.chosen.attacks)
        *first, last = (f"{name} x{n}" if n > 1 else name for name, n in counts.items())
        return " and ".join(filter(None, [", ".join(first), last]))

    def _note(self) -> str:
        words = what_was_done(self.metrics.get("purified", ()))
        lost = [
            name
            for name, report in self.metrics.get("defenses", {}).items()
            if report.get("found") is False
        ]
        words += [f"{name}: no vaccine found" for name in lost]
        each = [f"{100 * v:.1f}" for k, v in self.metrics.items() if k.startswith("asr/")]
        if each:
            words.append(f"ASR each {', '.join(each)}")
        return "; ".join(words)
