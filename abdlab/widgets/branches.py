"""The tuner's runs on disk: which there are, where one can go on or branch off, and
what a branch shares with its trunk.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from abdlab.checkpoint import read_card, save_state, write_atomically
from abdlab.errors import CheckpointError
from abdlab.runs import Run


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
    """The method of a run's folder METHOD@NUMBER."""
    return folder.partition("@")[0]


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


def inherit(trunk: Run, branch: Run, index: int) -> None:
    """Give a branch the history and the samples that it shares with its trunk, up to
    step ``index``.
    """
    lines = trunk.file("history.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= index]
    write_atomically(branch.file("history.jsonl"), "".join(f"{line}\n" for line in kept).encode())
    if samples := {step: images for step, images in trunk.samples().items() if step <= index}:
        save_state(branch.file("samples.safetensors"), samples)
