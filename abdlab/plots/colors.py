"""One colour per kind of model, whatever the source; the palette is seaborn's
colour-blind one as far as it goes.
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from abdlab.labels import Label

#: seaborn's "colorblind": loading seaborn takes a second, which a workbench's first
#: picture need not wait for
PALETTE = (
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#949494",
    "#ece133",
    "#56b4e9",
)

#: lines of runs: far apart from each other, none pale, none the floor's
_RUNS = tuple(PALETTE[i] for i in (0, 1, 4, 9, 3))
#: colours of runs, until they begin again
_MOST = 40

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


def despine(ax: Axes) -> None:
    """Leave an axes its left and lower line alone."""
    ax.spines[["top", "right"]].set_visible(False)


def class_colors(count: int) -> list:
    """A colour per class: tab10 as far as it goes, else hues around the circle."""
    import seaborn as sns

    return sns.color_palette("tab10" if count <= 10 else "husl", count)


def distinct_colors(count: int) -> list[str]:
    """So many colours for lines that stand for runs, ``#rrggbb``: of the colour-blind
    palette first, then each as far from all before it, and from the floor's and the
    teacher's, as CIELAB tells. The first ones are the same whatever the count; after 40
    they begin again.

    >>> distinct_colors(30)[:12] == distinct_colors(12)
    True
    """
    return [_far_apart()[i % _MOST] for i in range(count)]


@cache
def _far_apart() -> list[str]:
    from skimage.color import rgb2lab

    grid = itertools.product(np.arange(36) / 36, (0.28, 0.42, 0.58), (0.35, 0.65, 0.95))
    colors = [colorsys.hls_to_rgb(*place) for place in grid]
    taken = [*_RUNS, COLORS["clean"], COLORS["teacher"], "#ffffff", "#000000"]
    places, known = rgb2lab(np.array([colors]))[0], rgb2lab(np.array([[*map(to_rgb, taken)]]))[0]
    nearest = np.linalg.norm(places[:, None] - known[None], axis=2).min(1)
    found = list(_RUNS)
    while len(found) < _MOST:
        best = int(nearest.argmax())
        found.append(to_hex(colors[best]))
        nearest = np.minimum(nearest, np.linalg.norm(places - places[best], axis=1))
    return found


def axes_of(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """The given axes, or those of a new figure of that size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax
