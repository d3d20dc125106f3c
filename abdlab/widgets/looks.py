"""How the widgets look: one page that knows its theme, pictures that can be picked on,
and sentences for what went wrong.
"""

from __future__ import annotations

import html
import io
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import ipywidgets as w
import matplotlib
import numpy as np
import traitlets as t
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from abdlab.plots import picture
from abdlab.plots.dark import inked
from abdlab.widgets.messages import one_at_a_time

_HERE = Path(__file__).parent
#: matplotlib's state is the process's: a run's thread and a click must not draw at once
DRAWING = threading.RLock()


class Page(anywidget.AnyWidget):
    """What shows the widgets: its theme, and a beat every few seconds for as long as it
    shows them. Draws nothing.
    """

    _esm = _HERE / "page.js"
    _css = _HERE / "page.css"
    dark = t.Bool(False).tag(sync=True)
    beat = t.Float(0.0).tag(sync=True)

    def __init__(self, **more):
        self.heard: float | None = None
        super().__init__(**more)

    @t.observe("beat")
    def _hear(self, _change):
        self.heard = time.monotonic()

    def silence(self) -> float:
        """Seconds since a page last showed any widget; 0 when none ever did (a test, a
        notebook without a browser).
        """
        return 0.0 if self.heard is None else time.monotonic() - self.heard


_page: list[Page] = []


def page() -> Page:
    """The one page of this kernel."""
    if not _page:
        _page.append(Page())
        one_at_a_time()
    return _page[0]


class Themed(anywidget.AnyWidget):
    """Redraws for the page's theme for as long as a page shows what it is part of: an
    output that a rerun cell threw away lets go. Draws nothing.

    Traits:
        gone: whether every view that a page had of it is gone; False before the first.
    """

    _esm = _HERE / "themed.js"
    key = t.Unicode().tag(sync=True)
    gone = t.Bool(False).tag(sync=True)

    def __init__(self, redraw: Callable[..., Any]):
        self._redraw = redraw
        super().__init__(key=uuid4().hex)
        self._drawn_dark = page().dark
        page().observe(self._draw, "dark")

    def _draw(self, _change=None) -> None:
        self._drawn_dark = page().dark
        self._redraw()

    @t.observe("gone")
    def _turn(self, _change) -> None:
        if self.gone:
            page().unobserve(self._draw, "dark")
            return
        page().observe(self._draw, "dark")
        if self._drawn_dark != page().dark:
            self._draw()


class Picture(anywidget.AnyWidget):
    """A PNG. With ``picks`` "click" it can be clicked and walked with the arrow keys,
    with "brush" also brushed.

    Traits:
        png: bytes; none shows nothing. width: shown so many CSS pixels wide, or
        narrower where there is less room; 0: as it is. alt: what it shows, in words.
        picked: the latest pick: kind ("click", "brush", "key") and at: (x, y) or (left,
        top, right, bottom) as shares of
            the picture in [0, 1], or the step (dx, dy) of an arrow key.
    """

    _esm = _HERE / "picture.js"
    png = t.Bytes(b"").tag(sync=True)
    width = t.Int(0).tag(sync=True)
    alt = t.Unicode("").tag(sync=True)
    picks = t.Enum(["", "click", "brush"], "").tag(sync=True)
    picked = t.Dict({"kind": "", "at": [], "count": 0}).tag(sync=True)

    def on_pick(self, tell: Callable[[str, list[float]], None]) -> None:
        """Call ``tell(kind, at)`` at every pick."""
        self.observe(
            lambda change: tell(change["new"]["kind"], list(change["new"]["at"])), "picked"
        )

    def pick(self, kind: str, *at: float) -> None:
        """What the pointer does, from Python."""
        self.picked = {"kind": kind, "at": list(at), "count": self.picked["count"] + 1}

    def draw(self, figure: Figure) -> None:
        """Show a figure in the page's theme, at its own size."""
        png, width = png_of(figure, page().dark), round(96 * figure.get_figwidth())
        with self.hold_sync():  # at once: else the first picture shows before its width
            self.png, self.width = png, width


class Rows(anywidget.AnyWidget):
    """A table. ``rows`` are dicts: id, cells (texts) and, if wanted, color; ``chosen``
    holds ids, the latest ``most`` of them; 0 is any number.
    """

    _esm = _HERE / "rows.js"
    columns = t.List(t.Unicode()).tag(sync=True)
    rows = t.List(t.Dict()).tag(sync=True)
    chosen = t.List(t.Unicode()).tag(sync=True)
    most = t.Int(2).tag(sync=True)


class Copyable(anywidget.AnyWidget):
    """A text under which stands a button that copies it; nothing while it is empty."""

    _esm = _HERE / "copy.js"
    text = t.Unicode("").tag(sync=True)


def figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not know, in inches of 96 CSS pixels."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def png_of(drawn: Figure, dark: bool = False, dpi: int = 144) -> bytes:
    """The figure as PNG on a transparent ground, written in the theme's ink."""
    buffer = io.BytesIO()
    with DRAWING, inked(drawn, dark), matplotlib.rc_context({"savefig.facecolor": "none"}):
        drawn.savefig(buffer, dpi=dpi, facecolor="none", edgecolor="none")
    return buffer.getvalue()


