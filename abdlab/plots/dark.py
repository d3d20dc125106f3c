"""Figures on a dark ground: a page's theme changes what they are written with, never what
they say.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import Collection, QuadMesh
from matplotlib.colors import to_rgb, to_rgba_array
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.text import Text

from abdlab.stream import HEADLESS

#: what figures write and draw lines with, in the light and in the dark theme
INK = {False: "#333333", True: "#d6d6d6"}
#: JupyterLab's dark ground, and how far colours stand out from it (WCAG's contrast)
GROUND, CONTRAST = "#111111", 3.0


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB colours (..., 3) in [0, 1], as WCAG 2 has it.

    >>> luminance(np.array([[0.0, 0, 0], [1, 1, 1]])).round(3).tolist()
    [0.0, 1.0]
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def legible(colors: Any) -> np.ndarray:
    """Colours as RGBA (N, 4) that stand out from the dark ground: those that do not are
    mixed with white, as little as is enough; opacity stays.

    >>> legible("#1b1f8a").round(2).tolist(), legible("gold").round(2).tolist()
    ([[0.34, 0.35, 0.66, 1.0]], [[1.0, 0.84, 0.0, 1.0]])
    """
    rgba = to_rgba_array(colors).copy()
    wanted = CONTRAST * (luminance(np.array(to_rgb(GROUND))) + 0.05)
    for color in rgba:
        for share in np.linspace(0, 1, 51):
            mixed = (1 - share) * color[:3] + share
            if luminance(mixed) + 0.05 >= wanted:
                color[:3] = mixed
                break
    return rgba


@contextmanager
def inked(figure: Figure, dark: bool) -> Iterator[Figure]:
    """The figure without its grounds and written in the theme's ink, until the block
    ends: black lines and grey text take the ink; in the dark theme, colours that would
    drown are lightened. What stands on an image or a heatmap stays as it is.
    """
    undo: list[Callable[[], Any]] = []

    def put(artist: Artist, name: str, value: Any) -> None:
        before = getattr(artist, f"get_{name}")()
        undo.append(lambda: getattr(artist, f"set_{name}")(before))
        getattr(artist, f"set_{name}")(value)

    def paint(artist: Artist, name: str) -> None:
        """Black becomes ink; what is too dark for a dark ground becomes lighter."""
        before = to_rgba_array(getattr(artist, f"get_{name}")())
        after = legible(before) if dark else before.copy()
        after[(before[:, :3] == 0).all(1), :3] = to_rgb(INK[dark])
        if len(before) and (before != after).any():
            put(artist, name, after if isinstance(artist, Collection) else tuple(after[0]))

    try:
        for ax in figure.axes:
            _ground(ax, put, undo, INK[dark])
        stay = {text for ax in figure.axes for text in _on_a_picture(ax)}
        for line in figure.findobj(Line2D):  # those of legends too
            for name in ("color", "markeredgecolor", "markerfacecolor"):
                paint(line, name)
        for text in figure.findobj(Text):
            if text in stay or len(set(to_rgb(text.get_color()))) > 1:
                continue
            put(text, "color", INK[dark])
            box = text.get_bbox_patch()
            if dark and box and to_rgb(box.get_facecolor()) == (1, 1, 1):
                put(box, "facecolor", GROUND)
        grounds = {figure.patch, *(ax.patch for ax in figure.axes)}
        for patch in figure.findobj(Patch) if dark else ():  # bars; boxes around text stay
            if patch not in grounds and not isinstance(patch, FancyBboxPatch) and patch.get_fill():
                paint(patch, "facecolor")
        for marks in figure.findobj(Collection):
            if not isinstance(marks, QuadMesh) and marks.get_array() is None:
                paint(marks, "facecolor")
                paint(marks, "edgecolor")
        yield figure
    finally:
        for back in reversed(undo):
            back()


def _on_a_picture(ax: Axes) -> list[Text]:
    """The texts whose middle lies on the axes' image or heatmap."""
    if not any(isinstance(part, AxesImage | QuadMesh) for part in ax.get_children()):
        return []
    boxes = [(text, text.get_window_extent()) for text in ax.texts if text.get_text()]
    return [t for t, box in boxes if ax.bbox.contains((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)]


def _ground(
    ax: Axes, put: Callable[[Artist, str, Any], None], undo: list[Callable[[], Any]], ink: str
) -> None:
    put(ax, "facecolor", "none")
    for spine in ax.spines.values():
        put(spine, "edgecolor", ink)
    for axis in (ax.xaxis, ax.yaxis):
        before = axis.get_tick_params()
        old = matplotlib.rcParams[f"{axis.axis_name}tick.color"]
        color, label = before.get("color", old), before.get("labelcolor", old)
        undo.append(
            lambda axis=axis, color=color, label=label: axis.set_tick_params(
                color=color, labelcolor=label
            )
        )
        axis.set_tick_params(color=ink, labelcolor=ink)
    if legend := ax.get_legend():
        put(legend.get_frame(), "facecolor", "none")
        put(legend.get_frame(), "edgecolor", "none")


def in_words(figure: Figure) -> str:
    """A figure's titles in one line, for who cannot see it."""
    parts = [figure.get_suptitle()] + [
        ax.get_title() or " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        for ax in figure.axes
    ]
    parts = [" ".join(part.split()) for part in parts]
    return "; ".join(dict.fromkeys(filter(None, parts))) or "figure"


#: shown by the page's theme; whoever strips styles shows the light one
_STYLE = """<style>
:is(body[data-jp-theme-light="false"], body.vscode-dark) .abdlab-light {display: none}
:is(body[data-jp-theme-light="false"], body.vscode-dark) .abdlab-dark {display: block !important}
</style>"""


def follow_theme() -> bool:
    """Show figures of this notebook in the page's theme from now on, light or dark, also
    when the theme changes later.

    Does nothing without a kernel, and where a notebook runs headlessly: there is no page.
    A viewer that strips styles shows the light picture.

    Returns:
        whether figures follow.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None or os.environ.get(HEADLESS):
        return False
    # the inline backend, once it wakes, clears what is known of Figure, not of its base
    shell.display_formatter.formatters["text/html"].for_type(FigureBase, both_ways)
    return True


def both_ways(figure: Figure) -> str:
    """A figure as HTML: two PNGs, of which JupyterLab shows the one that suits its theme."""
    from IPython.core.pylabtools import print_figure

    words = html.escape(in_words(figure), quote=True)
    light = print_figure(figure, base64=True)
    with inked(figure, True):
        dark = print_figure(figure, base64=True, facecolor="none", edgecolor="none")
    kinds = (("light", light, ""), ("dark", dark, ' style="display: none"'))
    return _STYLE + "".join(
        f'<img class="abdlab-{kind}" alt="{words}" src="data:image/png;base64,{png}"{style}>'
        for kind, png, style in kinds
    )
