"""A queue: one method with several values of a setting, over seeds, one after another."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w
import pandas as pd
import traitlets as t

from abdlab.home import at_home
from abdlab.labels import Label, name_of
from abdlab.methods import methods
from abdlab.presets import METHOD
from abdlab.settings import Settings, defaults, settings
from abdlab.studies import Study, make_study, sweep
from abdlab.studies.engines import LocalEngine, default_slots
from abdlab.values import read
from abdlab.widgets import looks
from abdlab.widgets.worker import Stopped

#: the notebook that a job runs: it distils the methods that it is given, and no others
NOTEBOOK = "05_abd_ablation"
#: folder below the root that queues go to
QUEUES = "queues"
_COLUMNS = ["job", "state", "seconds", "ACC (%)", "ASR (%)"]


class Queue(w.VBox):
    """A method with these values of one setting, over these seeds, one run after another.

    It is a study (:mod:`abdlab.studies`) on this machine: each run is a process of its
    own, and its numbers are those of ``abdlab sweep``. What is done is not done again, so
    that a queue that was stopped, or got more values, goes on.

    >>> import tempfile
    >>> queue = Queue(tempfile.mkdtemp(), label="zskt+sv")
    >>> queue.setting.value, queue.values.value = "sv.alpha", "0.01, 0.1, 0.5"
    >>> queue.seeds.value = "0, 1"
    >>> len(queue.study().jobs)
    6

    Args:
        root: the folder of results; a queue goes to ROOT/queues/METHOD-SETTING.
        chosen: called for the experiment as it stands when the queue begins; by default
            the first preset.
        label: the method to begin with.

    Traits:
        state: "idle", "running", "stopping", "done", "stopped", "failed".
    """

    state = t.Unicode("idle")

    def __init__(
        self,
        root: str | Path = "runs/walk",
        chosen: Callable[[], Settings] = settings,
        label: str = METHOD,
    ):
        self.root, self._chosen = at_home(root), chosen
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.trouble, self.status = looks.Trouble(), looks.said("", "quiet")
        beside = {"style": {"description_width": "auto"}, "layout": w.Layout(width="250px")}
        options = [(name_of(each), each) for each in methods(label)]
        self.method = w.Dropdown(options=options, value=label, description="method", **beside)
        self.setting = w.Combobox(
            description="setting",
            placeholder="such as sv.alpha",
            tooltip="one setting by its dotted name; the others stand as in the tuner",
            **beside,
        )
        self.values = w.Text(description="values", placeholder="such as 0.01, 0.1, 0.5", **beside)
        self.seeds = w.Text("0", description="seeds", placeholder="such as 0, 1, 2", **beside)
        self.at_once = w.BoundedIntText(
            1,
            min=1,
            max=default_slots(),
            description="at a time",
            tooltip="runs side by side, each with one core",
            style={"description_width": "auto"},
            layout=w.Layout(width="130px"),
        )
        self.rows = looks.Rows(columns=_COLUMNS, most=0)
        self.rows.layout.display = "none"

        def heard(do: Callable[[], Any]) -> Callable[..., None]:
            return looks.telling(self.trouble, do)

        self.start_button = looks.button(
            "Start the queue", heard(self.start), "begin, or go on with what is not done"
        )
        self.stop_button = looks.button(
            "Stop the queue", heard(self.stop), "end its runs; what is done is kept"
        )
        self.stop_button.disabled = True
        head = looks.row(self.method, self.setting, self.values, self.seeds, self.at_once)
        doing = looks.row(self.start_button, self.stop_button, self.status, align_items="center")
        super().__init__([looks.card("Queue", self.trouble, head, doing, self.rows)])
        looks.dress(self)
        self.method.observe(heard(self._offer), "value")
        self.observe(heard(self._lock), "state")
        self._offer()

    def study(self) -> Study:
        """What the fields ask for.

        Raises:
            ValueError: for a field that is empty or wrong, and for all that would not
                run.
        """
        setting, values = self.setting.value.strip(), self.values.value.strip()
        if bool(setting) != bool(values):
            raise ValueError("a setting needs values, and values need a setting: fill in both")
        chosen = self._chosen()
        overrides = json.loads(json.dumps(chosen.overrides()))
        overrides.pop(setting, None)
        return make_study(
            NOTEBOOK,
            title=f"{self.method.value} over {setting or 'seeds'}",
            parameters={
                "preset": chosen.preset,
                "device": str(chosen.device),
                "methods": [self.method.value],
                "overrides": overrides,
            },
            grid={setting: _listed("values", values)} if setting else None,
            seeds=_listed("seeds", self.seeds.value),
        )

    @property
    def folder(self) -> Path:
        """Where the queue's runs go."""
        setting = self.setting.value.strip() or "seeds"
        return self.root / QUEUES / f"{Label.parse(self.method.value).folder}-{setting}"

    def start(self) -> None:
        """Begin, or go on with what is not done yet, in the background.

        Raises:
            ValueError: as :meth:`study` does.
        """
        if self._thread is not None and self._thread.is_alive():
            raise ValueError("the queue is under way: stop it first")
        self.trouble.error = None
        study, folder = self.study(), self.folder
        self._stop.clear()
        self.state = "running"
        looks.say(self.status, f"{len(study.jobs)} runs, into {folder}.")
        self._thread = threading.Thread(
            target=self._run, args=(study, folder), name="abdlab-queue", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the runs under way; those that are done stay."""
        if self.state == "running":
            self.state = "stopping"
            self._stop.set()

    def wait(self, seconds: float | None = None) -> None:
        """Stay here until the queue has ended, at most so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, study: Study, folder: Path) -> None:
        state = "failed"
        try:
            done = sweep(study, folder, LocalEngine(self.at_once.value, gpus=0), tell=self._tell)
            failed = done.loc[done["state"] == "failed"]
            state = "failed" if len(failed) else "done"
            if len(failed):
                self.trouble.error = f"{failed['name'].iloc[0]}: {failed['error'].iloc[0]}"
        except Stopped:
            state = "stopped"
        except Exception as error:
            self.trouble.error = error
        self.state = state

    def _tell(self, frame: pd.DataFrame, study: Study) -> None:
        """Show the jobs' states; called by the sweep, twice a second."""
        if self._stop.is_set():
            raise Stopped
        rows = [{"id": row["name"], "cells": _cells(row)} for row in frame.to_dict("records")]
        if rows != self.rows.rows:
            self.rows.rows, self.rows.layout.display = rows, ""
            done = (frame["state"] == "done").sum()
            looks.say(self.status, f"{done} of {len(frame)} done, teachers included.")

    def _offer(self) -> None:
        """Suggest the settings of the method's parts."""
        label = Label.parse(self.method.value)
        self.setting.options = [
            f"{part}.{key}"
            for part in (*label.defenses, label.source, *label.purifiers)
            for key, value in defaults(part).items()
            if isinstance(value, (int, float))
        ]

    def _lock(self) -> None:
        busy = self.state in ("running", "stopping")
        for control in (self.method, self.setting, self.values, self.seeds, self.at_once):
            control.disabled = busy
        self.start_button.disabled, self.stop_button.disabled = busy, self.state != "running"
        if self.state == "stopped":
            looks.say(self.status, "Stopped: Start goes on with what is not done.")


def _cells(row: dict[str, Any]) -> list[str]:
    def told(value: Any, scale: float, digits: int) -> str:
        return "" if value is None or value != value else f"{scale * value:.{digits}f}"

    numbers = [told(row["seconds"], 1, 0), *(told(row[key], 100, 1) for key in ("acc", "asr"))]
    return [row["name"], row["state"], *numbers]


def _listed(what: str, text: str) -> list:
    """The values that a field names.

    >>> _listed("values", "0.01, 1e-3, none")
    [0.01, 0.001, None]
    """
    try:
        found = read(f"[{text}]")
    except ValueError:
        found = None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{what} are numbers with commas between them, not {text!r}")
    return found