def mosaic(
    rows: Sequence[Tensor],
    columns: int | None = None,
    side: int = 64,
    gap: int = 4,
    marks: Mapping[int, str] | None = None,
) -> bytes:
    """Images as one PNG, pixel by pixel as they are: quick enough for a slider.

    Args:
        rows: sets of images (N, C, H, W), each beginning a row of its own.
        columns: images to a row; by default the longest set's length.
        side: of an image in the picture, in pixels.
        marks: number of a place, counted along the rows -> the colour of its frame.
    """
    columns = columns or max(len(images) for images in rows)
    count = sum(-(-len(images) // columns) for images in rows)
    ground = np.zeros((count * (side + gap) + gap, columns * (side + gap) + gap, 4), np.uint8)
    line = 0
    for images in rows:
        for i, image in enumerate(images):
            row, column = line + i // columns, i % columns
            top, left = row * (side + gap) + gap, column * (side + gap) + gap
            if mark := (marks or {}).get(row * columns + column):
                color = [round(255 * c) for c in to_rgb(mark)]
                ground[top - gap : top + side + gap, left - gap : left + side + gap] = [*color, 255]
            small = Image.fromarray((picture(image) * 255).round().astype(np.uint8)).convert("RGB")
            ground[top : top + side, left : left + side, :3] = np.asarray(
                small.resize((side, side), Image.NEAREST)
            )
            ground[top : top + side, left : left + side, 3] = 255
        line += -(-len(images) // columns)
    buffer = io.BytesIO()
    Image.fromarray(ground).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Trouble(w.HTML):
    """What went wrong, as one sentence, with the details folded; nothing while
    ``error`` is None.
    """

    error = t.Any(None, allow_none=True)
    sentence = t.Unicode("")

    def __init__(self, **more):
        super().__init__(**more)
        self.layout.display = "none"

    @t.observe("error")
    def _show(self, _change):
        error = self.error
        self.sentence = "" if error is None else sentence_of(error)
        self.layout.display = "none" if error is None else ""
        if error is None:
            self.value = ""
            return
        folded = ""
        if isinstance(error, BaseException) and error.__traceback__ is not None:
            details = "".join(traceback.format_exception(error))
            folded = (
                f"<details><summary>details</summary><pre>{html.escape(details)}</pre></details>"
            )
        self.value = (
            f'<div class="abdlab-wrong" role="alert">{html.escape(self.sentence)}{folded}</div>'
        )


def sentence_of(error: BaseException | str) -> str:
    """One sentence for an error; errors that no user can mend also say their kind."""
    if isinstance(error, str):
        return error
    text = str(error).strip() or type(error).__name__
    known = isinstance(error, (ValueError, RuntimeError, FileNotFoundError))
    return text if known and "\n" not in text else f"{type(error).__name__}: {text.splitlines()[0]}"


def card(title: str, *children: w.Widget, **layout: str) -> w.VBox:
    """Widgets in a frame under a title."""
    head = [w.HTML(f'<div class="abdlab-title">{html.escape(title)}</div>')] if title else []
    box = w.VBox([*head, *children], layout=w.Layout(**layout))
    box.add_class("abdlab-card")
    return box


def row(*children: w.Widget, **layout: str) -> w.HBox:
    """Widgets side by side; they wrap where there is no room."""
    return w.HBox(
        children,
        layout=w.Layout(
            **{"flex_flow": "row wrap", "align_items": "flex-start", "grid_gap": "8px", **layout}
        ),
    )


def said(text: str = "", kind: str = "said") -> w.HTML:
    """A line of text. Kinds: said, quiet, empty (for what is not there yet)."""
    line = w.HTML()
    say(line, text, kind)
    return line


def say(line: w.HTML, text: str, kind: str = "said") -> None:
    """Put a text on a line that :func:`said` made."""
    line.value = f'<div class="abdlab-{kind}">{html.escape(text)}</div>' if text else ""


def wait(line: w.HTML, text: str) -> None:
    """Put a text on a line that :func:`said` made, under a bar that the page moves while
    the kernel computes.
    """
    words = html.escape(text)
    bar = f'<progress aria-label="{words}"></progress>'
    line.value = f'<div class="abdlab-empty" role="status">{bar}{words}</div>'


def button(
    text: str, do: Callable[[], None], tooltip: str = "", style: str = "", width: str = "auto"
) -> w.Button:
    """A button that calls ``do()``."""
    made = w.Button(
        description=text, tooltip=tooltip or text, button_style=style, layout=w.Layout(width=width)
    )
    made.on_click(lambda _button: do())
    return made


def telling(trouble: Trouble, do: Callable[[], Any]) -> Callable[..., None]:
    """A callback for buttons and traits that does ``do()`` and shows what it raises: a
    page that answers nothing looks frozen.

    >>> trouble = Trouble()
    >>> telling(trouble, lambda: int("five"))()
    >>> trouble.sentence
    "invalid literal for int() with base 10: 'five'"
    """

    def callback(*_event) -> None:
        try:
            do()
        except Exception as error:
            trouble.error = error

    return callback


def scores(pairs: Sequence[tuple[str, str]]) -> str:
    """Numbers with their names under one another, as HTML: (name, value) each."""
    return "".join(
        f'<span class="abdlab-score">{html.escape(k)}<b>{html.escape(v)}</b></span>'
        for k, v in pairs
    )


def percent(share: float | None) -> str:
    """A share as a percentage; an en dash where there is none."""
    return "–" if share is None or share != share else f"{share:.1%}"


def follow_theme(widget: w.Box, redraw: Callable[..., Any]) -> None:
    """Call ``redraw()`` at a change of the theme while a page shows the widget."""
    widget.children = (*widget.children, Themed(redraw))


def dress(widget: w.DOMWidget) -> None:
    """Make a widget one of ours: its class, and the page's style and beat with it."""
    widget.add_class("abdlab")
    widget.children = (page(), *widget.children)
