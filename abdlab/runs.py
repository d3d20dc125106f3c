"""A run's folder: config, history, metrics, samples, figures; and many runs as one table.

::

    runs/demo/02_distillation/
      config.json        the resolved settings
      history.jsonl      one line per reported Step
      metrics.json       the numbers the run ends with
      teacher.safetensors, student.safetensors, checkpoint.safetensors
      samples.safetensors   inputs of the student over training, by step
      figures/*.png
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from abdlab.checkpoint import load_model, load_state, read_card, save_model, save_state, write_atomically
from abdlab.data import Dataset
from abdlab.defenses import Defense
from abdlab.distill import Step, distill
from abdlab.presets import Settings
from abdlab.train import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: set by whoever runs a notebook without a browser: progress bars become lines on the terminal
HEADLESS = "ABDLAB_HEADLESS"


class WeakTeacher(UserWarning):
    """The teacher is too weak for an experiment: its backdoor or its accuracy is poor."""


class Run:
    """One folder of results; every file in it is written atomically.

    Args:
        path: the folder, made when missing.
        config: plain values, written to config.json when given.

    Raises:
        ValueError: when the folder cannot be written to.
    """

    def __init__(self, path: str | Path, config: dict | None = None):
        self.path = Path(path)
        try:
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
            if config is not None:
                self._write("config.json", config)
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror or error}; choose another folder") from error

    def file(self, name: str) -> Path:
        """The path of a file in the folder, whether it exists or not."""
        return self.path / name

    @property
    def config(self) -> dict:
        """What config.json holds; empty when there is none."""
        return self._read("config.json")

    @property
    def metrics(self) -> dict:
        """What metrics.json holds; empty when there is none."""
        return self._read("metrics.json")

    def save_metrics(self, metrics: dict) -> Path:
        """Write metrics.json, whole."""
        return self._write("metrics.json", metrics)

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Write figures/NAME.png (150 dpi)."""
        import io

        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, bbox_inches="tight")
        return write_atomically(self.file(f"figures/{name}.png"), buffer.getvalue())

    def history(self) -> pd.DataFrame:
        """history.jsonl as a table, one row per reported step; empty when there is none."""
        path = self.file("history.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines])

    def samples(self) -> dict[int, Tensor]:
        """Images (N, C, H, W) that the student learnt from, by step."""
        path = self.file("samples.safetensors")
        return load_state(path)[0] if path.exists() else {}

    def watch(self, stream: Iterable[Step], label: str, every: int = 10) -> Step:
        """Consume a stream with a progress bar; keep its history and samples in the folder; return the last Step.

        A stream that resumes replaces the lines of the steps that it repeats. Ctrl-C closes the stream, which saves its
        checkpoint, and goes on upwards.

        Args:
            label: stands before the bar and in the history's column "label".
            every: report each so-many-th step, besides those with an exam or an event.
        """
        rows, shown, step = None, self.samples(), None
        for step in progress(stream, label):
            if rows is None:
                rows = [r for r in self.history().to_dict("records") if not (r["label"] == label and r["step"] >= step.index)]
            if step.images is not None:
                shown[step.index] = step.images
            if step.events or step.acc is not None or step.index % every == 0 or step.index == step.total:
                row = {"label": label, "step": step.index, "seconds": round(step.seconds, 2), **step.losses}
                row |= {"acc": step.acc, "asr": step.asr, "events": list(step.events)}
                rows.append({k: v for k, v in row.items() if v is not None and v != []})
        if step is None:
            raise ValueError(f"{label}: there was nothing left to do; its checkpoint is already at the end")
        text = "".join(json.dumps({k: v for k, v in row.items() if not _missing(v)}) + "\n" for row in rows)
        write_atomically(self.file("history.jsonl"), text.encode())
        if shown:
            save_state(self.file("samples.safetensors"), shown, {"kind": "state"})
        return step

    def _read(self, name: str) -> dict:
        path = self.file(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, value: dict) -> Path:
        return write_atomically(self.file(name), (json.dumps(value, indent=2, default=str) + "\n").encode())


def progress(stream: Iterable[Step], label: str) -> Iterator[Step]:
    """The stream, with a tqdm bar: a widget in JupyterLab, a line on the terminal elsewhere. Events are printed."""
    if os.environ.get(HEADLESS):
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    bar, last = None, {}
    try:
        for step in stream:
            if bar is None:
                bar = tqdm(total=step.total, initial=step.index - 1, desc=label, mininterval=0.5, unit="step", dynamic_ncols=True)
            for event in step.events:
                bar.write(f"{label}: {event}")
            if step.acc is not None:
                last = {"ACC": f"{step.acc:.1%}"} | ({} if step.asr is None else {"ASR": f"{step.asr:.1%}"})
                bar.set_postfix(last, refresh=False)
            bar.update()
            yield step
    finally:
        if bar is not None:
            bar.close()
        if hasattr(stream, "close"):
            stream.close()


def poisoned_teacher(run: Run, chosen: Settings, data: Dataset) -> nn.Module:
    """Train the poisoned teacher of ``chosen``, or load it when the run's folder has it already.

    Writes teacher.safetensors; its card holds the attack and the measured ACC and ASR.

    Warns:
        WeakTeacher: before any distillation, when ASR is under 90 % or ACC is poor (under three quarters).
    """
    path = run.file("teacher.safetensors")
    attack = {"trigger": chosen.trigger.card(), "target": chosen.target}
    if not path.exists():
        model = chosen.teacher(data)
        poisoned = chosen.poison(data)
        stream = train(model, poisoned.images, poisoned.labels, exam=chosen.exam(data), **chosen.training(data))
        last = run.watch(stream, "teacher", every=1)
        card = {"attack": {**attack, "rate": poisoned.rate}, "acc": last.acc, "asr": last.asr, "config": chosen.config()}
        save_model(path, model, card)
    model = load_model(path, device=data.train_images.device)
    card = read_card(path)
    if card.get("attack", {}).get("trigger") != json.loads(json.dumps(attack["trigger"])) or card["attack"]["target"] != chosen.target:
        raise ValueError(f"{path} was poisoned with {card.get('attack')}, not with {attack}: choose another output folder, or the same attack")
    check_teacher(card["acc"], card["asr"])
    return model


def check_teacher(acc: float, asr: float) -> None:
    """Warn when a teacher is no use for an experiment on backdoors: ASR under .9, or ACC under .75 (shares)."""
    if asr < 0.9:
        warnings.warn(f"the teacher's ASR is {asr:.1%}, under 90 %: its backdoor is weak (longer training, a higher poison rate or a stronger trigger)", WeakTeacher, stacklevel=3)
    if acc < 0.75:
        warnings.warn(f"the teacher's ACC is {acc:.1%}, under 75 %: a student cannot be better (longer training, or a lower poison rate)", WeakTeacher, stacklevel=3)


def distilled(
    run: Run,
    chosen: Settings,
    data: Dataset,
    teacher: nn.Module,
    *,
    source: str = "zskt",
    defenses: Iterable[str] = (),
    exams: int = 10,
    resume_from: str | Path | None = None,
    label: str | None = None,
) -> tuple[nn.Module, dict]:
    """Distil into a fresh student, or go on with the run folder's checkpoint; write student.safetensors and metrics.json.

    Args:
        source, defenses: by name, with the settings of ``chosen``.
        exams: how many times ACC and ASR are measured (and samples kept) over the run.
        resume_from: a checkpoint of another run to branch from.

    Returns:
        the student in eval mode, and the metrics: acc, asr, seconds, and a report per defence.
    """
    names = list(defenses)
    label = label or "+".join([source, *names])
    student, src, active = chosen.student(data), chosen.source(source, data), chosen.defenses(*names)
    path = run.file("student.safetensors")
    if path.exists() and run.metrics.get("label") == label:
        return load_model(path, device=data.train_images.device), run.metrics
    every = max(1, len(src) // max(1, exams))
    stream = distill(
        teacher,
        student,
        src,
        defenses=active,
        exam=chosen.exam(data),
        exam_every=every,
        images_every=every,
        checkpoint=run.file("checkpoint.safetensors"),
        checkpoint_every=every,
        resume_from=resume_from,
        seed=chosen.seed,
        device=chosen.device,
        card={"config": chosen.config(), "label": label},
    )
    last = run.watch(stream, label)
    metrics = {"label": label, "source": source, "seed": chosen.seed, "acc": last.acc, "asr": last.asr}
    metrics |= {"seconds": round(last.seconds, 1), "defenses": reports(active)}
    save_model(path, student, {"acc": last.acc, "asr": last.asr, "label": label, "config": chosen.config()})
    run.save_metrics(metrics)
    return student, metrics


def reports(defenses: Iterable[Defense]) -> dict[str, dict]:
    """What each defence has to say of the run, by its name."""
    return {d.name: d.report() for d in defenses}


def table(root: str | Path) -> pd.DataFrame:
    """Every run below ``root`` as one row: its folder and the plain values of its metrics.json."""
    rows = []
    for path in sorted(Path(root).rglob("metrics.json")):
        values = json.loads(path.read_text())
        plain = {k: v for k, v in values.items() if isinstance(v, (str, int, float)) or v is None}
        rows.append({"run": str(path.parent.relative_to(root)), **plain})
    return pd.DataFrame(rows)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
