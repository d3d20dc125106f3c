"""Figures that show images: triggers, what a model predicts, what a student learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abdlab.attacks.triggers import Trigger
from abdlab.plots.colors import ROLES, axes_of


def picture(image: Tensor) -> np.ndarray:
    """(C, H, W) to (H, W) or (H, W, 3) in [0, 1]; of other channel counts the mean is
    shown.
    """
    image = image.detach().float().cpu().clamp(0, 1)
    return (image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)).numpy()


def show(ax: Axes, image: Tensor, title: str = "", color: str | None = None) -> Axes:
    """One image without ticks."""
    ax.imshow(picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9, **({"color": color} if color else {}))
    return ax


def montage(images: Tensor, columns: int = 8, ax: Axes | None = None, title: str = "") -> Axes:
    """Images (N, C, H, W) as one picture with a thin gap, ``columns`` to a row."""
    from torchvision.utils import make_grid

    rows = -(-len(images) // columns)
    ax = axes_of(ax, 0.75 * columns, 0.75 * rows + 0.4)
    grid = make_grid(
        images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=1, pad_value=1.0
    )
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def trigger_figure(
    images: Tensor, triggered: Tensor, labels: Sequence[str] | None = None, name: str = "trigger"
) -> Figure:
    """Rows clean, triggered and the absolute difference (brightened to fill the range),
    one column per image.
    """
    n = len(images)
    difference = (triggered - images).abs()
    gain = 1 / difference.max().clamp_min(1e-6)
    figure, axes = plt.subplots(
        3, n, figsize=(1.1 * n + 0.9, 3.9), layout="constrained", squeeze=False
    )
    for i in range(n):
        show(axes[0, i], images[i], f"label {labels[i]}" if labels is not None else "")
        show(axes[1, i], triggered[i])
        show(axes[2, i], difference[i] * gain)
    for row, text in enumerate(("clean", "triggered", f"difference\n(x {gain.item():.2g})")):
        axes[row, 0].set_ylabel(text, fontsize=9)
    figure.suptitle(f"Trigger {name}", fontsize=11)
    return figure


def trigger_gallery(images: Tensor, triggers: Sequence[Trigger], columns: int = 4) -> Figure:
    """Several triggers on the same images: one row each, the triggered images on the
    left and their differences on the right.

    The first row is the clean images. A difference is the largest absolute change over
    the channels, and brightened so that the row's largest value is white: the factor is
    under the trigger's name. On the right stand the trigger's sizes, means over all
    ``images`` (:func:`abdlab.evaluate.trigger_size`).

    Args:
        images: (N, C, H, W) in [0, 1]; the first ``columns`` are shown, all are
            measured.
        triggers: optimised ones with their patterns
            (:func:`abdlab.teachers.ready_triggers`).
    """
    from abdlab.evaluate import trigger_size

    shown = images[:columns]
    n = len(shown)
    figure, axes = plt.subplots(
        len(triggers) + 1,
        2 * n,
        figsize=(1.6 * n + 4.2, 0.8 * len(triggers) + 1.5),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes[0, n:]:
        ax.axis("off")
    note = "difference, brightened by the factor on the left"
    axes[0, n].text(0, 0.1, note, transform=axes[0, n].transAxes, fontsize=9).set_in_layout(False)
    for column in range(n):
        show(axes[0, column], shown[column])
    axes[0, 0].set_ylabel("clean", fontsize=9, rotation=0, ha="right", va="center")
    for row, trigger in zip(axes[1:], triggers, strict=True):
        triggered, size = trigger(shown), trigger_size(images, trigger)
        difference = (triggered - shown).abs().amax(1, keepdim=True)
        gain = 1 / difference.max().clamp_min(1e-6)
        for column in range(n):
            show(row[column], triggered[column])
            show(row[n + column], difference[column] * gain)
        row[0].set_ylabel(
            f"{trigger}\n(difference x {gain.item():.2g})",
            fontsize=9,
            rotation=0,
            ha="right",
            va="center",
        )
        text = (
            f"l0 {size['l0']:.1%} of pixels, SSIM {size['ssim']:.3f}\nl2 {size['l2']:.2f},"
            f" l$_\\infty$ {size['linf']:.3f}"
        )
        row[-1].text(1.12, 0.5, text, transform=row[-1].transAxes, fontsize=8, va="center")
    figure.suptitle(
        f"Triggers on the same images\n(sizes: means over {len(images)} images; l2, l$_\\infty$ in"
        " [0, 1] units)",
        fontsize=11,
    )
    return figure


def prediction_figure(
    images: Tensor,
    triggered: Tensor,
    clean_said: Tensor,
    triggered_said: Tensor,
    classes: Sequence[str],
    target: int,
) -> Figure:
    """Two rows, clean and triggered, each image under the class that a model gives it;
    the target class in orange.
    """
    figure, axes = plt.subplots(
        2, len(images), figsize=(1.1 * len(images) + 0.9, 2.9), layout="constrained", squeeze=False
    )
    for row, (batch, said) in enumerate(((images, clean_said), (triggered, triggered_said))):
        for column, label in enumerate(said.tolist()):
            show(
                axes[row, column],
                batch[column],
                f"says {classes[label]}",
                ROLES["target"] if label == target else None,
            )
    axes[0, 0].set_ylabel("clean", fontsize=9)
    axes[1, 0].set_ylabel("triggered", fontsize=9)
    figure.suptitle(
        f"What the model says (orange: the target class, {classes[target]})", fontsize=11
    )
    return figure


def samples_over_training(
    samples: Mapping[int, Tensor], columns: int = 10, rows: int = 8
) -> Figure:
    """The first images of pseudo-batches over training: one row per recorded step,
    evenly chosen, the latest at the bottom.
    """
    steps = sorted(samples)
    chosen = [
        steps[i]
        for i in np.unique(
            np.linspace(0, len(steps) - 1, min(rows, len(steps))).round().astype(int)
        )
    ]
    figure, axes = plt.subplots(
        len(chosen),
        columns,
        figsize=(0.75 * columns + 0.8, 0.78 * len(chosen) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for row, step in enumerate(chosen):
        for column in range(columns):
            ax = axes[row, column]
            if column < len(samples[step]):
                show(ax, samples[step][column])
            else:
                ax.axis("off")
        axes[row, 0].set_ylabel(f"step {step}", fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle("What the student learnt from, over training", fontsize=11)
    return figure


def samples_by_class(
    images: Tensor,
    logits: Tensor,
    classes: Sequence[str],
    columns: int = 10,
    target: int | None = None,
) -> Figure:
    """Synthetic images in rows by the class that the teacher gives them, the surest
    first; the target class is marked.
    """
    sure, predicted = logits.softmax(1).max(1)
    figure, axes = plt.subplots(
        len(classes),
        columns,
        figsize=(0.75 * columns + 1.2, 0.78 * len(classes) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for row, name in enumerate(classes):
        members = torch.nonzero(predicted == row).flatten()
        members = members[sure[members].argsort(descending=True)]
        for column in range(columns):
            ax = axes[row, column]
            if column < len(members):
                show(ax, images[members[column]])
            else:
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_color("0.9")
        note = "\n(target)" if row == target else ""
        axes[row, 0].set_ylabel(
            f"{name}: {len(members) / len(images):.0%}{note}",
            fontsize=8,
            rotation=0,
            ha="right",
            va="center",
        )
    figure.suptitle(
        "Synthetic images by teacher class (share of the batch), surest first", fontsize=11
    )
    return figure
