"""What a model answers, class by class, without and with a trigger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from abdlab.plots.colors import ROLES

#: classes of a matrix whose counts are written into it, at most
_WRITTEN = 12


def confusion_figure(
    found: Mapping[str, Any], axes: Sequence[Axes], target: int | None = None
) -> None:
    """Confusion matrices, one per axes: of the clean test images, then of each attack's
    triggered ones. A row is a true class, in shares of its images; its accuracy stands
    at the right.

    Args:
        found: what :attr:`abdlab.runs.Run.confusion` holds: classes (names), clean, and
            triggered by attack, counts of true classes (rows) by predicted ones.
        axes: as many as matrices shall be drawn; further ones are left out.
        target: the class whose column is framed.
    """
    named = [("clean test images", found["clean"])]
    named += [(f"triggered: {name}", counts) for name, counts in found["triggered"].items()]
    for ax, (title, counts) in zip(axes, named, strict=False):
        _matrix(ax, np.asarray(counts), [*found["classes"]], title, target)


def _matrix(
    ax: Axes, counts: np.ndarray, classes: list[str], title: str, target: int | None
) -> None:
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    few, size = len(classes) <= _WRITTEN, 7
    places = range(len(classes)) if few else range(0, len(classes), -(-len(classes) // _WRITTEN))
    ax.set_xticks(places, [classes[i] for i in places], fontsize=size, rotation=90 if few else 0)
    ax.set_yticks(places, [classes[i] for i in places], fontsize=size)
    for i in places:
        text = f"{100 * shares[i, i]:.0f} %" if images[i] else "no images"
        ax.text(len(classes) - 0.3, i, text, va="center", fontsize=size)
        for j in places if few else ():
            if counts[i, j]:
                color = "white" if shares[i, j] > 0.5 else "#202020"
                ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=size, color=color)
    if target is not None and 0 <= target < len(classes):
        look = {"fill": False, "ec": ROLES["target"], "lw": 1.5, "clip_on": False}
        ax.add_patch(Rectangle((target - 0.5, -0.5), 1, len(classes), **look))
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("predicted", fontsize=8)
    ax.set_ylabel("true class", fontsize=8)
