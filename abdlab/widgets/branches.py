"""The tuner's runs on disk: which there are, where one can go on or branch off, and
what a branch shares with its trunk.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from abdlab.checkpoint import read_card, save_state, write_atomically
from abdlab.errors import CheckpointError
from abdlab.labels import Label
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.threads import THREADS

#: the notebook whose parameters repeat a run
NOTEBOOK = "02_distillation"
#: a branch's file that names its parent: a resumed run remembers it too
PARENT = "parent.json"


@dataclass(frozen=True)
class Origin:
    """Where a run begins: from scratch (folder None), where a stopped run ended, or
    branching off a run at ``index``.
    """

    folder: str | None = None
    index: int = 0
    checkpoint: Path | None = None  # set when it branches

    def __str__(self) -> str:
        if self.folder is None:
            return "from scratch"
        return (
            f"{'branch off' if self.checkpoint else 'go on with'} {self.folder} at step"
            f" {self.index}"
        )


def number_of(folder: str) -> int:
    """The number of a run's folder METHOD@NUMBER; 0 for one without."""
    found = re.search(r"@(\d+)$", folder)
    return int(found[1]) if found else 0


def method_of(folder: str) -> str:
    """The method of a run's folder METHOD@NUMBER; of another folder, its name.

    >>> method_of("bounded,cmi+tc@3"), method_of("02_distillation")
    ('bounded/cmi+tc', '02_distillation')
    """
    name = folder.partition("@")[0]
    try:
        return str(Label.of_folder(name))
    except ValueError:
        return name


def runs_in(beside: Path) -> list[Path]:
    """The folders of the tuner's runs that have begun, by method and number."""
    found = [path for path in beside.glob("*@*") if (path / "history.jsonl").exists()]
    return sorted(found, key=lambda path: (method_of(path.name), number_of(path.name)))


def origins(folder: Path) -> list[Origin]:
    """Where a run can be gone on with, and where one can branch off it, in the order of
    steps.
    """
    newest, done = folder / "checkpoint.safetensors", (folder / "student.safetensors").exists()
    points: dict[int, Path] = {}
    for file in [
        newest,
        *folder.glob("checkpoint-*.safetensors"),
    ]:  # one that is kept outlives the newest of the same step
        try:
            points[read_card(file)["index"]] = file
        except (CheckpointError, KeyError):
            continue
    found = []
    try:
        last = read_card(newest)["index"]
        if done:  # nothing is left to train there
            points.pop(last, None)
        else:
            found.append(Origin(folder.name, last))
    except (CheckpointError, KeyError):
        pass
    return [*found, *(Origin(folder.name, index, points[index]) for index in sorted(points))]


def length_of(run: Path) -> int:
    """The length in steps of the run that a checkpoint, or a run's folder, holds."""
    file = run / "checkpoint.safetensors" if run.is_dir() else run
    return read_card(file)["run"]["length"]


def newest_unfinished(beside: Path) -> Origin | None:
    """Where the run that was stopped last goes on; None where all are done.

    A later run that is done does not hide it: nothing else would say that it is there.
    """
    files = [path / "checkpoint.safetensors" for path in runs_in(beside)]
    there = sorted((f for f in files if f.exists()), key=lambda f: -f.stat().st_mtime)
    for file in there:
        for place in origins(file.parent):
            if place.checkpoint is None:
                return place
    return None


def root_of(top: Path, chosen: Settings) -> Path:
    """Where an experiment's teacher and students are: ``top``, or a folder in it where
    that has another teacher.
    """
    config = json.loads(json.dumps(chosen.config("data", "attack", "teacher")))
    teacher = top / f"seed{chosen.seed}" / "teacher" / "config.json"
    there = json.loads(teacher.read_text()) if teacher.exists() else {}
    if not there or all(there.get(k) == config[k] for k in ("data", "attack", "teacher")):
        return top
    stamp = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]
    name = Path(chosen.opened).stem if chosen.opened else chosen.trigger
    return top / f"{name}-{stamp}"


def next_folder(beside: Path, label: str) -> str:
    """A name METHOD@NUMBER that no run of the method beside the others has yet."""
    stem = Label.parse(label).folder
    there = beside.iterdir() if beside.is_dir() else ()
    taken = [number_of(p.name) for p in there if p.name.partition("@")[0] == stem]
    return f"{stem}@{max(taken, default=0) + 1}"


def parameters_of(run: Run, rest: Settings, into: Path) -> str:
    """YAML for papermill's ``-f`` that repeats a run from scratch, weights that changed
    on the way included.

    The same numbers need the same machine and number of threads, which the first line
    names. A run that was stopped is repeated to its end.

    Args:
        rest: the experiment; what the run did not depend on is taken from it.
        into: the folder of results that the repetition shall write to.
    """
    folder = run.path.name
    label = Label.parse(method_of(folder))
    chosen = Settings.of(run.config, rest.device)
    used = {"data", "attack", "teacher", "student", *chosen.sections(label.source)}
    used |= {*label.defenses, *label.purifiers}
    # the clean-KD floor is distilled as the experiment has it
    overrides = {k: v for k, v in rest.overrides().items() if k.rpartition(".")[0] not in used}
    overrides |= {k: v for k, v in chosen.overrides().items() if k.rpartition(".")[0] in used}
    values = {
        "run": str(into / folder),
        "preset": chosen.preset,
        "device": str(chosen.device),
        "seed": chosen.seed,
        "source": label.source,
        "defenses": list(label.defenses),
        "overrides": overrides,
    }
    plain = json.loads(json.dumps(values))
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=110)
    made_with = f"{THREADS}={run.threads}"
    return f"# {folder}: parameters of {NOTEBOOK}, computed with {made_with}\n{text}"


def inherit(trunk: Run, branch: Run, index: int) -> None:
    """Give a branch the history and the samples that it shares with its trunk, up to
    step ``index``, and let it remember whom it branched off.
    """
    remembered = {"run": trunk.path.name, "step": index}
    write_atomically(branch.file(PARENT), (json.dumps(remembered) + "\n").encode())
    lines = trunk.file("history.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= index]
    write_atomically(branch.file("history.jsonl"), "".join(f"{line}\n" for line in kept).encode())
    if samples := {step: images for step, images in trunk.samples().items() if step <= index}:
        save_state(branch.file("samples.safetensors"), samples)


def parent_of(folder: Path) -> str:
    """Where a run branched off, "METHOD@NUMBER at STEP"; "" for one that began from
    scratch.
    """
    try:
        found = json.loads((folder / PARENT).read_text())
        return f"{found['run']} at {found['step']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
