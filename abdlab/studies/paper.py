"""The paper's own numbers, and how ours compare with them, cell by cell.

A cell is a data set, a teacher's and a student's architecture, a trigger and a method.
The paper prints one number per cell, no spread, and disagrees with itself by up to 10
points of ASR. So "within" is a convention of ours, see :func:`verdict`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from abdlab.defenses import DEFENSES
from abdlab.home import at_home
from abdlab.labels import Label
from abdlab.presets import PRESETS
from abdlab.settings import defaults

#: where :data:`NUMBERS` are from
SOURCE = (
    "Hong et al., ICML 2023, arXiv 2306.02368, as collected (the numbers of its tables are not"
    " known)"
)

#: points of ACC and of ASR that ours may always differ by: the paper disagrees with
#: itself by up to 10 points of ASR
TOLERANCE = {"acc": 5.0, "asr": 10.0}

#: what tells one cell from another
CELL = ["data", "teacher", "student", "trigger", "method"]

# ACC and ASR in %. A teacher has no student. Methods are named as everywhere: a source
# and its defenses. ABD is sv+sr, but sv alone where the paper stops there (badnet_sq,
# sig, l2_inv and l0_inv). cmi and ood: undefended, then ABD; taken to be sv+sr, which
# the paper's rows do not say. ablation: a second run of the paper's own on some cells
# of main; badnet_grid, zskt differs by 9.1 points of ASR.
NUMBERS = """
part      data     teacher   student   trigger      method      acc    asr
main      cifar10  wrn-16-2  -         badnet_grid  teacher     92.1   99.9
main      cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt        71.9   96.9
main      cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt+sv+sr  68.3    0.7
main      cifar10  wrn-16-2  wrn-16-1  badnet_grid  clean       74.6    4.3
main      cifar10  wrn-16-2  -         trojan_wm    teacher     93.8  100.0
main      cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt        82.7   93.9
main      cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt+sv+sr  78.2   22.5
main      cifar10  wrn-16-2  wrn-16-1  trojan_wm    clean       77.5   11.1
main      cifar10  wrn-16-2  -         trojan_3x3   teacher     93.4   98.7
main      cifar10  wrn-16-2  wrn-16-1  trojan_3x3   zskt        80.9   96.8
main      cifar10  wrn-16-2  wrn-16-1  trojan_3x3   zskt+sv+sr  71.7   33.3
main      cifar10  wrn-16-2  wrn-16-1  trojan_3x3   clean       72.9    1.7
main      cifar10  wrn-16-2  -         blend        teacher     93.9   99.7
main      cifar10  wrn-16-2  wrn-16-1  blend        zskt        77.0   74.4
main      cifar10  wrn-16-2  wrn-16-1  blend        zskt+sv+sr  71.5   23.1
main      cifar10  wrn-16-2  wrn-16-1  blend        clean       78.0    4.3
main      cifar10  wrn-16-2  -         trojan_8x8   teacher     93.7   99.6
main      cifar10  wrn-16-2  wrn-16-1  trojan_8x8   zskt        80.5   57.2
main      cifar10  wrn-16-2  wrn-16-1  trojan_8x8   zskt+sv+sr  72.6   17.8
main      cifar10  wrn-16-2  wrn-16-1  trojan_8x8   clean       75.2    9.3
main      cifar10  wrn-16-2  -         badnet_sq    teacher     93.4   97.8
main      cifar10  wrn-16-2  wrn-16-1  badnet_sq    zskt        80.8   37.8
main      cifar10  wrn-16-2  wrn-16-1  badnet_sq    zskt+sv     77.9    1.9
main      cifar10  wrn-16-2  wrn-16-1  badnet_sq    clean       76.2    9.1
main      cifar10  wrn-16-2  -         cl           teacher     91.2   94.3
main      cifar10  wrn-16-2  wrn-16-1  cl           zskt        76.8   17.5
main      cifar10  wrn-16-2  wrn-16-1  cl           zskt+sv+sr  67.4   10.2
main      cifar10  wrn-16-2  wrn-16-1  cl           clean       69.4    2.1
main      cifar10  wrn-16-2  -         sig          teacher     90.5   97.3
main      cifar10  wrn-16-2  wrn-16-1  sig          zskt        77.9    0.0
main      cifar10  wrn-16-2  wrn-16-1  sig          zskt+sv     72.2    0.0
main      cifar10  wrn-16-2  wrn-16-1  sig          clean       77.4    0.0
main      cifar10  wrn-16-2  -         l2_inv       teacher     93.9  100.0
main      cifar10  wrn-16-2  wrn-16-1  l2_inv       zskt        82.0    0.3
main      cifar10  wrn-16-2  wrn-16-1  l2_inv       zskt+sv     70.7    1.9
main      cifar10  wrn-16-2  wrn-16-1  l2_inv       clean       77.2    1.2
main      cifar10  wrn-16-2  -         l0_inv       teacher     92.4   99.6
main      cifar10  wrn-16-2  wrn-16-1  l0_inv       zskt        72.8    8.3
main      cifar10  wrn-16-2  wrn-16-1  l0_inv       zskt+sv     69.4    0.0
main      cifar10  wrn-16-2  wrn-16-1  l0_inv       clean       79.2    3.7
gtsrb     gtsrb    wrn-16-2  -         badnet_grid  teacher     88.1   98.8
gtsrb     gtsrb    wrn-16-2  wrn-16-1  badnet_grid  zskt        87.0   99.5
gtsrb     gtsrb    wrn-16-2  wrn-16-1  badnet_grid  zskt+sv+sr  78.4   13.0
gtsrb     gtsrb    wrn-16-2  wrn-16-1  badnet_grid  clean       89.8    0.3
wrn-40-2  cifar10  wrn-40-2  -         badnet_grid  teacher     94.5  100.0
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  badnet_grid  zskt        84.2    4.6
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  badnet_grid  zskt+sv+sr  76.9   10.7
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  badnet_grid  clean       72.0    4.7
wrn-40-2  cifar10  wrn-40-2  -         trojan_wm    teacher     94.5  100.0
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  trojan_wm    zskt        87.6   54.5
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  trojan_wm    zskt+sv+sr  82.9    5.8
wrn-40-2  cifar10  wrn-40-2  wrn-16-1  trojan_wm    clean       71.2    5.3
cmi       cifar10  wrn-16-2  wrn-16-1  trojan_wm    cmi         89.1   99.0
cmi       cifar10  wrn-16-2  wrn-16-1  trojan_wm    cmi+sv+sr   79.8    8.0
cmi       cifar10  wrn-16-2  wrn-16-1  badnet_sq    cmi         88.3   95.9
cmi       cifar10  wrn-16-2  wrn-16-1  badnet_sq    cmi+sv+sr   83.2    6.0
ood       cifar10  wrn-16-2  wrn-16-1  trojan_wm    ood         82.3  100.0
ood       cifar10  wrn-16-2  wrn-16-1  trojan_wm    ood+sv+sr   62.3   21.8
ood       cifar10  wrn-16-2  wrn-16-1  badnet_grid  ood         79.8   99.6
ood       cifar10  wrn-16-2  wrn-16-1  badnet_grid  ood+sv+sr   78.2   14.5
ablation  cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt        70.7   87.8
ablation  cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt+sv     67.2    0.3
ablation  cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt+sr     68.3   76.2
ablation  cifar10  wrn-16-2  wrn-16-1  badnet_grid  zskt+sv+sr  68.3    0.7
ablation  cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt        82.7   93.9
ablation  cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt+sv     79.0   57.0
ablation  cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt+sr     79.7   44.1
ablation  cifar10  wrn-16-2  wrn-16-1  trojan_wm    zskt+sv+sr  78.2   22.5
"""

#: settings whose number says how long something was trained: below the paper's, a run
#: is shortened
_LENGTHS = frozenset(
    {
        "epochs",
        "pseudo_batches",
        "student_steps",
        "rounds",
        "synthesis_steps",
        "kd_steps",
        "patches",
    }
)
#: a folder of images whose classes have these names is CIFAR-10 to :func:`runs`,
#: whatever the folder is called
CIFAR10_CLASSES = {
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
}
#: settings that tell the cell
_ASIDE = frozenset({"data.name", "attack.trigger", "teacher.model", "student.model"})


def numbers() -> pd.DataFrame:
    """The paper's numbers, one row per printed number: part, :data:`CELL`, acc and asr
    in %.

    Equal numbers that the paper prints twice for one cell are one row; its part then
    names both places.
    """
    printed = pd.read_csv(io.StringIO(NUMBERS), sep=r"\s+")
    return printed.groupby([*CELL, "acc", "asr"], sort=False, as_index=False).agg(
        part=("part", ", ".join)
    )


def verdict(ours: float, std: float, paper: float, tolerance: float) -> str:
    """ "within" when ours and the paper's number differ by at most max(2 x our std,
     tolerance), else "above" or "below".

    Args:
        ours, paper: in %. std: sample standard deviation of ours, in points; NaN (one
            seed) counts as none.

    Returns:
        an empty text when there is nothing to compare.
    """
    if pd.isna(ours) or pd.isna(paper):
        return ""
    limit = max(tolerance, 0.0 if pd.isna(std) else 2 * std)
    if abs(ours - paper) <= limit + 1e-9:  # round-off: 71.9 - 66.9 is not quite 5
        return "within"
    return "above" if ours > paper else "below"


def runs(root: str | Path) -> pd.DataFrame:
    """Every finished run below ``root`` that has a config.json, one row each.

    Columns: run (its folder), :data:`CELL`, seed, acc and asr in %, settings (all that
    it depends on but the seed, as one text), shortened and changed (what differs from
    the paper's preset, as sentences' parts; None where no preset is known).

    Raises:
        ValueError: for a file that is no JSON.
    """
    rows = []
    root = at_home(root)
    for path in sorted(root.rglob("metrics.json")):
        metrics = _read(path)
        if metrics.get("acc") is None or not path.with_name("config.json").exists():
            continue  # a notebook's own folder
        config = _read(path.with_name("config.json"))
        cell = _cell(metrics.get("label") or path.parent.name, config)
        sections = {k: _filled(k, v) for k, v in config.items() if isinstance(v, dict)}
        shortened, changed = _deviations(cell, sections)
        rows.append(
            {
                "run": str(path.parent.relative_to(root)),
                **cell,
                "seed": config.get("seed", metrics.get("seed")),
                "acc": 100 * metrics["acc"],
                "asr": float("nan") if metrics.get("asr") is None else 100 * metrics["asr"],
                "settings": json.dumps(sections, sort_keys=True),
                "shortened": shortened,
                "changed": changed,
            }
        )
    return pd.DataFrame(rows)


def compare(root: str | Path) -> pd.DataFrame:
    """Ours over seeds beside the paper's number for the same cell.

    One row per cell, settings and number of the paper (which has two for some cells):
    :data:`CELL`, n (seeds), acc, acc_std, asr, asr_std (mean and sample standard
    deviation over seeds, in %), part, paper_acc, paper_asr (NaN for a cell that the
    paper has not), acc_is, asr_is (see :func:`verdict`), shortened, changed, runs
    (folders). A seed that was run more than once with equal settings counts once, with
    its mean; runs with other settings are never averaged.

    Raises:
        ValueError: for a file that is no JSON.
    """
    found = runs(root)
    if found.empty:
        return found
    key = [*CELL, "settings"]
    seeds = found.groupby([*key, "seed"], dropna=False)[["acc", "asr"]].mean().reset_index()
    scores = seeds.groupby(key, dropna=False).agg(
        n=("seed", "size"),
        acc=("acc", "mean"),
        acc_std=("acc", "std"),
        asr=("asr", "mean"),
        asr_std=("asr", "std"),
    )
    notes = found.groupby(key, dropna=False).agg(
        shortened=("shortened", "first"), changed=("changed", "first"), runs=("run", ", ".join)
    )
    printed = numbers().rename(columns={"acc": "paper_acc", "asr": "paper_asr"})
    both = (
        scores.join(notes)
        .reset_index()
        .merge(printed, on=CELL, how="left")
        .drop(columns="settings")
    )
    for kind, tolerance in TOLERANCE.items():
        columns = zip(both[kind], both[f"{kind}_std"], both[f"paper_{kind}"], strict=True)
        both[f"{kind}_is"] = [verdict(*values, tolerance) for values in columns]
    rank = both["method"].map({"teacher": 0, "clean": 1}).fillna(2)
    order = ["data", "trigger", "teacher", "rank", "student", "method"]
    return (
        both.assign(rank=rank)
        .sort_values(order, kind="stable", ignore_index=True)
        .drop(columns="rank")
    )


def preset_of(cell: Mapping[str, str]) -> str | None:
    """The preset with the settings behind the paper's numbers of a cell; None where
    there is none.
    """
    source = Label.parse(cell["method"]).source
    for name, values in PRESETS.items():
        same = (values["data"]["name"], values["teacher"]["model"]) == (
            cell["data"],
            cell["teacher"],
        )
        if name.startswith("paper/") and same and (source == "teacher" or source in values):
            return name
    return None


def _cell(label: str, config: Mapping[str, Any]) -> dict[str, str]:
    """:data:`CELL` of a run. A folder named cifar10 or gtsrb (or cifar10-...), or with
    CIFAR-10's classes, is taken for that data set; changed says so."""
    method = _method(label)
    section = {name: config.get(name) or {} for name in ("data", "attack", "teacher", "student")}
    name, attack = str(section["data"].get("name", "-")), section["attack"]
    folder = Path(name.removeprefix("folder:")).expanduser()
    stem = "cifar10" if _is_cifar10(folder) else folder.name.split("-")[0]
    return {
        "data": stem if stem in ("cifar10", "gtsrb") else name,
        "teacher": section["teacher"].get("model", "-"),
        "student": "-" if method.source == "teacher" else section["student"].get("model", "-"),
        "trigger": _name(attack.get("trigger", "-")),
        "method": str(method),
    }


