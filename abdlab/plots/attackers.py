"""What methods do to teachers that were trained for something else than their labels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from abdlab.labels import name_of
from abdlab.plots.colors import PALETTE


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
