"""One colour per kind of model, whatever the source; the palette is seaborn's
colour-blind one as far as it goes.
"""

from __future__ import annotations

import colorsys
import hashlib

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes

from abdlab.labels import Label

PALETTE = sns.color_palette("colorblind").as_hex()

#: teachers, clean KD, or all that defends a student ("" when nothing does) -> colour
COLORS = {
    "teacher": "#4d4d4d",
    "clean_teacher": "#999999",
    "clean": PALETTE[2],
    "": PALETTE[3],
    "sv": PALETTE[0],
    "sr": PALETTE[1],
    "sv+sr": PALETTE[4],
    "tu": PALETTE[5],
    "sv+tu": PALETTE[9],
    "tc": "#8c7a00",
    "bounded/": "#6a3d9a",
    "bounded/tu": "#b8004c",
    "bounded/tc": "#5c7a29",
    "bounded+unlearn/": "#1b1f8a",
    "unlearn+bounded/": "#3f4bc4",
    "bounded+unlearn/tu": "#7a1f1f",
    "bounded+unlearn/tc": "#00706b",
}

#: what a figure marks, other than a model -> colour
ROLES = {
    "floor": COLORS["clean"],  # the clean-KD student's ASR
    "target": COLORS[""],  # what the attacker wants
    "clean test": COLORS["clean"],
    "triggered test": COLORS[""],
    "selected": PALETTE[1],  # orange
    "looked at": PALETTE[0],  # blue
    "teacher": "#8c8c8c",
    "shuffled teacher": PALETTE[6],  # pink: beside a student of any colour
}


def color_of(label: str | Label) -> str:
    """The colour of a model by its label, ``#rrggbb``: one per defense, whatever the
    source, the same in every process. Combinations that :data:`COLORS` does not name
    have a colour of their own too, drawn from their name.

    >>> color_of("cmi+sv") == color_of("zskt+sv") == COLORS["sv"]
    True
    >>> color_of("zskt+my_pkg.mine:Noise") == color_of("zskt+my_pkg.mine:Hiss")
    False
    """
    if str(label) in COLORS:
        return COLORS[str(label)]
    try:
        kind = Label.parse(label).defense
    except ValueError:
        kind = str(label)
    return COLORS[kind] if kind in COLORS else _drawn(kind)


def _drawn(name: str) -> str:
    """A colour of middling lightness, the hue drawn from the name."""
    digest = hashlib.sha256(name.encode()).digest()
    hue, dark = int.from_bytes(digest[:2], "big") / 2**16, digest[2] / 255
    red, green, blue = colorsys.hls_to_rgb(hue, 0.38 + 0.16 * dark, 0.65)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def class_colors(count: int) -> list:
    """A colour per class: tab10 as far as it goes, else hues around the circle."""
    return sns.color_palette("tab10" if count <= 10 else "husl", count)


def axes_of(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """The given axes, or those of a new figure of that size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax
