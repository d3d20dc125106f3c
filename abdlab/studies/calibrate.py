"""How far the detectors of :mod:`abdlab.audit` can be trusted: clean and poisoned digits
teachers, every detector on each, one CSV row per teacher.

::

    python -m abdlab.studies.calibrate FOLDER --root runs/suspects     # rows, as it goes
    python -m abdlab.studies.calibrate FOLDER --report                 # what they say

Thresholds are set on the rows of "calibration" alone; the rows of "held out" say how
good they are. Attackers of optimised triggers, and of cl, have the clean teacher of the
row before, whose seed is another.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from abdlab.attacks.optimize import optimize, options_of
from abdlab.attacks.triggers import trigger_from
from abdlab.audit import POOL, THRESHOLDS, Evidence, accused, measure, scores_of, together
from abdlab.data import Dataset
from abdlab.purifiers.pool import rough_pool
from abdlab.runs import Run, folder_of
from abdlab.settings import Settings, settings
from abdlab.suspects import THRESHOLD
from abdlab.teachers import WeakTeacher, clean_teacher, poisoned_teacher

#: part -> (first seed of the clean teachers, first seed of the poisoned ones)
PARTS = {"calibration": (100, 120), "held out": (200, 220)}
#: the paper's ten, in turn
TRIGGERS = (
    "badnet_sq",
    "badnet_grid",
    "trojan_3x3",
    "trojan_8x8",
    "trojan_wm",
    "blend",
    "l2_inv",
    "l0_inv",
    "cl",
    "sig",
)
PRESET = "quick/digits"
FILE, SUMMARY = "suspects.csv", "suspects_summary.csv"
COLUMNS = (
    *("study", "preset", "trigger", "method", "setting", "seed", "acc", "asr", "target"),
    *("costs", "margins", "inclined", "changed", "teacher_seconds", "seconds"),
)


@dataclass(frozen=True)
class Case:
    """One teacher of the study; "none" is a trigger that nobody used."""

    part: str
    seed: int
    trigger: str
    target: int
    #: the seed of the clean teacher that an attacker optimises against
    surrogate: int


def cases(count: int) -> Iterator[Case]:
    """``count`` clean and as many poisoned teachers of each part, in turn; each trigger
    with another target each time.

    >>> [(case.seed, case.trigger, case.target) for case in cases(1)]
    [(100, 'none', 0), (120, 'badnet_sq', 0), (200, 'none', 0), (220, 'badnet_sq', 5)]
    """
    for i in range(count):
        trigger = TRIGGERS[i % len(TRIGGERS)]
        for number, (part, (clean, poisoned)) in enumerate(PARTS.items()):
            yield Case(part, clean + i, "none", 0, clean + i)
            target = (3 * i + i // len(TRIGGERS) + 5 * number) % 10
            yield Case(part, poisoned + i, trigger, target, clean + i)


def teacher_of(root: Path, case: Case, data: Dataset) -> tuple[nn.Module, Run]:
    """A case's teacher, trained or loaded, and its run."""
    plain = settings(PRESET, seed=case.surrogate, device="cpu")
    model, path = clean_teacher(root, plain, data)
    if case.trigger == "none":
        return model, Run(path.parent)
    chosen = attack_of(case, data, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeakTeacher)
        model = poisoned_teacher(root, replace(chosen, clean_model=str(path)), data)
    return model, Run(folder_of(root, case.seed, "teacher"))


def attack_of(case: Case, data: Dataset, surrogate: nn.Module) -> Settings:
    """The settings of a poisoned case, its trigger optimised where it needs to be."""
    given = {"attack.trigger": case.trigger, "attack.target": case.target}
    chosen = settings(PRESET, given, seed=case.seed, device="cpu")
    if not chosen.trigger.needs_pattern:
        return chosen
    values = chosen.values["attack"]
    made = optimize(
        trigger_from(case.trigger, values.get("params")),
        surrogate,
        data.train_images,
        data.train_labels,
        case.target,
        seed=case.seed,
        device="cpu",
        **options_of(chosen.trigger, **values.get("optimize", {})),
    )
    attack = {**values, "trigger": made.name, "params": made.params}
    return replace(chosen, values={**chosen.values, "attack": attack})


def row_of(case: Case, root: Path, data: Dataset) -> dict[str, str]:
    """Train a case's teacher, measure it, and say so in one row."""
    began = time.perf_counter()
    model, run = teacher_of(root, case, data)
    trained = time.perf_counter()
    pool = rough_pool(model, data.shape, images=POOL, seed=case.seed)
    evidence, found = measure(model, pool, seed=case.seed), run.metrics
    asr = found.get("asr")
    return {
        "study": Path(FILE).stem,
        "preset": PRESET,
        "trigger": case.trigger,
        "method": "teacher",
        "setting": case.part,
        "seed": str(case.seed),
        "acc": f"{100 * found['acc']:.1f}",
        "asr": "" if asr is None else f"{100 * asr:.1f}",
        "target": "" if case.trigger == "none" else str(case.target),
        **_written(evidence),
        "teacher_seconds": f"{trained - began:.1f}",
        "seconds": f"{time.perf_counter() - trained:.1f}",
    }


