"""Figures of what goes on inside a network: suspicion scores, maps, activations, heat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abdlab.activations import participation
from abdlab.plots.colors import PALETTE, ROLES, axes_of, class_colors, despine
from abdlab.plots.images import show


def suspicion_histogram(
    scores: Tensor,
    sigma: float = 3.0,
    ax: Axes | None = None,
    others: Mapping[str, Tensor] | None = None,
    reverse: bool = False,
) -> Axes:
    """Histogram of log10 KL(T~ || T) on synthetic images, with the line at mean - sigma
    x std; low is suspicious.

    Args:
        scores: of the student's synthetic images (N,), see :func:`abdlab.suspicion`.
        others: more score sets for comparison, drawn as outlines ("clean test",
            "triggered test").
        reverse: the scores are those of KL(T || T~), as the axis then says.
    """
    ax = axes_of(ax)
    line = (scores.mean() - sigma * scores.std(correction=0)).item()
    share = (scores < line).double().mean().item()
    everything = torch.cat([scores, *(others or {}).values()])
    bins = np.linspace(
        everything.min().item(), max(everything.max().item(), everything.min().item() + 1e-6), 60
    )
    ax.hist(
        scores.numpy(), bins, density=True, color="0.75", label=f"synthetic (n = {len(scores)})"
    )
    for i, (name, values) in enumerate((others or {}).items()):
        ax.hist(
            values.numpy(),
            bins,
            density=True,
            histtype="step",
            lw=1.5,
            color=ROLES.get(name, PALETTE[i]),
            label=f"{name} (n = {len(values)})",
        )
    ax.axvline(
        line,
        color="black",
        ls="--",
        lw=1,
        label=f"mean - {sigma:g} std: {share:.1%} of synthetic are below",
    )
    ax.set(
        xlabel=(
            f"suspicion score log10 {'KL(T || T~)' if reverse else 'KL(T~ || T)'}, KL in nats (low"
            " = suspicious)"
        ),
        ylabel="density (share of images per unit of score)",
    )
    ax.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    despine(ax)
    return ax


def participation_figure(
    changes: Mapping[str, Mapping[str, Tensor]], ax: Axes | None = None
) -> Axes:
    """In what share of its channels each layer carries the trigger, a line per model
    (:func:`abdlab.activations.participation` over the layer's channels).

    Args:
        changes: model -> layer -> (channels,), of
            :func:`abdlab.activations.triggered_change`.
    """
    ax = axes_of(ax)
    for i, (name, layers) in enumerate(changes.items()):
        shares = [participation(change) / len(change) for change in layers.values()]
        ax.plot(
            range(1, len(shares) + 1),
            shares,
            marker="o",
            color=ROLES.get(name, PALETTE[i]),
            label=name,
        )
    ax.set(
        xlabel="convolution, in the order of the network",
        ylabel="channels that carry the trigger\n(participation ratio, share of the layer)",
        ylim=(0, 1),
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8, frameon=False)
    despine(ax)
    return ax


def channels_figure(
    rows: pd.DataFrame,
    achieved: Mapping[str, str],
    ranks: Mapping[str, tuple[float, float, int]],
) -> Figure:
    """In how many channels each trigger lives, against what defenses make of it: a panel
    per figure of theirs, a point per trigger, the rank correlation above.

    Args:
        rows: columns trigger, share (in [0, 1]) and those of ``achieved``.
        achieved: column -> what its axis says.
        ranks: column -> (Spearman's rho, p-value, number of triggers).
    """
    figure, axes = plt.subplots(
        1, len(achieved), figsize=(5.5 * len(achieved), 4), layout="constrained", squeeze=False
    )
    for ax, (column, told) in zip(axes[0], achieved.items(), strict=True):
        ax.scatter(rows["share"], rows[column], s=20, color=PALETTE[0])
        places = rows[["share", column]].to_numpy(float)
        near = 0.15, 0.06  # of the axes: about a name's width and height
        apart = (places[:, None] - places) / np.maximum(np.ptp(places, axis=0), 1e-9)
        for name, at, off in zip(rows["trigger"], places, apart, strict=True):
            below = ((np.abs(off) < near).all(1) & (off[:, 1] < 0)).any()  # under another name
            ax.annotate(name, at, (4, -8 if below else 3), textcoords="offset points", fontsize=7)
        rho, p, n = ranks[column]
        ax.set_title(f"Spearman's rho {rho:+.2f}, p = {p:.3f}, {n} triggers", fontsize=9)
        ax.set(xlabel="channels that carry the trigger (share, mean of layers)", ylabel=told)
        despine(ax)
    return figure


def embedding_figure(
    points: np.ndarray, groups: Sequence[str], classes: Sequence[str], ax: Axes | None = None
) -> Axes:
    """t-SNE points (N, 2): colour by class, marker by group (clean, triggered,
    synthetic).
    """
    ax = axes_of(ax, 8.4, 5.4)
    frame = pd.DataFrame(
        {"x": points[:, 0], "y": points[:, 1], "images": groups, "teacher's class": classes}
    )
    order = sorted(set(classes), key=lambda c: (len(c), c))
    markers = {"clean": "o", "triggered": "X", "synthetic": "P"}
    import seaborn as sns

    sns.scatterplot(
        frame,
        x="x",
        y="y",
        hue="teacher's class",
        hue_order=order,
        style="images",
        markers=markers,
        palette=class_colors(len(order)),
        s=32,
        linewidth=0.3,
        ax=ax,
    )
    ax.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    ax.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    despine(ax)
    return ax


def change_heatmaps(changes: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Trigger-activated change per channel and layer: one panel per model, rows layers,
    channels sorted by change.

    Args:
        changes: label of the model -> what :func:`abdlab.activations.triggered_change`
            returned. Panels share one colour scale.
    """
    import seaborn as sns

    figure, axes = plt.subplots(
        1, len(changes), figsize=(4.3 * len(changes) + 1, 4.2), layout="constrained", squeeze=False
    )
    top = max(float(v.max()) for layers in changes.values() for v in layers.values())
    for ax, (label, layers) in zip(axes[0], changes.items(), strict=True):
        width = max(len(v) for v in layers.values())
        grid = np.full((len(layers), width), np.nan)
        for row, values in enumerate(layers.values()):
            grid[row, : len(values)] = values.sort(descending=True).values.numpy()
        last = ax is axes[0, -1]
        sns.heatmap(
            pd.DataFrame(grid, index=list(layers)),
            ax=ax,
            vmin=0,
            vmax=top,
            cmap="rocket_r",
            cbar=last,
            cbar_kws=(
                {"label": "trigger-activated change / clean norm of the layer (no unit)"}
                if last
                else None
            ),
            xticklabels=max(1, width // 8),
            yticklabels=True,
        )
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("channel, sorted by change (rank)")
        ax.tick_params(axis="y", labelsize=8, rotation=0)
    axes[0, 0].set_ylabel("convolution (module name)")
    return figure


def overlay_figure(
    rows: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]],
    captions: Mapping[str, Sequence[str]] | None = None,
    what: str = "Grad-CAM",
) -> Figure:
    """Images with heat on top: one row per (image set, model), one column per image.

    Args:
        rows: name of the image set -> (images (N, C, H, W), label of the model -> maps
            (N, h, w) in [0, 1]).
        captions: "image set/model" -> one short text per image (the prediction, say).
        what: named by the colour bar.
    """
    lines = [(name, label) for name, (_, maps) in rows.items() for label in maps]
    n = len(next(iter(rows.values()))[0])
    figure, axes = plt.subplots(
        len(lines),
        n,
        figsize=(1.15 * n + 2.2, 1.3 * len(lines) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for row, (name, label) in enumerate(lines):
        images, maps = rows[name]
        texts = (captions or {}).get(f"{name}/{label}", [""] * n)
        for column in range(n):
            ax = axes[row, column]
            show(ax, images[column], texts[column])
            height, width = images.shape[-2:]
            heat = ax.imshow(
                maps[label][column].numpy(),
                cmap="inferno",
                alpha=0.55,
                vmin=0,
                vmax=1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
        axes[row, 0].set_ylabel(f"{label}\n{name}", fontsize=8, rotation=0, ha="right", va="center")
    figure.colorbar(
        heat, ax=axes, label=f"{what}, scaled to each image's maximum (no unit)", shrink=0.6
    )
    if captions:
        figure.suptitle("Above each image: the class that the model gives it", fontsize=10)
    return figure
