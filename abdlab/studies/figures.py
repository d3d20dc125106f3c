"""Results of a study as figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abdlab.labels import FLOOR, TEACHER, name_of
from abdlab.plots.colors import axes_of as _axes
from abdlab.plots.colors import color_of
from abdlab.studies.job import label_of
from abdlab.studies.tables import _models, pareto_front


def study_heatmaps(results: pd.DataFrame, defense: str | None = None) -> Figure:
    """ASR (ACC below it) in percent, triggers against sources, before and after a
    defense; empty cells were not run.

    Args:
        results: what :func:`abdlab.studies.results.results` returns.
        defense: by default the one with the most parts among those that were run.
    """
    students = _models(results[~results["source"].isin([TEACHER, FLOOR])])
    parts = {
        defense: len(label_of(label).parts)
        for defense, label in zip(students["defense"], students["label"], strict=True)
    }
    defended = [d for d in dict.fromkeys(students["defense"]) if d != "none"]
    defense = defense or max(defended, key=parts.get, default=None)
    shown = [("undefended", "none")] + ([(f"with {_spoken(defense)}", defense)] if defense else [])
    triggers, sources = (
        sorted(students["trigger"].dropna().unique()),
        list(dict.fromkeys(students["source"])),
    )
    size = (2.0 + 1.3 * len(sources) * len(shown) + 1.2, 1.4 + 0.7 * len(triggers))
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, key) in zip(axes[0], shown, strict=True):
        part = students[students["defense"] == key]
        asr, acc = (
            100
            * part.pivot_table(index="trigger", columns="source", values=v, aggfunc="mean").reindex(
                index=triggers, columns=sources
            )
            for v in ("asr", "acc")
        )
        text = [
            [f"{a:.0f}\nACC {c:.0f}" if a == a else "" for a, c in zip(r, q, strict=True)]
            for r, q in zip(asr.values, acc.values, strict=True)
        ]
        last = ax is axes[0][-1]
        sns.heatmap(
            asr.astype(float),
            annot=np.array(text, dtype=object).reshape(asr.shape),
            fmt="",
            vmin=0,
            vmax=100,
            cmap="rocket_r",
            ax=ax,
            linewidths=1,
            annot_kws={"fontsize": 8},
            cbar=last,
            cbar_kws={"label": "mean ASR (%)"} if last else None,
        )
        ax.set(title=title, xlabel="source", ylabel="trigger" if ax is axes[0][0] else "")
        ax.set_xticklabels([t.get_text().upper() for t in ax.get_xticklabels()])
        ax.tick_params(axis="y", labelrotation=0)  # turned names run into each other
    return figure


def _spoken(defense: str) -> str:
    """What stands around the source in a label, as it is said: purifiers small, defenses
    large.

    >>> _spoken("unlearn+bounded/"), _spoken("bounded/sv+tu")
    ('unlearn+bounded', 'bounded, SV+TU')
    """
    purifiers, _, defenses = defense.rpartition("/")
    return ", ".join(part for part in (purifiers, defenses.upper()) if part)


def tradeoff_figure(results: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """ACC against ASR in percent, one point per job's student (colour: defense, marker:
    source), and the Pareto front.

    The front joins the students that no other one beats in both ACC and ASR: down and
    to the right is better.
    """
    ax = _axes(ax, 7.2, 4.6)
    students = _models(results[results["label"] != "teacher"])
    markers = _markers(students["source"])
    for label, part in students.groupby("label", sort=False):
        ax.scatter(
            100 * part["acc"],
            100 * part["asr"],
            color=color_of(label),
            marker=markers[part["source"].iloc[0]],
            s=90 if label == FLOOR else 42,
            alpha=0.85,
            edgecolor="white",
            linewidth=0.6,
            label=name_of(label),
        )
    front = pareto_front(students[students["label"] != FLOOR])
    if len(front) > 1:
        ax.plot(
            100 * front["acc"],
            100 * front["asr"],
            color="0.4",
            lw=1,
            ls="--",
            zorder=0,
            label="Pareto front (data-free)",
        )
    ax.set(
        xlabel="ACC: clean test images classified right (%)",
        ylabel="ASR: triggered test images\ncalled the target (%)",
    )
    ax.set(xlim=(max(-2, 100 * students["acc"].min() - 5), 101), ylim=(-3, 103))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _markers(sources: Iterable[str]) -> dict[str, str]:
    """A marker per source, clean KD's is a star."""
    shapes = itertools.cycle("os^DvPX<>")
    return {source: "*" if source == FLOOR else next(shapes) for source in dict.fromkeys(sources)}


def sensitivity_figure(results: pd.DataFrame, axis: str) -> Figure:
    """ACC and ASR in percent against a numeric axis of a study: lines are means, bands
    one standard deviation, over all else.

    Raises:
        ValueError: when the axis is no column of numbers.
    """
    if axis not in results or not pd.api.types.is_numeric_dtype(results[axis]):
        raise ValueError(
            f"{axis} is no numeric axis of this study: its columns are"
            f" {', '.join(map(str, results.columns))}"
        )
    students = _models(results[~results["label"].isin([TEACHER, FLOOR])], axis)
    markers = _markers(students["source"])
    dashes = dict(zip(markers, itertools.cycle(["-", "--", ":", "-."])))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained", sharex=True)
    for ax, column, text in zip(axes, ("acc", "asr"), ("ACC (%)", "ASR (%)"), strict=True):
        for label, part in students.groupby("label", sort=False):
            source = part["source"].iloc[0]
            looks = {
                "color": color_of(label),
                "marker": markers[source],
                "linestyle": dashes[source],
                "label": name_of(label),
            }
            sns.lineplot(
                x=part[axis],
                y=100 * part[column],
                errorbar="sd",
                err_kws={"alpha": 0.12},
                ax=ax,
                **looks,
            )
        ax.set(xlabel=axis, ylabel=text, ylim=(-3, 103))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    axes[1].legend_.remove()
    return figure
