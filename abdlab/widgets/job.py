"""What one run of the tuner is, settled before its thread begins, and how it is begun."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from abdlab.checkpoint import read_card
from abdlab.data import Dataset
from abdlab.labels import FLOOR, Label
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.stream import Step
from abdlab.students import Distillation, distillation, distilled
from abdlab.teachers import poisoned_teacher, prepare
from abdlab.widgets.branches import Origin, inherit, next_folder
from abdlab.widgets.knobs import check_branch

#: what gets ready -> how it is called
GETTING_READY = {
    "teacher": "the teacher",
    "clean_teacher": "a clean teacher to optimise the trigger against",
    FLOOR: "clean KD, the floor",
}


@dataclass(frozen=True)
class Job:
    """One run: from scratch, going on, or branching off another one.

    Attributes:
        root: the folder of results. folder: the run's own, in ROOT/seedN.
        base: what the settings were before any knob was turned; of a run that goes on,
            those that it has.
    """

    root: Path
    base: Settings
    chosen: Settings
    label: str
    folder: str
    origin: Origin

    @classmethod
    def of(cls, root: Path, base: Settings, chosen: Settings, label: str, origin: Origin) -> Job:
        """The run that begins at ``origin``.

        Raises:
            ValueError: for a branch that would not repeat from scratch.
        """
        if origin.folder and not origin.checkpoint:
            return cls(root, base, base, label, origin.folder, origin)
        if origin.checkpoint:
            length = read_card(origin.checkpoint)["run"]["length"]
            check_branch(label, base, chosen, origin.index, length)
        return cls(root, base, chosen, label, next_folder(root / f"seed{base.seed}", label), origin)

    @property
    def place(self) -> Path:
        """Its folder."""
        return self.root / f"seed{self.chosen.seed}" / self.folder

    def teacher(
        self, data: Dataset, tell: Callable[[str, Step], None]
    ) -> tuple[Settings, nn.Module, float | None]:
        """The settings made ready, the teacher, and the teacher's ASR as a share."""
        ready = prepare(self.root, self.chosen, data, tell=tell)
        teacher = poisoned_teacher(self.root, ready, data, tell=tell)
        return ready, teacher, Run(self.place.parent / "teacher").metrics.get("asr")

    @property
    def cleans(self) -> tuple[str, ...]:
        """The purifiers that the teacher goes through first."""
        return Label.parse(self.label).purifiers

    @property
    def has_floor(self) -> bool:
        """Whether clean KD can be distilled and its ASR known: labelled images and an
        attack.
        """
        return self.chosen.labelled and bool(self.chosen.attacks)

    @property
    def floor_is_there(self) -> bool:
        """Whether clean KD has been distilled already."""
        return (self.place.parent / FLOOR / "metrics.json").exists()

    def floor(
        self, ready: Settings, data: Dataset, teacher: nn.Module, tell: Callable[[str, Step], None]
    ) -> float | None:
        """The clean-KD student's ASR as a share."""
        return distilled(self.root, ready, data, teacher, FLOOR, tell=tell)[1].get("asr")

    def begin(self, ready: Settings, data: Dataset, teacher: nn.Module, exams: int) -> Distillation:
        """The run as a stream. A branch takes its trunk's checkpoint, history and
        samples along, so that it survives its trunk.
        """
        resume_from = None
        if self.origin.checkpoint:
            branch = Run(self.place)
            resume_from = branch.file(f"checkpoint-{self.origin.index}.safetensors")
            shutil.copyfile(self.origin.checkpoint, resume_from)
            inherit(Run(self.place.parent / self.origin.folder), branch, self.origin.index)
        return distillation(
            self.root,
            ready,
            data,
            teacher,
            self.label,
            exams=exams,
            samples=exams,
            resume_from=resume_from,
            folder=self.folder,
            keep_all=True,
        )
