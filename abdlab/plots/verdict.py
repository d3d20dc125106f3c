"""Figures of an audit: what each detector says of each class, and the triggers that
were inverted.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from abdlab.audit import Audit
from abdlab.plots.colors import ROLES, despine
from abdlab.plots.images import show


def audit_figure(found: Audit, classes: Sequence[str]) -> Figure:
    """One panel per detector: the score of each class, the threshold as a dashed line,
    classes above it marked.
    """
    figure, axes = plt.subplots(
        1, len(found.scores), figsize=(3.2 * len(found.scores), 2.9), layout="constrained"
    )
    axes = [axes] if len(found.scores) == 1 else axes
    for ax, (name, scores) in zip(axes, found.scores.items(), strict=True):
        line = found.thresholds[name]
        colors = [ROLES["target"] if s > line else "0.6" for s in scores.tolist()]
        ax.bar(range(len(scores)), scores.tolist(), color=colors)
        ax.axhline(line, color="black", ls="--", lw=1)
        step = max(1, len(scores) // 20)  # of very many classes, some names
        ticks = range(0, len(scores), step)
        ax.set_xticks(ticks, [classes[i] for i in ticks], fontsize=8)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("class")
        despine(ax)
    axes[0].set_ylabel("score (above the line: suspicious)")
    return figure


def inverted_figure(found: Audit, images: int = 6, figure: Figure | None = None) -> Figure:
    """The inverted triggers of the suspicious class on synthetic images: a row per
    trigger, the images as they are above.

    Args:
        figure: to draw on; by default a new one of pyplot's.
    """
    shown = found.pool[:images]
    bank = found.triggers
    if figure is None:
        size = (1.0 * len(shown) + 1.6, 1.05 * (len(bank) + 1) + 0.4)
        figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(bank) + 1, len(shown), squeeze=False)
    with torch.no_grad():
        rows = {"synthetic": shown} | {t.family: t(shown) for t in bank}
    shares = dict(zip((t.family for t in bank), found.turned, strict=False))
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, row, strict=True):
            show(ax, image)
        note = f"\nturns {shares[name]:.0%}" if name in shares else ""
        line[0].set_ylabel(f"{name}{note}", fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(f"Cheapest triggers for class {found.nearest}, inverted", fontsize=11)
    return figure
