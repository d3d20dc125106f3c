"""What a notebook found, in one sentence that is computed from its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from abdlab.labels import FLOOR, TEACHER, Label, name_of
from abdlab.studies.job import label_of
from abdlab.threads import mixed
from abdlab.watermarks import Claim


def outcome(
    rows: pd.DataFrame | Iterable[Mapping], by: Sequence[str] = (), defense: str | None = None
) -> str:
    """What became of the backdoor: ASR before and after the defense, what that cost, the
    floor. Means over seeds, in percent.

    Args:
        rows: columns label, seed, acc, asr (shares), and threads where known, as
            :func:`abdlab.studies.tables.rows` has them.
        by: further columns that tell experiments apart (trigger, a setting). Each has an
            undefended and a defended student per source, and counts once.
        defense: of the defended students, such as "sv+tu"; by default the one with the
            most parts, of equals the last. One without an undefended student beside it
            is told alone.

    A column "model" says which rows are one model, which counts once.

    >>> outcome([dict(label="zskt", seed=0, acc=0.98, asr=1.0),
    ...          dict(label="zskt+sv", seed=0, acc=0.97, asr=0.07),
    ...          dict(label="clean", seed=0, acc=0.99, asr=0.03)])
    'ZSKT+SV takes ASR from 100 to 7 %, ACC lost 1 point; the floor is 3 %.'
    """
    frame = pd.DataFrame(rows)
    for column in {"acc", "asr"} & {*frame}:
        frame[column] = pd.to_numeric(frame[column])  # what is unknown is None in metrics
    frame = frame[frame["acc"].notna()] if "acc" in frame else frame
    if frame.empty:
        return "Nothing was measured."
    if "model" in frame:  # jobs of a study repeat models that they share
        frame = frame.drop_duplicates(["label", "model", *by])
    labels = frame["label"].map(label_of)
    frame = frame.assign(source=[label.source for label in labels])
    pupils = frame[~frame["source"].isin([TEACHER, FLOOR, "clean_teacher"])]
    pairs, alone = [], []
    for _, part in pupils.groupby([*by, "source"], dropna=False, sort=False):
        means = part.groupby("label", sort=False)[["acc", "asr"]].mean()
        before = [label for label in means.index if label_of(label).undefended]
        after = _most_defended(means.index, defense)
        if before and after:
            pairs.append((after, means.loc[before[0]], means.loc[after]))
        elif after and not by:
            alone.append(f"; {name_of(after)} has {_scores(means.loc[after])}")
    if pairs:
        told = _pairs(pairs) + "".join(alone)
    else:
        shown = pupils if len(pupils) else frame
        told = ", ".join(
            f"{name_of(label)} has {_scores(part[['acc', 'asr']].mean())}"
            for label, part in shown.groupby("label", sort=False)
        )
    floor = frame.loc[frame["source"] == FLOOR, "asr"].mean()
    told += f"; the floor is {percent(floor)} %" if floor == floor and len(pupils) else ""
    seeds = frame["seed"].nunique()
    told += f" (means of {seeds} seeds)" if seeds > 1 else ""
    sentence = mixed(frame["threads"]) if "threads" in frame else ""
    return f"{told[0].upper()}{told[1:]}. {sentence}".strip()


def trained_for(rows: pd.DataFrame | Iterable[Mapping], method: str) -> str:
    """What training a teacher for something does to one method: its ASR (in percent, means
    over seeds) on teachers trained for their labels alone, and on each other kind.

    Args:
        rows: columns objective ("none" for labels alone), label, acc, asr (shares).
        method: a label of the rows.

    >>> trained_for([dict(objective="none", label="bounded/teacher", acc=1.0, asr=0.1),
    ...              dict(objective="pgd", label="bounded/teacher", acc=0.9, asr=0.8)],
    ...             "bounded/teacher")
    'Bounded/teacher has ASR 10 % (ACC 100); if trained with pgd, 80 % (ACC 90).'

    Raises:
        ValueError: where the rows have no such method.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["label"] == method] if "label" in frame else frame
    if frame.empty:
        raise ValueError(f"no row is of {method!r}")
    means = frame.groupby("objective", sort=False)[["acc", "asr"]].mean()
    told = {
        kind: f"{percent(row['asr'])} % (ACC {percent(row['acc'])})"
        for kind, row in means.iterrows()
    }
    plain = told.pop("none", None)
    others = ", ".join(f"with {kind}, {said}" for kind, said in told.items())
    name = name_of(method)
    parts = [f"has ASR {plain}"] if plain else []
    parts += [f"if trained {others}"] if others else []
    return f"{name[0].upper()}{name[1:]} {'; '.join(parts)}."