def run_cases(folder: Path, root: Path, count: int) -> None:
    """Write the rows that are not there yet, one after the other."""
    path, data = folder / FILE, settings(PRESET, device="cpu").dataset()
    done = {(row["setting"], int(row["seed"])) for row in rows(path)} if path.exists() else set()
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    for case in cases(count):
        if (case.part, case.seed) in done:
            continue
        row = row_of(case, root, data)
        with path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        print(f"{case.part} {case.seed} {case.trigger}: {row['seconds']} s", flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a study's file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def evidence_of(row: dict[str, str]) -> Evidence:
    """The evidence that a row holds."""
    inner = {name: _tensor(row[name]) for name in ("costs", "margins", "inclined", "changed")}
    return Evidence(**inner)


def _written(evidence: Evidence) -> dict[str, str]:
    """Rows of a tensor apart by "; ", numbers by blanks."""
    names = ("costs", "margins", "inclined", "changed")
    return {name: _text(getattr(evidence, name)) for name in names}


def _text(values: torch.Tensor | None) -> str:
    if values is None:
        return ""
    lines = values.tolist() if values.ndim == 2 else [values.tolist()]
    return "; ".join(" ".join(f"{v:.4g}" for v in line) for line in lines)


def _tensor(text: str) -> torch.Tensor | None:
    if not text:
        return None
    values = torch.tensor([[float(v) for v in line.split()] for line in text.split(";")])
    return values if len(values) > 1 else values[0]


def thresholds_of(clean: Sequence[Mapping[str, torch.Tensor]], rate: float) -> dict[str, float]:
    """Per detector the score above which this share of clean teachers has a class: half
    way between the last that is accused and the first that is not; 10 % above all of
    them where they are too few for that share.

    Args:
        clean: the scores of each clean teacher, by detector.
        rate: false alarms, in [0, 1).
    """
    allowed, found = int(rate * len(clean)), {}
    for name in clean[0]:
        largest = sorted((float(scores[name].max()) for scores in clean), reverse=True)
        accused = largest[max(0, allowed - 1)] if allowed else 1.2 * largest[0]
        found[name] = round((accused + largest[allowed]) / 2, 2)
    return found


def auc(clean: Sequence[float], poisoned: Sequence[float]) -> float:
    """The chance that a poisoned teacher's score is above a clean one's, ties half.

    >>> auc([0.0, 1.0], [1.0, 2.0])
    0.875
    """
    pairs = [(p > c) + 0.5 * (p == c) for p in poisoned for c in clean]
    return sum(pairs) / len(pairs)


def report(folder: Path, rate: float = 0.05) -> list[dict[str, str]]:
    """The held-out part as rows: per detector, and per trigger for the audit's verdict.

    Writes them to :data:`SUMMARY`, and says which thresholds the calibration part asks
    for; :data:`abdlab.audit.THRESHOLDS` holds the ones that count.
    """
    found = rows(folder / FILE)
    parts = {part: [r for r in found if r["setting"] == part] for part in PARTS}
    scores = {row["setting"] + row["seed"]: scores_of(evidence_of(row)) for row in found}

    def of(part: str, poisoned: bool) -> list[tuple[dict[str, str], dict[str, torch.Tensor]]]:
        chosen = [r for r in parts[part] if (r["trigger"] != "none") == poisoned]
        return [(row, scores[row["setting"] + row["seed"]]) for row in chosen]

    wanted = thresholds_of([s for _, s in of("calibration", False)], rate)
    print(f"thresholds of the calibration part: {wanted}; the audit's: {THRESHOLDS}")
    out = []
    for part in PARTS:
        clean, poisoned = of(part, False), of(part, True)
        if not clean or not poisoned:
            continue
        for name, limit in THRESHOLDS.items():
            right = [
                float(s[name][int(r["target"])]) > limit
                and int(s[name].argmax()) == int(r["target"])
                for r, s in poisoned
            ]
            alarms = [float(s[name].max()) > limit for _, s in clean]
            curve = auc(*([float(s[name].max()) for _, s in x] for x in (clean, poisoned)))
            out.append(_line("suspects-detectors", part, name, right, alarms, curve, limit))
        both = [[float(together(s).max()) for _, s in x] for x in (clean, poisoned)]
        verdicts = [(r, accused(s)) for r, s in poisoned]
        alarms = [accused(s) is not None for _, s in clean]
        right = [label == int(r["target"]) for r, label in verdicts]
        out.append(
            _line("suspects-detectors", part, "verdict", right, alarms, auc(*both), THRESHOLD)
        )
        for trigger in dict.fromkeys(r["trigger"] for r, _ in verdicts):
            own = [label == int(r["target"]) for r, label in verdicts if r["trigger"] == trigger]
            out.append(_line("suspects-triggers", part, trigger, own, [], None, None))
    with (folder / SUMMARY).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*out[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(out)
    return out


def _line(study, part, what, right, alarms, curve, limit) -> dict[str, str]:
    return {
        "study": study,
        "preset": PRESET,
        "method": "teacher",
        "setting": part if study == "suspects-triggers" else f"{what}, {part}",
        "part": part,
        "trigger": what if study == "suspects-triggers" else "",
        "detector": what if study == "suspects-detectors" else "",
        "found": f"{sum(right)} of {len(right)}",
        "alarms": f"{sum(alarms)} of {len(alarms)}" if alarms else "",
        "auc": "" if curve is None else f"{curve:.2f}",
        "threshold": "" if limit is None else f"{limit:g}",
    }


def main() -> None:
    """Entry point of ``python -m abdlab.studies.calibrate``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where suspects.csv is, or shall be")
    parser.add_argument("--root", type=Path, default=Path("runs/suspects"), help="of the teachers")
    parser.add_argument("--count", type=int, default=20, help="of each part: clean, and poisoned")
    parser.add_argument("--report", action="store_true", help="write what the rows say")
    given = parser.parse_args()
    if given.report:
        for row in report(given.folder):
            print(", ".join(f"{key} {value}" for key, value in row.items() if value))
        return
    torch.set_num_threads(1)
    run_cases(given.folder, given.root.resolve(), given.count)


if __name__ == "__main__":
    main()
