"""Figures of what a purifier sees and does: costs, inverted triggers, bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abdlab.attacks.triggers import Trigger
from abdlab.inversion import Bank
from abdlab.plots.colors import COLORS, ROLES, axes_of, despine
from abdlab.plots.images import show


def cost_heatmap(
    table: Tensor,
    families: Sequence[str],
    classes: Sequence[str],
    suspects: Sequence[int] = (),
    ax: Axes | None = None,
) -> Axes:
    """What the cheapest trigger of every class costs in every family, in nats: cheap is
    dark, relative to the family's median class; suspects are framed.

    Args:
        table: (classes, families), see :func:`abdlab.inversion.costs`.
        suspects: class numbers, see :func:`abdlab.inversion.suspects`.
    """
    import seaborn as sns

    ax = axes_of(ax, 1.3 * len(families) + 2.6, 0.34 * len(classes) + 1.4)
    values = table.double().clamp_min(1e-6)
    relative = (values / values.median(0).values).log2()
    reach = max(1.0, float(relative.abs().max()))
    sns.heatmap(
        pd.DataFrame(relative.numpy(), index=list(classes), columns=list(families)),
        ax=ax,
        annot=values.numpy(),
        fmt=".2f",
        cmap="vlag_r",
        vmin=-reach,
        vmax=reach,
        cbar_kws={"label": "log2 of cost / the family's median (no unit)"},
        annot_kws={"fontsize": 8},
    )
    for c in suspects:
        ax.add_patch(plt.Rectangle((0, c), len(families), 1, fill=False, ec=ROLES["target"], lw=3))
    ax.set(
        xlabel="family of triggers (numbers: cost in nats)",
        ylabel="class that images are turned into",
    )
    ax.tick_params(axis="y", rotation=0)
    named = ", ".join(classes[c] for c in suspects) or "none"
    ax.set_title(f"suspects (framed): {named}", fontsize=10)
    return ax


def trigger_bank_figure(images: Tensor, trigger: Trigger | None, bank: Bank) -> Figure:
    """The true trigger, where it is known, beside the cheapest inverted one of each
    family: above on the images, below its difference, brightened to fill the range.

    Args:
        images: (N, C, H, W) in [0, 1]; the first is shown.
    """
    image, families = images[:1], list(dict.fromkeys(t.family for t in bank))
    columns = {f"true: {trigger.name}": trigger(image)} if trigger else {}
    for family in families:
        cheapest = min((t for t in bank if t.family == family), key=lambda t: t.cost)
        columns[f"{family}\n{cheapest.cost:.2f} nats"] = cheapest(image)
    figure, axes = plt.subplots(
        2,
        len(columns) + 1,
        figsize=(1.5 * (len(columns) + 1), 3.6),
        layout="constrained",
        squeeze=False,
    )
    show(axes[0, 0], image[0], "without\n")
    axes[1, 0].axis("off")
    for (above, below), (name, shown) in zip(axes[:, 1:].T, columns.items(), strict=True):
        show(above, shown[0], name)
        difference = (shown - image)[0].abs()
        show(below, difference / difference.max().clamp_min(1e-6))
    axes[1, 1].set_ylabel("|difference|")
    return figure


def beyond_figure(shares: Mapping[str, Mapping[str, float]], k: float) -> Axes:
    """Share of activations beyond the bound by layer, one line per set of images.

    Args:
        shares: name of the images -> what :func:`abdlab.purifiers.beyond` returned.
    """
    layers = list(next(iter(shares.values())))
    ax = axes_of(None, 0.45 * len(layers) + 3, 3.6)
    for name, values in shares.items():
        color = ROLES.get(f"{name} test", ROLES["looked at"])
        percent = [100 * values[layer] for layer in layers]
        ax.plot(range(len(layers)), percent, "o-", ms=4, color=color, label=name)
    ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
    ax.set(
        xlabel="batch norm (module name), from input to output",
        ylabel=f"activations beyond {k:g} std (%)",
        ylim=(0, None),
    )
    ax.legend(frameon=False, fontsize=8)
    despine(ax)
    return ax


def bound_figure(curve: pd.DataFrame, chosen: float | None = None) -> Axes:
    """ACC, ASR and agreement against k, and the k that was chosen without looking at
    the first two.

    Args:
        curve: columns k, acc, asr, agreement in [0, 1], see
            :func:`abdlab.inspection.bound_curve`; asr may be missing.
    """
    ax = axes_of(None, 6.4, 3.6)
    looks = {"acc": ("ACC", "-", COLORS["teacher"]), "asr": ("ASR", "--", ROLES["target"])}
    looks["agreement"] = ("agreement on synthetic images", ":", ROLES["looked at"])
    for column, (name, style, color) in looks.items():
        if column in curve and np.isfinite(curve[column].astype(float)).any():
            ax.plot(
                curve["k"], 100 * curve[column], style, marker="o", ms=3, color=color, label=name
            )
    if chosen is not None:
        ax.axvline(chosen, color="black", lw=1, label=f"chosen from the agreement: k = {chosen:g}")
    ax.set(xlabel="bound k (standard deviations)", ylabel="share of images (%)", ylim=(-3, 103))
    ax.legend(frameon=False, fontsize=8, loc="center right")
    despine(ax)
    return ax
