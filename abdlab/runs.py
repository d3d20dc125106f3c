"""A run's folder: config, history, metrics, samples, figures; and many runs as one
table.

::

    runs/demo/                     one root: notebooks that name it share what is in it
      seed0/teacher/               one folder per seed and model: teacher, clean, zskt, zskt+sv, ...
        config.json                the settings that the model depends on
        history.jsonl              one line per reported Step
        metrics.json               the numbers that the run ended with
        confusion.json             what the model answers, class by class, also with a trigger
        teacher.safetensors        or student.safetensors, and the run's checkpoint.safetensors
        samples.safetensors        inputs of the student over training, by step
      seed0/clean_teacher/         the same network on clean data, to optimise an attack against
      seed0/trigger/*.json         optimised triggers, each with what it was made from
      02_distillation/             one folder per notebook: metrics.json and figures/*.png
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from abdlab.checkpoint import load_state, save_state, write_atomically
from abdlab.data import Dataset
from abdlab.home import at_home
from abdlab.labels import Label
from abdlab.owned import file_stamp
from abdlab.settings import Settings
from abdlab.stream import Step, progress
from abdlab.threads import check_same, threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from abdlab.evaluate import Details


class Run:
    """One folder of results; every file in it is written atomically.

    Args:
        path: the folder, made when missing; a relative one lies below
            :func:`abdlab.home.home`.
        config: plain values, written to config.json when given. A run that is there
            already keeps its number of threads.

    Raises:
        ValueError: when the folder cannot be written to, or holds a run with another
            config.

    Warns:
        ThreadsDiffer: when only the number of threads is another.
    """

    def __init__(self, path: str | Path, config: dict | None = None):
        self.path = at_home(path)
        try:
            if config is not None:
                config = self._check(json.loads(json.dumps(config)))
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
            if config is not None:
                self._write("config.json", config)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path}: {error.strerror or error}; choose another folder"
            ) from error

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

    @property
    def threads(self) -> int:
        """What this run computes with: the number that it began with, or today's
        :func:`abdlab.threads.threads` where none is recorded.
        """
        return self.config.get("threads") or threads()

    def save_config(self, config: dict) -> Path:
        """Write config.json, whole: only for what became of a run's settings while it
        went on.
        """
        return self._write("config.json", config)

    def save_metrics(self, metrics: dict) -> Path:
        """Write metrics.json, whole."""
        return self._write("metrics.json", metrics)

    def save_details(self, details: Details | None, classes: Sequence[str]) -> dict:
        """Write confusion.json; returns what metrics.json says of it: robust (of several
        attacks each, too) and per_class. Nothing where nothing is known.
        """
        if details is None:
            return {}
        counts = json.dumps({"classes": [*classes], **details.card()})
        write_atomically(self.file("confusion.json"), f"{counts}\n".encode())
        return {**details.robust, "per_class": details.per_class}

    @property
    def confusion(self) -> dict:
        """What confusion.json holds: classes (names), clean, and triggered by attack,
        counts of true classes (rows) by predicted ones; empty when there is none.
        """
        return self._read("confusion.json")

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Write figures/NAME.png (150 dpi). pyplot forgets the figure, so that a
        notebook which returns it shows it once.
        """
        from matplotlib import pyplot

        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        return write_atomically(self.file(f"figures/{name}.png"), buffer.getvalue())

    def history(self) -> pd.DataFrame:
        """history.jsonl as a table, one row per reported step; empty when there is
        none.
        """
        path = self.file("history.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines])

    def samples(self) -> dict[int, Tensor]:
        """Images (N, C, H, W) that the student learnt from, by step."""
        path = self.file("samples.safetensors")
        return load_state(path)[0] if path.exists() else {}

    def watch(
        self,
        stream: Iterable[Step],
        label: str,
        every: int = 10,
        tell: Callable[[str, Step], None] | None = None,
    ) -> Step:
        """Consume a stream with a progress bar; keep its history and samples in the
        folder, see :meth:`keep`; return the last Step.

        An interrupt closes the stream, which saves its checkpoint, keeps the history so
        far, and goes on upwards.

        Args:
            label: stands before the bar and in the history's column "label".
            every: report each so-many-th step, besides those with an exam or an event.
            tell: called with label and Step instead of drawing a bar.
        """
        with closing(self.keep(progress(stream, label, tell), label, every)) as steps:
            last = deque(steps, maxlen=1)
        if not last:
            raise ValueError(f"{label}: the stream had no steps")
        return last.pop()

    def keep(self, stream: Iterable[Step], label: str, every: int = 10) -> Iterator[Step]:
        """The stream, while its history and samples are kept in the folder, at the
        latest when it ends or is closed.

        A stream that resumes replaces the lines of the steps that it repeats. Arguments
        are those of :meth:`watch`.
        """
        rows, shown = None, self.samples()

        def keep() -> None:
            lines = (json.dumps({k: v for k, v in row.items() if not _missing(v)}) for row in rows)
            write_atomically(
                self.file("history.jsonl"), "".join(f"{line}\n" for line in lines).encode()
            )
            if shown:
                save_state(self.file("samples.safetensors"), shown)

        try:
            for step in stream:
                if rows is None:
                    rows = [
                        r
                        for r in self.history().to_dict("records")
                        if not (r["label"] == label and r["step"] >= step.index)
                    ]
                if step.images is not None:
                    shown[step.index] = step.images
                if (
                    step.events
                    or step.acc is not None
                    or step.index % every == 0
                    or step.index == step.total
                ):
                    rows.append(
                        {
                            "label": label,
                            "step": step.index,
                            "seconds": round(step.seconds, 2),
                            **step.losses,
                        }
                    )
                    rows[-1] |= {
                        "acc": step.acc,
                        "asr": step.asr,
                        "events": list(step.events) or None,
                    }
                if step.acc is not None:
                    keep()  # what a killed run leaves behind
                yield step
        finally:
            if hasattr(stream, "close"):
                stream.close()
            if rows:
                keep()

    def _check(self, config: dict) -> dict:
        """A folder's results belong to one config: going on with another would mix
        them. Returns the given one with the folder's own number of threads.
        """
        there = self.config
        for section, value in there.items():
            if section in ("preset", "threads") or config.get(section) == value:
                continue
            if isinstance(value, dict) and isinstance(config.get(section), dict):
                keys = [
                    k
                    for k in {**value, **config[section]}
                    if value.get(k) != config[section].get(k)
                ]
                differ = ", ".join(
                    f"{section}.{k} was {_short(value.get(k))} and is"
                    f" {_short(config[section].get(k))}"
                    for k in keys
                )
            else:
                differ = f"{section} was {_short(value)} and is {_short(config.get(section))}"
            raise ValueError(
                f"{self.path} holds a run with other settings ({differ}): choose another folder, or"
                " delete that one"
            )
        if there and "threads" in config:
            made_with = there.get("threads")  # older folders do not say
            check_same(self.path, made_with or config["threads"], config["threads"])
            config = {k: v for k, v in config.items() if k != "threads"}
            config |= {"threads": made_with} if made_with else {}
        return config

    def _read(self, name: str) -> dict:
        path = self.file(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, value: dict) -> Path:
        return write_atomically(
            self.file(name), (json.dumps(value, indent=2, default=str) + "\n").encode()
        )


def refuse_other_settings(path: str | Path, config: dict) -> None:
    """Raise ValueError where a folder holds a run with another config, see :class:`Run`;
    nothing is written, and the number of threads is not looked at.
    """
    if (at_home(path) / "config.json").exists():
        plain = json.loads(json.dumps(config))
        Run(path)._check({key: plain[key] for key in plain if key != "threads"})


def config_of(chosen: Settings, data: Dataset, *sections: str) -> dict:
    """What a run's config.json records: the sections that it depends on, and the classes
    of its data, so that a folder of images that gained or lost one is noticed, the number
    of threads that it is computed with, and the SHA-256 of a teacher's file.
    """
    weights = {"weights": file_stamp(chosen.opened)} if chosen.opened else {}
    made = {"classes": [*data.classes], "threads": threads()}
    return {**chosen.config(*sections), **made, **weights}


def folder_of(root: str | Path, seed: int, label: str | Label) -> Path:
    """The folder of a method's run, or of the teacher's, below a root."""
    return Path(root) / f"seed{seed}" / Label.parse(label).folder


def is_measured(root: str | Path, seed: int, label: str | Label) -> bool:
    """Whether a method's metrics lie in its folder, of a run that was not stopped. Nothing
    is made there.
    """
    metrics = folder_of(at_home(root), seed, label) / "metrics.json"
    return metrics.exists() and "stopped_at" not in metrics.read_text()


def history(root: str | Path, chosen: Settings, labels: Iterable[str]) -> pd.DataFrame:
    """The histories of several methods below one root as one table."""
    return pd.concat(
        [Run(folder_of(root, chosen.seed, label)).history() for label in labels],
        ignore_index=True,
    )


def table(root: str | Path) -> pd.DataFrame:
    """Every run below ``root`` as one row: its folder and the plain values of its
    metrics.json ("threads" among them, which older runs do not say).
    """
    root, rows = at_home(root), []
    for path in sorted(root.rglob("metrics.json")):
        values = json.loads(path.read_text())
        plain = {k: v for k, v in values.items() if isinstance(v, (str, int, float)) or v is None}
        rows.append({"run": str(path.parent.relative_to(root)), **plain})
    return pd.DataFrame(rows)


def _short(value: Any) -> str:
    """A value as an error message quotes it: a pattern's kilobytes help nobody."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}... ({len(text)} characters)"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
