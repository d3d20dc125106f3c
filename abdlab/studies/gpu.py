"""How many GPU-hours a study takes, from student steps per second that a GPU once did."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

from abdlab.batch import as_notebook, asked, notebooks, parameters_of
from abdlab.defenses import Late
from abdlab.distill import distill
from abdlab.labels import TEACHER, Label
from abdlab.settings import Settings, keyword_default
from abdlab.sources import SOURCES
from abdlab.studies.study import Job, Study
from abdlab.train import train

#: what was measured, beside the other results; one H100
SPEED = "gpu_speed.csv"
#: images that a measured step saw
_BATCH = 128
#: training images of the data sets that the paper has, which need not be here
_IMAGES = {"cifar10": 50_000, "gtsrb": 26_640}


def speeds() -> dict[tuple[str, str], float]:
    """(part of a run, way of computing) -> steps per second, measured."""
    folder = next(iter(notebooks().values())).parent / "studies" / "results"
    with (folder / SPEED).open(newline="") as file:
        return {(r["part"], r["setting"]): float(r["steps_per_s"]) for r in csv.DictReader(file)}


def gpu_hours(planned: Study, jobs: Sequence[Job]) -> str:
    """A sentence on the GPU-hours of these jobs and their teachers; empty where none
    of them is of the paper's data sets, for which alone speed was measured.

    A step of another batch size counts by its images, and a step that makes images as a
    student's step. Defenses that begin late are as slow as SR was measured.
    """
    total, teachers, counted = 0.0, {}, 0
    for job in jobs:
        known = parameters_of(as_notebook(job.notebook, planned.notebooks[job.notebook]))
        if not {"preset", "overrides"} <= known.keys():
            continue
        chosen, labels = asked(known, job.parameters)
        if chosen.section("data").get("name") not in _IMAGES:
            continue
        seeds = len(job.parameters.get("seeds", [chosen.seed]))
        total += seeds * sum(student_seconds(chosen, label) for label in labels)
        teachers |= dict.fromkeys(job.needs, teacher_seconds(chosen))
        counted += 1
    if not counted:
        return ""
    hours = (total + sum(teachers.values())) / 3600
    return (
        f"about {hours:,.0f} GPU-hours for {counted} jobs and {len(teachers)} teachers, by steps"
        f" per second of WRN-16-1 under WRN-16-2 on one H100 (notebooks/studies/results/{SPEED});"
        " larger networks take longer"
    )


def student_seconds(chosen: Settings, label: str) -> float:
    """Of one student on the GPU that was measured."""
    method, pace = Label.parse(label), speeds()
    if method.source == TEACHER:
        return 0.0
    way = _way(chosen)
    source = _source(chosen, method.source)
    steps = source["length"] * source["student_steps"] * source["batch_size"] / _BATCH
    made = source["made"] * source["batch_size"] / _BATCH
    made_of = chosen.defenses(*method.defenses)
    late = [d.start_share for d in made_of if isinstance(d, Late)]
    share = 1 - min(late, default=1.0)
    usual = pace["plain", way]
    if len(method.defenses) > len(late):  # a vaccine
        usual *= pace["vaccine", "graphs, bf16"] / pace["plain", "graphs, bf16"]
    slow = min(usual, pace["late", "graphs, bf16"])
    return (steps * (1 - share) + made) / usual + steps * share / slow


def teacher_seconds(chosen: Settings) -> float:
    """Of one teacher, as one of five that were trained side by side."""
    options = chosen.section("teacher")
    epochs = options.get("epochs", keyword_default(train, "epochs"))
    batches = epochs * _IMAGES[chosen.section("data")["name"]] / _BATCH
    return batches / speeds()["teacher", "graphs, bf16"]


def _way(chosen: Settings) -> str:
    """How a study's students compute, as the measured rows call it."""
    options = chosen.section("student")
    graphs = options.get("graphs", keyword_default(distill, "graphs"))
    half = options.get("precision", keyword_default(distill, "precision")) == "bf16"
    return ", ".join([*["graphs"] * graphs, *["bf16"] * half]) or "eager"


def _source(chosen: Settings, name: str) -> Mapping[str, int]:
    """Length, student steps and batch of a source, and how many steps make its images."""
    kind = SOURCES.find(name)
    own = {key: keyword_default(kind, key) for key in [*kind.keys()]} | chosen.section(name)
    made, student_steps = 0, own.get("student_steps", getattr(kind, "student_steps", 1))
    if "kd_steps" in own:
        length = own["rounds"] * own["kd_steps"]
        made = (own["rounds"] + own.get("warmup", 0)) * own["synthesis_steps"]
    elif "pseudo_batches" in own:
        members = kind.depends_on(chosen.section(name))
        length = own["pseudo_batches"] or _source(chosen, members[0])["length"]
    else:
        images = own.get("patches") or own["share"] * _IMAGES[chosen.section("data")["name"]]
        length = own["epochs"] * int(images) // own["batch_size"]
    return {
        "length": length,
        "student_steps": student_steps,
        "batch_size": own.get("batch_size", _BATCH),
        "made": made,
    }
