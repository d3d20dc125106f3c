"""A study: one notebook over a grid of parameters, resolved into jobs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from abdlab.batch import (
    as_notebook,
    check,
    check_parameters,
    find_notebook,
    parameters,
    parameters_of,
)
from abdlab.checkpoint import write_atomically
from abdlab.checks import check_overrides
from abdlab.errors import check_keys, short
from abdlab.home import at_home
from abdlab.objectives import OBJECTIVES
from abdlab.settings import settings
from abdlab.threads import threads as todays_threads
from abdlab.values import check_plain, fits

#: what a study's YAML file may say
KEYS = (
    "title",
    "notebook",
    "parameters",
    "grid",
    "zip",
    "list",
    "seeds",
    "exclude",
    "timeout",
    "retries",
    "threads",
)


#: more than these are rather a slip than a plan
MOST_JOBS = 10_000

#: seconds that a timer can wait for at most, and some
_WEEKS = 1e7

#: sections of the settings on which a poisoned teacher depends
TEACHER_SECTIONS = ("data", "attack", "teacher", *OBJECTIVES)


@dataclass(frozen=True)
class Job:
    """One run of one notebook.

    Attributes:
        folder: relative to the study's own, ends in ``key``.
        key: hash of the notebook's code, the parameters and abdlab's own code.
        parameters: of the notebook, checked, without ``run``.
        axes: what sets it apart in its study: axis name -> value.
        needs: keys of the teachers that it takes over.
    """

    folder: str
    key: str
    notebook: str
    parameters: dict[str, Any]
    axes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, for a person."""
        return Path(self.folder).name


@dataclass(frozen=True)
class Study:
    """Jobs, and the teachers that they share; ``notebooks`` holds the text of every
    notebook by name.

    Attributes:
        timeout: seconds per job, None is no limit. retries: of a job whose kernel or
            worker died.
        threads: that a job computes with, so that numbers do not depend on how many
            jobs run side by side; by default that of :func:`abdlab.threads.threads`.
    """

    title: str
    jobs: tuple[Job, ...]
    teachers: tuple[Job, ...]
    notebooks: dict[str, str]
    axes: dict[str, list]
    timeout: float | None = None
    retries: int = 2
    threads: int = 1

    @property
    def all_jobs(self) -> tuple[Job, ...]:
        """Teachers first."""
        return (*self.teachers, *self.jobs)


