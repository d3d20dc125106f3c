"""The sample explorer's figures: one image from all sides, suspicion scores, the map. Each
is drawn on a figure that is given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abdlab import plots
from abdlab.activations import convolutions, spatial_map
from abdlab.inspection import Known, nearest
from abdlab.labels import name_of

_ABOVE = {"fontsize": 8, "frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}


def draw_detail(drawn: Figure, known: Known, number: int, classes: Sequence[str]) -> None:
    """One image, the teacher's activation on it, the nearest real image, and what each
    network predicts.
    """
    axes = drawn.subplot_mosaic(
        [["image", "heat", "real"], ["bars", "bars", "bars"]], height_ratios=[1, 1.05]
    )
    facts, image = known.table.loc[number], known.images[number]
    title = f"step {facts['step']:.0f}, image {facts['index']:.0f}"
    plots.show(axes["image"], image, title)
    _heat(axes["heat"], known, image)
    if known.data is None or not len(known.data.train_images):
        axes["real"].axis("off")
        words = {"ha": "center", "va": "center", "fontsize": 9, "color": "0.5"}
        axes["real"].text(0.5, 0.5, "no real data\nat hand", **words)
    else:
        real, label = nearest(image, known.data)
        plots.show(axes["real"], real, f"nearest real: {known.data.classes[label]}")
    _bars(axes["bars"], known, number, classes)


def draw_scores(drawn: Figure, known: Known, selected: Sequence[int]) -> Axes:
    """The histogram of suspicion scores, selected images on top."""
    ax, scores = drawn.subplots(), known.table["suspicion"]
    plots.suspicion_histogram(torch.tensor(scores.to_numpy()), ax=ax, reverse=known.reverse)
    if selected:
        bins = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 60)
        chosen = scores.loc[list(selected)]
        weights = np.full(len(chosen), 1 / (len(scores) * (bins[1] - bins[0])))
        label = f"selected (n = {len(chosen)})"
        ax.hist(chosen, bins, weights=weights, color=plots.ROLES["selected"], label=label)
        ax.legend(**_ABOVE, ncols=2)
    return ax


def draw_map(
    drawn: Figure,
    known: Known,
    numbers: np.ndarray,
    points: np.ndarray,
    selected: Collection[int],
    classes: Sequence[str],
    ink: str,
) -> Axes:
    """The map of some images, coloured by the teacher's class, selected ones larger and
    framed in ``ink``.
    """
    ax, said = drawn.subplots(), known.table.loc[numbers, "class"]
    colors, chosen = plots.class_colors(len(classes)), np.isin(numbers, list(selected))
    for inside, size, edge in ((~chosen, 16, "none"), (chosen, 46, ink)):
        shades = [colors[c] for c in said[inside]]
        ax.scatter(*points[inside].T, s=size, c=shades, edgecolors=edge, linewidths=1.4)
    for i, name in enumerate(classes):
        if (said == i).any() and len(classes) <= 12:
            ax.scatter([], [], s=16, color=colors[i], label=name)
    ax.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    place = {"bbox_to_anchor": (1.0, 1.0), "loc": "upper left"}
    ax.legend(fontsize=8, frameon=False, title="teacher predicts", title_fontsize=8, **place)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def box_of(ax: Axes) -> tuple[float, float, float, float]:
    """Where the axes are on their picture, once that is drawn: left, top, right, bottom
    as shares.
    """
    box = ax.get_position()
    return box.x0, 1 - box.y1, box.x1, 1 - box.y0


def _heat(ax: Axes, known: Known, image: Tensor) -> None:
    stages = getattr(known.teacher, "stages", ())
    layer = stages[-2] if len(stages) > 1 else convolutions(known.teacher)[-1]
    heat = spatial_map(known.teacher, image[None], layer)[0]
    plots.show(ax, image, f"activation, {layer}")
    height, width = image.shape[-2:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(heat.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=extent)


def _bars(ax: Axes, known: Known, number: int, classes: Sequence[str]) -> None:
    student = (name_of(known.label), plots.color_of(known.label))
    looks = {
        "teacher": ("teacher", plots.ROLES["teacher"]),
        "vaccine": ("shuffled teacher", plots.ROLES["shuffled teacher"]),
        "student": student,
    }
    share = {kind: values[number].softmax(0) for kind, values in known.logits.items()}
    # of many classes, the ten that any of the three gives most
    best = torch.stack([*share.values()]).amax(0).topk(min(10, len(classes))).indices
    best = sorted(best.tolist())
    for i, (kind, values) in enumerate(share.items()):
        places = np.arange(len(best)) + (i - (len(share) - 1) / 2) * 0.27
        name, color = looks[kind]
        ax.bar(places, [100 * values[c].item() for c in best], 0.25, color=color, label=name)
    ax.set(xticks=range(len(best)), ylim=(0, 103), ylabel="probability (%)")
    ax.set_xticklabels([classes[c] for c in best], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(**_ABOVE, ncols=3)


def column_is_missing(table: pd.DataFrame, column: str) -> bool:
    """Whether a column says nothing about these images."""
    return bool(len(table)) and bool(table[column].isna().all())