def _method(text: str) -> Label:
    """A method with its defenses in the registry's order: acting together, they are one
    method in whatever order a label names them. A text that is no label is a source.
    """
    try:
        label = Label.parse(text)
    except ValueError:
        return Label(text)
    place = {name: i for i, name in enumerate(DEFENSES)}
    ordered = sorted(label.defenses, key=lambda name: (place.get(name, len(place)), name))
    return replace(label, defenses=tuple(ordered))


def _is_cifar10(folder: Path) -> bool:
    """Whether a ``folder:`` data set, if it is still there, has the classes of
    CIFAR-10.
    """
    train = folder / "train"
    return (
        train.is_dir()
        and {path.name for path in train.iterdir() if path.is_dir()} == CIFAR10_CLASSES
    )


def _name(trigger: str | Mapping[str, Any]) -> str:
    """A trigger's name; of a composed one's card "a+b"."""
    return (
        trigger
        if isinstance(trigger, str)
        else "+".join([trigger["name"], *map(_name, trigger.get("then", ()))])
    )


def _filled(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section with today's defaults, as JSON would have it, without where the data
    lie and what an attack optimised.

    An optimised trigger's pattern is another one for each seed: a result of the run,
    not a setting.
    """
    full = json.loads(
        json.dumps({**defaults(section), **values}),
        object_hook=lambda d: {k: d[k] for k in d if k != "pattern"},
    )
    return {k: v for k, v in full.items() if f"{section}.{k}" not in ("data.root", "data.download")}


def _deviations(
    cell: Mapping[str, str], sections: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, str | None]:
    """What of a run's settings is less than (shortened), or else differs from, the
    paper's.
    """
    preset = preset_of(cell)
    if preset is None:
        return None, None
    shortened, changed = [], []
    name = sections["data"]["name"]
    if name != cell["data"]:
        changed.append(f"data.name {name}, not {cell['data']}")
    for section, values in sections.items():
        wanted = _filled(section, PRESETS[preset].get(section, {}))
        for key in {**wanted, **values}:
            ours, theirs = values.get(key), wanted.get(key)
            if (
                f"{section}.{key}" in _ASIDE
                or ours == theirs
                or (theirs is None and ours in ({}, []))
            ):
                continue
            if key in _LENGTHS and None not in (ours, theirs) and ours < theirs:
                shortened.append(f"{section}.{key} {ours:,} of {theirs:,}")
            else:
                changed.append(
                    f"{section}.{key} {ours}, not {'the default' if theirs is None else theirs}"
                )
    return "; ".join(shortened), "; ".join(changed)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): delete that run's folder, or mend the file"
        ) from None