class _Loader(yaml.SafeLoader):
    """YAML's plain values, with what misleads mended.

    1e-3, as everybody writes it, is a number, which YAML 1.1 takes for a text. A date
    is a text, and so are a notebook and a title, however they look (05, 2026-11-26). A
    key that stands twice is an error, where YAML lets the last one win.
    """

    def get_single_data(self) -> Any:
        """The file's one document; its notebook and title as they are written."""
        node = self.get_single_node()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            plain = isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null"
            if plain and getattr(key, "value", None) in ("notebook", "title"):
                value.tag = "tag:yaml.org,2002:str"
        return None if node is None else self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name, line = key.value, key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                name = self.construct_object(key)
                if name in seen:
                    raise ValueError(
                        f"line {line}: {short(name)} stands twice, first in line {seen[name]}: keep"
                        " one"
                    )
                seen[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def read_study(path: str | Path) -> Study:
    """A study from a YAML file.

    Its keys: ``notebook`` (a name or a path), ``parameters`` of all jobs, and axes:
    ``grid`` (every combination of the values of several names), ``zip`` (values of
    several names in step), ``list`` (whole sets of parameters), ``seeds``; ``exclude``
    (sets of values: a job that has all of one set is left out; a list stands for any of
    its values); ``title``, ``timeout`` (seconds per job), ``retries``, ``threads``. A
    name with a dot is a setting and goes to the notebook's ``overrides``; any other is
    one of the notebook's parameters.

    Raises:
        ValueError: for a name, type, preset or axis that is wrong, before anything is
            started.
        FileNotFoundError: when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no study {path}: a study is a YAML file, see notebooks/studies"
        )
    try:
        given = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}, {error}") from None
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} must hold keys and values ({', '.join(KEYS)}), not {type(given).__name__}"
        )
    check_keys(f"key of {path.name}", given, KEYS)
    if "notebook" not in given:
        raise ValueError(
            f"{path.name} does not say which notebook to run: add, for example, notebook:"
            " 02_distillation"
        )
    notebook = given["notebook"]
    if not isinstance(notebook, str):
        raise ValueError(f"notebook is a name or a path, not {short(notebook)}")
    with suppress(OSError, ValueError):  # a name that no file can have
        notebook = path.parent / notebook if (path.parent / notebook).is_file() else notebook
    notebook = find_notebook(notebook)
    return make_study(
        notebook, **{k: v for k, v in given.items() if k != "notebook"}, default_title=path.stem
    )


def make_study(
    notebook: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence] | None = None,
    zip: Mapping[str, Sequence] | None = None,
    list: Sequence[Mapping] | None = None,
    seeds: Sequence[int] | None = None,
    exclude: Sequence[Mapping] | None = None,
    title: str | None = None,
    timeout: float | None = None,
    retries: int = 2,
    threads: int | None = None,
    default_title: str = "study",
) -> Study:
    """The same from Python, see :func:`read_study`."""
    path = find_notebook(notebook)
    text = path.read_text()
    known = parameters_of(as_notebook(path.name, text))
    if timeout is not None and not (fits(timeout, float) and 0 < timeout < _WEEKS):
        raise ValueError(f"timeout is seconds above 0 per job, not {short(timeout)}")
    if title is not None and not isinstance(title, str | int | float | date):
        raise ValueError(f"title is a text, not {short(title)}")
    threads = todays_threads() if threads is None else threads
    for name, value, least in (("retries", retries, 0), ("threads", threads, 1)):
        if type(value) is not int or not least <= value < 10_000:
            raise ValueError(f"{name} is a whole number of at least {least}, not {short(value)}")
    base = _mapping("parameters", parameters)
    choices, axes = [], {}
    for name, values in _mapping("grid", grid).items():
        choices.append([{name: value} for value in _axis(f"grid.{name}", values)])
    in_step = {name: _axis(f"zip.{name}", values) for name, values in _mapping("zip", zip).items()}
    if in_step:
        lengths = {name: len(values) for name, values in in_step.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{n} has {k}" for n, k in lengths.items())
            raise ValueError(f"the axes of zip go in step and need as many values each: {told}")
        choices.append([dict(_pairs(in_step, i)) for i in range(len(next(iter(in_step.values()))))])
    if list is not None:
        choices.append([_mapping("an entry of list", entry) for entry in _axis("list", list)])
    if seeds is not None:
        if not {"seed", "seeds"} & known.keys():
            raise ValueError(f"{path.stem} has no parameter seed or seeds: leave seeds out")
        one = "seed" in known
        choices.append([{"seed": s} if one else {"seeds": [s]} for s in _axis("seeds", seeds)])
    jobs, teachers, out = {}, {}, [_mapping("an entry of exclude", e) for e in _excluded(exclude)]
    named = {name for group in choices for entry in group for name in entry}
    for entry in out:
        check_keys("name in exclude", entry, {*named, *base})
    count = math.prod(len(group) for group in choices)
    if count > MOST_JOBS:
        raise ValueError(f"the axes make {count:,} jobs, and a study has at most {MOST_JOBS:,}")
    for parts in itertools.product(*choices):
        names = [name for part in parts for name in part]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"{twice} is set by two axes: keep it in one")
        chosen = {name: value for part in parts for name, value in part.items()}
        if any(
            all(_matches({**base, **chosen}.get(k), v) for k, v in entry.items()) for entry in out
        ):
            continue
        checked = _checked(path, {**base, **chosen}, known)
        needs = []
        for teacher in _teachers(path, checked, known):
            teachers.setdefault(teacher.key, teacher)
            needs.append(teacher.key)
        key = _key(text, checked)
        jobs.setdefault(
            key, Job(f"jobs/{_slug(chosen)}-{key}", key, path.stem, checked, chosen, tuple(needs))
        )
        for name, value in chosen.items():
            if value not in axes.setdefault(name, []):
                axes[name].append(value)
    if not jobs:
        raise ValueError("the study has no jobs: every combination is excluded")
    texts = {path.stem: text}
    if teachers:
        texts["01_poisoning"] = find_notebook("01_poisoning").read_text()
    return Study(
        default_title if title is None else str(title),
        tuple(jobs.values()),
        tuple(teachers.values()),
        texts,
        axes,
        timeout,
        retries,
        threads,
    )


def write_study(study: Study, out: str | Path) -> None:
    """Make the folder and its study.json. Raises ValueError when that cannot be done,
    or less than 50 MB are free.
    """
    out = at_home(out)
    content = {
        "title": study.title,
        "axes": study.axes,
        "teachers": [vars(job) for job in study.teachers],
        "jobs": [vars(job) for job in study.jobs],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < 50e6:
            raise ValueError(
                f"only {free / 1e6:.0f} MB are free on the disk of {out}: make room, or choose"
                " another folder"
            )
        write_atomically(out / "study.json", (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror or error}; choose another folder"
        ) from error


def open_study(out: str | Path) -> Study:
    """The study that a folder holds, without its notebooks' texts. Raises ValueError
    when it holds none.
    """
    path = at_home(out) / "study.json"
    if not path.is_file():
        raise ValueError(
            f"{out} holds no study (no study.json): run abdlab sweep STUDY.yaml --out {out} first"
        )
    content = json.loads(path.read_text())
    jobs, teachers = (
        tuple(Job(**{**job, "needs": tuple(job["needs"])}) for job in content[part])
        for part in ("jobs", "teachers")
    )
    return Study(content["title"], jobs, teachers, {}, content["axes"])


def _teachers(path: Path, given: Mapping[str, Any], known: Mapping[str, dict]) -> list[Job]:
    """The poisoned teachers that a job of this notebook will look for, as runs of
    01_poisoning.
    """
    own = parameters(find_notebook("01_poisoning"))
    common = {"run", "preset", "seed", "device", "overrides"}
    if (
        path.stem == "01_poisoning"
        or not {"run", "preset", "overrides"} <= known.keys()
        or given.keys() & (own.keys() - common)
    ):
        return []
    full = {name: given.get(name, known[name]["default"]) for name in known}
    overrides = {k: v for k, v in full["overrides"].items() if k.split(".")[0] in TEACHER_SECTIONS}
    out = []
    for seed in full.get("seeds", [full.get("seed", 0)]):
        values = {
            "preset": full["preset"],
            "seed": seed,
            "device": full.get("device", "auto"),
            "overrides": overrides,
        }
        key = _key(find_notebook("01_poisoning").read_text(), values)
        trigger = settings(full["preset"], overrides).values["attack"]["trigger"]
        axes = {"attack.trigger": trigger, "seed": seed}
        out.append(Job(f"teachers/{_slug(axes)}-{key}", key, "01_poisoning", values, axes))
    return out


def _checked(path: Path, given: Mapping[str, Any], known: Mapping[str, dict]) -> dict[str, Any]:
    """The notebook's parameters, with dotted names moved into ``overrides`` and
    everything checked.
    """
    if "run" in given:
        raise ValueError(
            "run is set by the sweep, which gives every job a folder of its own: leave it out, and"
            " use --out"
        )
    dotted = {name: value for name, value in given.items() if "." in name}
    plain = {name: value for name, value in given.items() if "." not in name}
    if dotted and "overrides" not in known:
        raise ValueError(
            f"{next(iter(dotted))} is a setting, but {path.stem} has no parameter overrides to"
            " take it"
        )
    checked = check_parameters(path, plain, known)
    if "overrides" in known and (dotted or "overrides" in checked):
        together = {
            **known["overrides"]["default"],
            **checked.get("overrides", {}),
            **dotted,
        }
        # "preset" is what a setting is without being named: the same job
        checked["overrides"] = {k: v for k, v in together.items() if v != "preset"}
        check_overrides(checked["overrides"])
    return check(path, checked, known)


def _key(notebook: str, values: Mapping[str, Any]) -> str:
    cells = ["".join(cell["source"]) for cell in json.loads(notebook)["cells"]]
    return hashlib.sha256(
        json.dumps([cells, values, code_version()], sort_keys=True).encode()
    ).hexdigest()[:10]


@cache
def code_version() -> str:
    """A hash of abdlab's own source files: jobs of other code are other jobs."""
    here, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        total.update(str(path.relative_to(here)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _slug(values: Mapping[str, Any]) -> str:
    """File-name text for a job's axes, at most 80 characters."""
    words = []
    for name, value in values.items():
        short = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words.append(f"{name.rsplit('.', 1)[-1]}={short or 'none'}")
    return re.sub(r"[^\w=+.,-]+", "_", ",".join(words))[:80].strip("_.,") or "job"


def _excluded(entries: Any) -> Sequence:
    if entries is not None and not isinstance(entries, (list, tuple)):
        raise ValueError(f"exclude is a list of names and values, not {short(entries)}")
    return entries or []


def _axis(name: str, values: Any) -> list:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"the axis {name} is a list of values, not {short(values)}")
    check_plain(f"the axis {name}", values)
    if not values:
        raise ValueError(f"the axis {name} is empty: give at least one value, or leave it out")
    return [*values]


def _mapping(what: str, value: Any) -> dict:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} holds names and values, not {short(value)}")
    check_plain(what, value)
    return {str(k): v for k, v in value.items()}


def _pairs(in_step: Mapping[str, Sequence], i: int) -> Iterator[tuple[str, Any]]:
    return ((name, values[i]) for name, values in in_step.items())


def _matches(value: Any, wanted: Any) -> bool:
    return value == wanted or (
        isinstance(wanted, (list, tuple))
        and not isinstance(value, (list, tuple))
        and value in wanted
    )
