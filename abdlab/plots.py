"""Figures. Each takes ``ax=None`` (or makes its own figure when it needs several
panels), returns it, and never shows it.

One colour per kind of model, everywhere; the palette is seaborn's colour-blind one.
Synthetic images may leave [0, 1]: they are clamped for display.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abdlab.attacks.triggers import Trigger
from abdlab.labels import in_order, name_of

_PALETTE = sns.color_palette("colorblind").as_hex()
#: teacher, clean KD, or a student's defences ("" when it has none) -> colour, whatever
#: the source
COLORS = {
    "teacher": "#4d4d4d",
    "clean": _PALETTE[2],
    "": _PALETTE[3],
    "sv": _PALETTE[0],
    "sr": _PALETTE[1],
    "sv+sr": _PALETTE[4],
}


def color_of(label: str) -> str:
    """The colour of a model by its label: teacher, clean, or a source with its defences
    ("cmi+sv").
    """
    return COLORS.get(
        label if label in ("teacher", "clean") else label.partition("+")[2], "#999999"
    )


def _axes(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


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
    ax = _axes(ax, 0.75 * columns, 0.75 * rows + 0.4)
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
                COLORS[""] if label == target else None,
            )
    axes[0, 0].set_ylabel("clean", fontsize=9)
    axes[1, 0].set_ylabel("triggered", fontsize=9)
    figure.suptitle(
        f"What the model says (orange: the target class, {classes[target]})", fontsize=11
    )
    return figure


def training_curves(
    history: pd.DataFrame,
    ax: Axes | None = None,
    floor: float | None = None,
    step: str = "pseudo-batch",
) -> Axes:
    """ACC (solid) and ASR (dashed) in percent over training, one colour per label of
    the history.

    Args:
        history: of one or many runs, with columns label, step, acc, and asr where
            measured.
        floor: the clean-KD student's ASR as a share, drawn as a dotted line.
    """
    ax = _axes(ax)
    measured = history.dropna(subset=["acc"])
    for label, part in measured.groupby("label", sort=False):
        color = color_of(label)
        ax.plot(
            part["step"],
            100 * part["acc"],
            color=color,
            marker="o",
            ms=3,
            label=f"{name_of(label)}: ACC",
        )
        if "asr" in part and part["asr"].notna().any():
            ax.plot(
                part["step"],
                100 * part["asr"],
                color=color,
                marker="s",
                ms=3,
                ls="--",
                label=f"{name_of(label)}: ASR",
            )
    if floor is not None:
        ax.axhline(
            100 * floor, color=COLORS["clean"], ls=":", label=f"clean KD: ASR (floor) {floor:.1%}"
        )
    ax.set(xlabel=f"training step ({step})", ylabel="share of test images (%)", ylim=(-3, 103))
    ax.legend(fontsize=8, frameon=False, loc="best")
    sns.despine(ax=ax)
    return ax


def branch_curves(
    histories: Mapping[str, pd.DataFrame], axes: Sequence[Axes], floor: float | None = None
) -> None:
    """ACC (first axes) and ASR (second) in percent over training, one line per run,
    each with a dash and a marker of its own.

    Args:
        histories: name of the run -> its history; colours are those of the runs'
            methods.
        floor: the clean-KD student's ASR as a share, drawn as a dotted line.
    """
    looks = itertools.cycle(
        zip(
            "os^DvPX",
            ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 2))],
            strict=True,
        )
    )
    for (name, history), (marker, dash) in zip(histories.items(), looks):  # noqa: B905 (the looks have no end)
        measured = history.dropna(subset=["acc"]) if "acc" in history else history.iloc[:0]
        if measured.empty:
            continue
        color = color_of(measured["label"].iloc[0])
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
            100 * floor, color=COLORS["clean"], ls=":", label=f"clean KD (floor) {floor:.1%}"
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
    ax = _axes(ax)
    known = {"label", "step", "seconds", "acc", "asr", "events"}
    for name in [c for c in history.columns if c not in known]:
        part = history.dropna(subset=[name])
        ax.plot(part["step"], part[name], lw=1, label=name)
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set(xlabel="training step (pseudo-batch)", ylabel="loss term, weight included (nats)")
    ax.legend(fontsize=8, frameon=False)
    sns.despine(ax=ax)
    return ax


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
    ax = _axes(ax)
    line = (scores.mean() - sigma * scores.std(correction=0)).item()
    share = (scores < line).double().mean().item()
    everything = torch.cat([scores, *(others or {}).values()])
    bins = np.linspace(
        everything.min().item(), max(everything.max().item(), everything.min().item() + 1e-6), 60
    )
    ax.hist(
        scores.numpy(), bins, density=True, color="0.75", label=f"synthetic (n = {len(scores)})"
    )
    colors = {"clean test": COLORS["clean"], "triggered test": COLORS[""]}
    for i, (name, values) in enumerate((others or {}).items()):
        ax.hist(
            values.numpy(),
            bins,
            density=True,
            histtype="step",
            lw=1.5,
            color=colors.get(name, _PALETTE[i]),
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
    sns.despine(ax=ax)
    return ax


def class_colors(count: int) -> list:
    """A colour per class: tab10 as far as it goes, else hues around the circle."""
    return sns.color_palette("tab10" if count <= 10 else "husl", count)


def embedding_figure(
    points: np.ndarray, groups: Sequence[str], classes: Sequence[str], ax: Axes | None = None
) -> Axes:
    """t-SNE points (N, 2): colour by class, marker by group (clean, triggered,
    synthetic).
    """
    ax = _axes(ax, 8.4, 5.4)
    frame = pd.DataFrame(
        {"x": points[:, 0], "y": points[:, 1], "images": groups, "teacher's class": classes}
    )
    order = sorted(set(classes), key=lambda c: (len(c), c))
    markers = {"clean": "o", "triggered": "X", "synthetic": "P"}
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
    sns.despine(ax=ax)
    return ax


def change_heatmaps(changes: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Trigger-activated change per channel and layer: one panel per model, rows layers,
    channels sorted by change.

    Args:
        changes: label of the model -> what :func:`abdlab.activations.triggered_change`
            returned. Panels share one colour scale.
    """
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


def ablation_figure(results: pd.DataFrame) -> Figure:
    """ACC and ASR in percent per method: bars are means over seeds, lines one standard
    deviation, dots the seeds.

    Args:
        results: one row per method and seed, columns label, seed, acc, asr (shares).
    """
    order = in_order(results["label"])
    floor = results.loc[results["label"] == "clean", "asr"].mean()
    figure, axes = plt.subplots(
        1, 2, figsize=(10.5, 0.5 * len(order) + 1.4), layout="constrained", sharey=True
    )
    seeds = results["seed"].nunique()
    for ax, column, text in zip(
        axes,
        ("acc", "asr"),
        (
            "ACC: clean test images classified right (%)",
            "ASR: triggered test images called the target (%)",
        ),
        strict=True,
    ):
        for y, label in enumerate(order):
            values = 100 * results.loc[results["label"] == label, column]
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
        axes[1].axvline(
            100 * floor, color=COLORS["clean"], ls=":", lw=1.5, label="floor (clean KD)"
        )
        axes[1].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axes[0].invert_yaxis()
    figure.suptitle(
        f"Mean over {seeds} seed{'s' if seeds != 1 else ''}"
        + (", one standard deviation, each seed a dot" if seeds > 1 else ""),
        fontsize=10,
    )
    return figure
