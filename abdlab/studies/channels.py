"""In how many channels each trigger lives, against what the bound and the vaccine make of
it: the paper's limitation, as a rank correlation over all triggers.

::

    python -m abdlab.studies.channels FILE.csv --root runs/channels   # rows, as it goes
    python -m abdlab.studies.channels FILE.csv --figure channels.png  # and what they say
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr

from abdlab.activations import participation, triggered_change
from abdlab.attacks.triggers import TRIGGERS
from abdlab.checkpoint import write_atomically
from abdlab.defenses import ShuffledTeacher, ShufflingVaccine
from abdlab.inspection import shuffle_auc
from abdlab.labels import TEACHER
from abdlab.settings import settings
from abdlab.students import purified_teacher
from abdlab.teachers import WeakTeacher, poisoned_teacher, prepare

#: column -> what stands on the figure's axis
ACHIEVED = {
    "bounded_asr": "ASR of the bounded teacher [%]",
    "sv_auc": "AUC of shuffled copies",
}


def lives_in(changes: Sequence[torch.Tensor]) -> float:
    """The share of channels that a trigger lives in: participation ratio / channels, a
    mean over layers, in (0, 1]; 0 where nothing changes.

    Args:
        changes: of each layer (channels,), see
            :func:`abdlab.activations.triggered_change`.

    >>> lives_in([torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])])
    0.75
    """
    shares = [participation(change) / len(change) for change in changes]
    return sum(shares) / len(shares)


def measure(root: Path, trigger: str, seed: int = 0, shuffles: int = 4) -> dict:
    """One trigger's row: its teacher of the quick preset is trained, bounded and shuffled.

    ``bounded_asr`` is the ASR of the teacher after ``bounded``; ``sv_auc`` the mean over
    shuffles of the chance that a triggered test image is more suspicious to them than a
    clean one (:func:`abdlab.inspection.shuffle_auc`), with the vaccine's own settings.

    Args:
        root: the teachers' folder, one of its own below it for each trigger.
    """
    chosen = settings("quick/digits", {"attack.trigger": trigger}, seed=seed, device="cpu")
    data, folder = chosen.dataset(), root / trigger
    chosen = prepare(root, chosen, data)  # the clean model is one for all triggers
    teacher = poisoned_teacher(folder, chosen, data)
    exam = chosen.exam(data)
    kept = data.test_labels != chosen.target
    changes = triggered_change(teacher, data.test_images[kept], exam.triggered)
    bounded = purified_teacher(folder, chosen, data, teacher, ["bounded"])
    (sv,) = chosen.defenses(ShufflingVaccine.name)
    names, rng = sv.layer_names(teacher), torch.Generator().manual_seed(seed)
    aucs = [
        shuffle_auc(
            ShuffledTeacher(teacher, names, sv.k, rng),
            teacher,
            exam.images,
            exam.triggered,
            sv.reverse,
        )
        for _ in range(shuffles)
    ]
    before, after = exam(teacher), exam(bounded)
    return {
        "study": "channels",
        "preset": chosen.preset,
        "trigger": trigger,
        "method": TEACHER,
        "seed": seed,
        "acc": round(100 * before["acc"], 1),
        "asr": round(100 * before["asr"], 1),
        "share": round(lives_in(list(changes.values())), 4),
        "bounded_acc": round(100 * after["acc"], 1),
        "bounded_asr": round(100 * after["asr"], 1),
        "sv_auc": round(sum(aucs) / len(aucs), 4),
    }


def measured(file: Path, root: Path, triggers: Sequence[str]) -> pd.DataFrame:
    """The file's rows, and those of triggers that it did not have, written one by one."""
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    for trigger in triggers:
        if trigger in [row["trigger"] for row in rows]:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeakTeacher)
            rows.append(measure(root, trigger))
        written = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
        write_atomically(file, written.encode())
    return pd.DataFrame(rows)


def correlations(rows: pd.DataFrame, least: float = 90.0) -> dict[str, tuple[float, float, int]]:
    """Spearman's rho of ``share`` with each column of :data:`ACHIEVED`, its two-sided
    p-value, and the number of triggers.

    Args:
        rows: see :func:`measure`. least: ASR in percent of the teachers that count: a
            backdoor that is not there cannot be removed.

    >>> rows = pd.DataFrame({"asr": 100, "share": [0.1, 0.2, 0.3], "sv_auc": [3, 2, 1]})
    >>> correlations(rows.assign(bounded_asr=[1, 3, 2]))["bounded_asr"][0]
    0.5
    """
    rows, found = rows[rows["asr"] >= least], {}
    for column in ACHIEVED:
        test = spearmanr(rows["share"], rows[column])
        rho, p = float(test.statistic), float(test.pvalue)
        found[column] = (round(rho, 3), round(p, 4), len(rows))
    return found


def main() -> None:
    """Entry point of ``python -m abdlab.studies.channels``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the CSV file of rows, made or gone on with")
    parser.add_argument("--root", type=Path, default=Path("runs/channels"), help="of the teachers")
    parser.add_argument("--triggers", nargs="+", default=list(TRIGGERS), help="default: all")
    parser.add_argument("--figure", type=Path, help="an image file of the scatter")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(given.file, given.root.resolve(), given.triggers)
    found = correlations(rows)
    for column, (rho, p, n) in found.items():
        print(f"{ACHIEVED[column]}: rho {rho:+.2f}, p = {p:.3f}, {n} triggers")
    if given.figure:
        from abdlab.plots import channels_figure

        channels_figure(rows, ACHIEVED, found).savefig(given.figure, dpi=150)


if __name__ == "__main__":
    main()