def proved(claims: Mapping[str, Claim], level: float, innocent: Iterable[str] = ()) -> str:
    """In which models an owner can prove the watermark, and in which not.

    Args:
        claims: name of a model -> the owner's case. level: p-values below it prove.
        innocent: names of models that never learnt from the owner's.

    >>> proved({"ZSKT": Claim(10, 10, 0.1), "bounded/ZSKT": Claim(1, 10, 0.1)}, 0.01)
    'At p < 0.01 the owner proves the watermark in ZSKT, and not in bounded/ZSKT.'
    """
    free = set(innocent)
    won, lost = (
        [k for k, claim in claims.items() if k not in free and claim.proves(level) is to]
        for to in (True, False)
    )
    parts = [f"proves the watermark in {', '.join(won)}"] if won else []
    parts += [f"{'and not' if won else 'proves nothing'} in {', '.join(lost)}"] if lost else []
    accused = [k for k in claims if k in free and claims[k].proves(level)]
    wronged = f" Innocent models accused: {', '.join(accused) or 'none'}." if free else ""
    return f"At p < {level:g} the owner {', '.join(parts)}.{wronged}"


def _pairs(pairs: Sequence[tuple[str, pd.Series, pd.Series]]) -> str:
    """One pair by its name, several as their mean."""
    before, after = (pd.DataFrame([pair[i] for pair in pairs]).mean() for i in (1, 2))
    who = (
        f"{name_of(pairs[0][0])} takes"
        if len(pairs) == 1
        else f"over {len(pairs)} pairs of undefended and defended students, the defense takes"
    )
    first, last = (percent(row["asr"]) for row in (before, after))
    asr = f" ASR from {first} to {last} %,"
    if first == last:
        who, asr = f"{who.removesuffix('takes')}leaves", f" ASR at {last} %,"
    asr = "" if "nan" in (first, last) else asr
    change = percent(abs(after["acc"] - before["acc"]))
    moved = "lost" if after["acc"] < before["acc"] else "gained"
    acc = f"{moved} {change} point{'' if change == '1' else 's'}"
    acc = "ACC is unchanged" if change == "0" else f"ACC {acc}"
    return f"{who}{asr} {acc}" if asr else f"{who.rpartition(' ')[0]}: {acc}"


def _most_defended(labels: Iterable[str], defense: str | None) -> str | None:
    """The label with that defense, or with the most parts, of equals the last."""
    found = [label for label in labels if not label_of(label).undefended]
    if defense is not None:
        found = [label for label in found if label_of(label).defense == defense]
    return max(reversed(found), key=lambda label: len(label_of(label).parts), default=None)


def _scores(row: pd.Series) -> str:
    asr = "" if row["asr"] != row["asr"] else f" and ASR {percent(row['asr'])} %"
    return f"ACC {percent(row['acc'])} %{asr}"


@dataclass(frozen=True)
class Sign:
    """One thing by which images can show a backdoor: a share of them, and the line
    above which it counts.

    >>> print(Sign("images that the teacher predicts as the target class", 0.352, 0.2))
    images that the teacher predicts as the target class: 35.2 %, above 20 %: a sign
    """

    what: str
    share: float
    line: float

    @property
    def shows(self) -> bool:
        """Whether the share is above the line."""
        return self.share > self.line

    def __str__(self) -> str:
        above, sign = ("above", "a sign") if self.shows else ("not above", "no sign")
        return f"{self.what}: {percent(self.share)} %, {above} {percent(self.line)} %: {sign}"


def signs_in_words(signs: Sequence[Sign], label: str | Label, asr: float | None) -> str:
    """How many signs of the backdoor the images of a student show, beside its ASR.

    >>> signs_in_words([Sign("suspicious", 0.01, 0.02)], "zskt", 0.97)
    'ZSKT: its images show 0 of 1 signs of the backdoor, and its ASR is 97 %: it can pass unseen.'
    """
    found = sum(sign.shows for sign in signs)
    told = f"{name_of(label)}: its images show {found} of {len(signs)} signs of the backdoor"
    if asr is None or asr != asr:
        return f"{told}."
    unseen = ": it can pass unseen" if found == 0 and asr >= 0.5 else ""
    return f"{told}, and its ASR is {percent(asr)} %{unseen}."


def most_moved(changes: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The layer of each model with the channel that the trigger moves most.

    Args:
        changes: name of the model -> what
            :func:`abdlab.activations.triggered_change` returned.
    """
    parts = []
    for name, layers in changes.items():
        layer = max(layers, key=lambda key: layers[key].max().item())
        at = f"channel {int(layers[layer].argmax())} of {layer}"
        parts.append(f"{name}: {at}, {layers[layer].max().item():.1f} times the layer's clean norm")
    return f"The trigger moves most: {'; '.join(parts)}."


def percent(share: float) -> str:
    """A share in percent with at most one decimal.

    >>> percent(1.0), percent(0.071), percent(-0.0001)
    ('100', '7.1', '0')
    """
    return f"{round(100 * share, 1) + 0.0:.1f}".removesuffix(".0")
