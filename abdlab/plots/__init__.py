"""Figures. Each takes ``ax=None`` (or makes its own figure when it needs several
panels), returns it, and never shows it. This module hands names on and defines nothing.

One colour per kind of model, everywhere (:mod:`abdlab.plots.colors`). Synthetic images
may leave [0, 1]: they are clamped for display.
"""

from abdlab.plots.attackers import claims_figure, objectives_figure
from abdlab.plots.colors import COLORS, ROLES, class_colors, color_of, distinct_colors
from abdlab.plots.confusion import confusion_figure
from abdlab.plots.curves import ablation_figure, branch_curves, loss_curves, training_curves
from abdlab.plots.dark import follow_theme
from abdlab.plots.images import (
    montage,
    picture,
    prediction_figure,
    samples_by_class,
    samples_over_training,
    show,
    trigger_figure,
    trigger_gallery,
)
from abdlab.plots.inside import (
    change_heatmaps,
    channels_figure,
    embedding_figure,
    overlay_figure,
    participation_figure,
    suspicion_histogram,
)
from abdlab.plots.many_runs import many_runs
from abdlab.plots.purified import beyond_figure, bound_figure, cost_heatmap, trigger_bank_figure
from abdlab.plots.verdict import audit_figure, inverted_figure

__all__ = [
    "COLORS",
    "ROLES",
    "ablation_figure",
    "audit_figure",
    "beyond_figure",
    "bound_figure",
    "branch_curves",
    "change_heatmaps",
    "channels_figure",
    "claims_figure",
    "class_colors",
    "color_of",
    "confusion_figure",
    "cost_heatmap",
    "distinct_colors",
    "embedding_figure",
    "follow_theme",
    "inverted_figure",
    "loss_curves",
    "many_runs",
    "montage",
    "objectives_figure",
    "overlay_figure",
    "participation_figure",
    "picture",
    "prediction_figure",
    "samples_by_class",
    "samples_over_training",
    "show",
    "suspicion_histogram",
    "training_curves",
    "trigger_bank_figure",
    "trigger_figure",
    "trigger_gallery",
]
