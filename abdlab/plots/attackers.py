"""What methods do to teachers that were trained for something else than their labels, and
what an owner can prove.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from abdlab.labels import name_of
from abdlab.plots.colors import PALETTE
from abdlab.watermarks import Claim


def objectives_figure(frame: pd.DataFrame) -> Figure:
    """ACC and ASR in percent, a group of bars per training objective and a bar per method;
    of several seeds the mean, with each seed a point.

    Args:
        frame: columns objective, label, acc, asr (shares in [0, 1]).
    """
    import seaborn as sns

    shown = frame.assign(method=[name_of(label) for label in frame["label"]])
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    palette = PALETTE[: shown["method"].nunique()]
    for ax, key in zip(axes, ("acc", "asr"), strict=True):
        drawn = shown.assign(percent=100 * pd.to_numeric(shown[key]))
        common = {"data": drawn, "x": "objective", "y": "percent", "hue": "method"}
        sns.barplot(**common, ax=ax, palette=palette, errorbar=None)
        sns.stripplot(
            **common, ax=ax, palette=["black"] * len(palette), dodge=True, size=3, legend=False
        )
        ax.set(
            xlabel="what the teacher was trained for besides its labels",
            ylabel=f"{key.upper()} (% of test images)",
            ylim=(0, 105),
        )
        ax.tick_params(labelleft=True)
    axes[0].get_legend().remove()
    axes[1].legend(
        fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2
    )
    sns.despine(figure)
    return figure


def claims_figure(claims: Mapping[str, Claim], level: float) -> Figure:
    """What an owner can prove: per model the share of key images on which it predicts the
    owner's target, in percent, with the p-value beside the bar; the dashed line is the rate
    of an innocent model.

    Args:
        claims: name of a model -> the owner's case. level: p-values below it prove.
    """
    figure, ax = plt.subplots(figsize=(8, 0.5 * len(claims) + 1.2), layout="constrained")
    shown = [*claims.items()]
    for place, (_, claim) in enumerate(shown):
        proved = claim.proves(level)
        ax.barh(place, 100 * claim.share, color=PALETTE[0] if proved else "0.75")
        said = f"p = {claim.p_value:.1g}" + ("" if proved else ", not proved")
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(100 * claim.share + 1, place, said, va="center", fontsize=9, bbox=back)
    innocent = 100 * max(c.innocent for c in claims.values())
    ax.axvline(innocent, color="black", ls="--", lw=1, label="expected of an innocent model")
    ax.legend(frameon=False, loc="lower right")
    ax.set(
        yticks=range(len(shown)),
        yticklabels=[name for name, _ in shown],
        xlabel="key images that are given the owner's target (%)",
        xlim=(0, 125),
        xticks=range(0, 101, 20),
    )
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return figure
