"""How the tuner takes up a run that was chosen elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from abdlab.labels import TEACHER, name_of
from abdlab.runs import Run
from abdlab.settings import Settings
from abdlab.widgets.branches import Origin, method_of, origins, root_of, runs_in
from abdlab.widgets.controls import UNDER_WAY
from abdlab.widgets.defense_tuner import DefenseTuner

#: sections that a teacher depends on, and so the folder of its students
_SHARED = ("data", "attack", "teacher")


def take_up(tuner: DefenseTuner, folder: Path) -> str:
    """Let the tuner's next run go on with a run, or begin as it began; returns what that
    will be, as a sentence.

    A tuner's run that was stopped goes on. One that is done is branched off where it
    kept its latest checkpoint. Any other student's run (a notebook's, one below another
    root) lends its settings, and the next run begins from scratch with them.

    Raises:
        ValueError: while a run goes on, and for a folder that is no student's run.
    """
    if tuner.state in UNDER_WAY:
        raise ValueError("a run is under way: stop it first, then continue another one")
    config, label = Run(folder).config, method_of(folder.name)
    if "student" not in config or label.endswith(TEACHER):
        raise ValueError(f"{folder.name} is no student's run with settings: choose one that is")
    theirs = Settings.of(config, rest=tuner._chosen)
    shared = {section: theirs.values[section] for section in _SHARED}
    mine = replace(theirs, values={**tuner._chosen.values, **shared})
    own = root_of(tuner._top, mine) / f"seed{mine.seed}" / folder.name == folder
    places = origins(folder) if own and folder in runs_in(folder.parent) else []
    if theirs.values["data"] != tuner._chosen.values["data"]:
        tuner._data = None
    # where the run goes on, or is branched off, its own settings are found with it
    tuner._chosen, tuner.floor = mine if places else theirs, None
    tuner.controls.choose(label)
    here = next((place for place in places if not place.checkpoint), (places or [Origin()])[-1])
    tuner.find(here)
    begins = str(here) if places else f"begin from scratch with the settings of {folder.name}"
    said = f"The next run of {name_of(label)} (seed {mine.seed}) will {begins}: press Start."
    tuner.live.say(said)
    return said
