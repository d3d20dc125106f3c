"""Figures of scores: ACC, ASR and losses over training, and each method's at its end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abdlab.labels import FLOOR, in_order, name_of
from abdlab.plots.colors import ROLES, axes_of, color_of, despine, distinct_colors
from abdlab.plots.run_words import marks

#: marks of one figure that have words beside them, at most
_SPOKEN_MARKS = 6


def training_curves(
    history: pd.DataFrame,
    ax: Axes | None = None,
    floor: float | None = None,
    step: str = "pseudo-batch",
) -> Axes:
    """ACC (solid) and ASR (dashed) in percent over training, one colour per label of
    the history. What was measured once is a large marker, with its number. A thin
    upright line stands where a weight was turned, or a defense began or ended.

    Args:
        history: of one or many runs, with columns label, step, acc, and asr where
            measured.
        floor: the clean-KD student's ASR as a share, drawn as a dotted line.
    """
    ax = axes_of(ax)
    measured = history.dropna(subset=["acc"]) if "acc" in history else history.iloc[:0]
    for label, part in measured.groupby("label", sort=False):
        for column, marker, dash in (("acc", "o", "-"), ("asr", "s", "--")):
            values = part.dropna(subset=[column]) if column in part else part.iloc[:0]
            if values.empty:
                continue
            name = f"{name_of(label)}: {column.upper()}"
            looks = {"ms": 3, "ls": dash}
            if len(values) == 1:  # a point, and no curve
                looks = {"ms": 7, "ls": "none"}
                name += f" {values[column].iloc[0]:.1%}, measured once"
            ax.plot(
                values["step"],
                100 * values[column],
                color=color_of(label),
                marker=marker,
                label=name,
                **looks,
            )
    if floor is not None:
        ax.axhline(
            100 * floor, color=ROLES["floor"], ls=":", label=f"clean KD: ASR (floor) {floor:.1%}"
        )
    _mark(ax, history)
    ax.xaxis.get_major_locator().set_params(integer=True)  # there is no half an epoch
    ax.set(xlabel=f"training step ({step})", ylabel="share of test images (%)", ylim=(-3, 103))
    if measured.empty:
        ax.text(0.5, 0.5, "ACC and ASR are unknown", ha="center", transform=ax.transAxes)
    else:
        ax.legend(fontsize=8, frameon=False, loc="best")
    despine(ax)
    return ax


def _mark(ax: Axes, history: pd.DataFrame) -> None:
    """Upright lines where something changed in a run, the first few with words."""
    changes = [(step, event) for step, kind, event in marks(history) if kind != "other"]
    for i, (step, event) in enumerate(changes):
        ax.axvline(step, color="0.55", lw=0.8, ls=(0, (2, 2)), zorder=0)
        if i < _SPOKEN_MARKS:
            words = event.partition(" from pseudo-batch")[0]
            look = {"rotation": 90, "fontsize": 7, "color": "0.45", "ha": "right", "va": "center"}
            ax.text(step, 50, f"{words} ", **look)


def branch_curves(
    histories: Mapping[str, pd.DataFrame], axes: Sequence[Axes], floor: float | None = None
) -> None:
    """ACC (first axes) and ASR (second) in percent over training, one line per run,
    each in a colour of its own, and with a dash and a marker.

    Args:
        histories: name of the run -> its history.
        floor: the clean-KD student's ASR as a share, drawn as a dotted line.
    """
    looks = itertools.cycle(
        zip(
            "os^DvPX",
            ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 2))],
            strict=True,
        )
    )
    colors = distinct_colors(len(histories))
    named = zip(histories.items(), colors, strict=True)
    for ((name, history), color), (marker, dash) in zip(named, looks):  # noqa: B905 (endless)
        measured = history.dropna(subset=["acc"]) if "acc" in history else history.iloc[:0]
        if measured.empty:
            continue
        for ax, column in zip(axes, ("acc", "asr"), strict=True):
            if column in measured:
                ax.plot(
                    measured["step"],
                    100 * measured[column],
                    color=color,
                    marker=marker,
                    ms=4,
                    ls=dash,
                    lw=1.4,
                    label=name,
                )
    if floor is not None:
        axes[1].axhline(
            100 * floor, color=ROLES["floor"], ls=":", label=f"clean KD (floor) {floor:.1%}"
        )
    for ax, text in zip(axes, ("ACC (%)", "ASR (%)"), strict=True):
        ax.set(xlabel="training step (pseudo-batch)", ylabel=text, ylim=(-3, 103))
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)


def loss_curves(history: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Every loss term of the history over training, weights included, on a
    symmetric-log axis.
    """
    ax = axes_of(ax)
    known = {"label", "step", "seconds", "acc", "asr", "events"}
    for name in [c for c in history.columns if c not in known]:
        part = history.dropna(subset=[name])
        once = {"marker": "o", "ls": "none"} if len(part) == 1 else {}
        ax.plot(part["step"], part[name], lw=1, label=name, **once)
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set(xlabel="training step (pseudo-batch)", ylabel="loss term, weight included (nats)")
    ax.legend(fontsize=8, frameon=False)
    despine(ax)
    return ax


def ablation_figure(results: pd.DataFrame) -> Figure:
    """ACC and ASR in percent per method: bars are means over seeds, lines one standard
    deviation, dots the seeds.

    Args:
        results: one row per method and seed, columns label, seed, acc, asr (shares).
    """
    order = in_order(results["label"])
    floor = pd.to_numeric(results.loc[results["label"] == FLOOR, "asr"]).mean()
    figure, axes = plt.subplots(
        1, 2, figsize=(10.5, 0.5 * len(order) + 1.4), layout="constrained", sharey=True
    )
    seeds = results["seed"].nunique()
    for ax, column, text in zip(
        axes,
        ("acc", "asr"),
        (
            "ACC: clean test images classified right (%)",
            "ASR: triggered test images predicted as the target (%)",
        ),
        strict=True,
    ):
        for y, label in enumerate(order):
            values = 100 * pd.to_numeric(results.loc[results["label"] == label, column]).dropna()
            if values.empty:
                ax.text(104, y, "unknown", va="center", fontsize=9)
                continue
            spread = values.std() if len(values) > 1 else 0
            ax.barh(
                y,
                values.mean(),
                xerr=spread or None,
                color=color_of(label),
                alpha=0.85,
                height=0.65,
                capsize=3,
            )
            ax.scatter(values, [y] * len(values), s=14, color="black", zorder=3)
            ax.text(
                104,
                y,
                f"{values.mean():.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else ""),
                va="center",
                fontsize=9,
            )
        ax.set(
            xlabel=text,
            xlim=(0, 100),
            yticks=range(len(order)),
            yticklabels=[name_of(label) for label in order],
        )
        ax.spines[["top", "right"]].set_visible(False)
    if floor == floor:
        axes[1].axvline(100 * floor, color=ROLES["floor"], ls=":", lw=1.5, label="floor (clean KD)")
        axes[1].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axes[0].invert_yaxis()
    figure.suptitle(
        f"Mean over {seeds} seed{'s' if seeds != 1 else ''}"
        + (", one standard deviation, each seed a dot" if seeds > 1 else ""),
        fontsize=10,
    )
    return figure
