"""Any number of runs in one interactive figure, as a plain description that plotly draws:
``plotly.graph_objects.Figure(many_runs(...))``. No plotting library is loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from abdlab.labels import FLOOR, TEACHER, in_order, name_of
from abdlab.plots.colors import color_of, distinct_colors
from abdlab.plots.run_words import Shown, legends, marks, same_but_seed

#: views of scores -> the columns that they show
SCORES = {"ACC and ASR": ("acc", "asr"), "ACC": ("acc",), "ASR": ("asr",)}
#: the view of the ends of all runs
END = "ACC against ASR at the end"
#: columns of a history that are no losses
_NO_LOSS = {"label", "step", "seconds", "acc", "asr", "events", "run"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = {
    "turned": "diamond",
    "begins": "triangle-right",
    "ends": "square",
    "other": "circle-open",
}
#: how a hover text begins: with the legend's line
_WHO = "%{fullData.name}<br>"
#: pixels: the height of all panels, and of a line of the legend
_PANELS, _LINE = 400, 19
#: between two panels, as a share of the figure
_GAP = 0.06
_REFERENCES = {TEACHER: "dash", FLOOR: "dot"}


def views_of(runs: Sequence[Shown]) -> list[str]:
    """What can be shown of these runs: the scores, their ends, and each loss by its
    column's name.
    """
    losses = dict.fromkeys(c for run in runs for c in run.history.columns if c not in _NO_LOSS)
    return [*SCORES, END, *losses]


def smoothed(values: Sequence[float], weight: float) -> np.ndarray:
    """The values' exponential moving average, freed of its beginning's bias (as Adam
    frees its moments); the values themselves at a weight of 0.

    >>> smoothed([1.0, 3.0], 0.5).round(4).tolist()  # (0.25 * 1 + 0.5 * 3) / 0.75
    [1.0, 2.3333]

    Raises:
        ValueError: for a weight outside [0, 1).
    """
    if not 0 <= weight < 1:
        raise ValueError(f"the smoothing is a weight in [0, 1), not {weight}")
    found, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight**i))
    return np.array(found)


def band(group: Sequence[Shown], column: str) -> pd.DataFrame:
    """One column over the seeds of one method: by step, mean, low, high, and n, how many
    seeds; where all seeds that have the column measured it.
    """
    parts = [
        run.history.dropna(subset=[column]).drop_duplicates("step", keep="last").set_index("step")
        for run in group
        if column in run.history and "step" in run.history
    ]
    parts = [part[column].astype(float) for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=["step", "mean", "low", "high", "n"])
    every = pd.concat(parts, axis=1, join="inner").sort_index()
    found = {"mean": every.mean(axis=1), "low": every.min(axis=1), "high": every.max(axis=1)}
    return pd.DataFrame({**found, "n": len(parts)}).reset_index(names="step")


def many_runs(
    runs: Sequence[Shown],
    references: Sequence[Shown] = (),
    *,
    view: str = "ACC and ASR",
    seeds: bool = True,
    smoothing: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
    marked: bool = True,
    ink: str = "#333333",
) -> dict[str, Any]:
    """The figure as plotly's plain description: {"data": [...], "layout": {...}}.

    A run has one colour and one line of the legend, which says what sets it apart.
    Hovering tells the value as measured, also where the line is smoothed. What happened
    in a run (a weight was turned, a defense began or ended) is a mark on its line.

    Args:
        references: teachers and clean-KD students, drawn as level lines; the mean over
            those of one method.
        view: one of :func:`views_of`.
        seeds: runs that differ in nothing but the seed are one line, their mean, in a
            band from the lowest to the highest; the legend says how many.
        smoothing: weight of :func:`smoothed`, in [0, 1).
        log_x, log_y: logarithmic axes. A value of 0 or less is then left out.
        marked: draw the marks.
        ink: colour of text and axes.

    Raises:
        ValueError: for a view or a smoothing that there is not.
    """
    if view not in views_of(runs):
        raise ValueError(f"the view is one of {', '.join(views_of(runs))}, not {view!r}")
    groups = same_but_seed(runs) if seeds else [[run] for run in runs]
    names = _names(groups)
    looks = [
        {"color": color, "dash": _DASHES[i // 10 % len(_DASHES)]}
        for i, color in enumerate(distinct_colors(len(groups)))
    ]
    if view == END:
        data = [*_ends(groups, names, looks), *_reference_ends(references)]
        axes = {"xaxis": _axis("ASR (%)", log_x), "yaxis": _axis("ACC (%)", log_y)}
        axes["yaxis"]["domain"] = [0, 1]
        return {"data": data, "layout": _layout(axes, ink, data)}
    columns, data = SCORES.get(view, (view,)), []
    longest = max((int(run.history["step"].max()) for run in runs if len(run.history)), default=1)
    for place, column in enumerate(columns):
        y, percent = f"y{place + 1}" if place else "y", column in ("acc", "asr")
        for group, name, look in zip(groups, names, looks, strict=True):
            line = band(group, column)
            line = line[line["mean"] > 0] if log_y else line
            if line.empty:
                continue
            shared = {"yaxis": y, "legendgroup": name, "name": name}
            data += _curve(line, column, look, shared, smoothing, percent, first=not place)
            if marked:
                data += _marked(group, line, look, shared, smoothing, percent)
        if percent:
            data += _levels(references, column, longest, y, first=not place)
    bottom = f"y{len(columns)}" if len(columns) > 1 else "y"
    axes = {"xaxis": {**_axis("training step (pseudo-batch)", log_x), "anchor": bottom}}
    for place, column in enumerate(columns):
        title = f"{column.upper()} (%)" if column in ("acc", "asr") else f"{column} (nats)"
        lowest, highest = 1 - (place + 1) / len(columns), 1 - place / len(columns)
        gap = _GAP if place + 1 < len(columns) else 0
        axes[f"yaxis{place + 1 if place else ''}"] = {
            **_axis(title, log_y),
            "domain": [lowest + gap, highest],
        }
    return {"data": data, "layout": _layout(axes, ink, data)}


def _names(groups: Sequence[Sequence[Shown]]) -> list[str]:
    """The legend's lines; where a line stands for several seeds, it says so."""
    alone = [group[0] for group in groups]
    if any(len(group) > 1 for group in groups):  # a band's first seed sets nothing apart
        alone = [
            replace(run, name=run.name.partition("@")[0], seed=None) if len(group) > 1 else run
            for run, group in zip(alone, groups, strict=True)
        ]
    return [
        f"{text} ({len(group)} seeds)" if len(group) > 1 else text
        for text, group in zip(legends(alone), groups, strict=True)
    ]


def exact(value: float, percent: bool) -> str:
    """A value as hovering tells it: a share in percent with two digits behind the point,
    a loss with six digits.

    >>> exact(0.97799998, True), exact(0.0123456789, False)
    ('97.80 %', '0.0123457')
    """
    return f"{100 * value:.2f} %" if percent else f"{value:.6g}"


def _curve(
    line: pd.DataFrame,
    column: str,
    look: Mapping[str, str],
    shared: Mapping[str, Any],
    smoothing: float,
    percent: bool,
    first: bool,
) -> Iterator[dict]:
    scale, x = 100 if percent else 1, line["step"].tolist()
    spoken = column.upper() if percent else column
    if (line["n"] > 1).any():
        edges = {**shared, "x": x, "mode": "lines", "showlegend": False, "hoverinfo": "skip"}
        edges["line"] = {"width": 0, "color": look["color"]}
        yield {**edges, "y": (scale * smoothed(line["low"], smoothing)).tolist()}
        yield {
            **edges,
            "y": (scale * smoothed(line["high"], smoothing)).tolist(),
            "fill": "tonexty",
            "fillcolor": _faint(look["color"]),
        }
    told = [
        exact(row.mean_, percent)
        + (
            f" (mean of {row.n}: {exact(row.low, percent)} to {exact(row.high, percent)})"
            * (row.n > 1)
        )
        for row in line.rename(columns={"mean": "mean_"}).itertuples()
    ]
    yield {
        **shared,
        "type": "scatter",
        "x": x,
        "y": (scale * smoothed(line["mean"], smoothing)).tolist(),
        "customdata": told,
        "mode": "lines+markers" if len(x) < 80 else "lines",
        "line": {**look, "width": 2},
        "marker": {"size": 5},
        "showlegend": first,
        "hovertemplate": f"{_WHO}step %{{x}}: {spoken} %{{customdata}}<extra></extra>",
    }


def _marked(
    group: Sequence[Shown],
    line: pd.DataFrame,
    look: Mapping[str, str],
    shared: Mapping[str, Any],
    smoothing: float,
    percent: bool,
) -> list[dict]:
    """The marks of a group's runs on its line."""
    places: dict[tuple[int, str], list[str]] = {}
    for run in group:
        for step, kind, event in marks(run.history):
            told = places.setdefault((step, kind), [])
            told += [event] if event not in told else []
    if not places:
        return []
    steps = [step for step, _ in places]
    height = np.interp(steps, line["step"], smoothed(line["mean"], smoothing))
    return [
        {
            **shared,
            "type": "scatter",
            "x": steps,
            "y": ((100 if percent else 1) * height).tolist(),
            "customdata": ["<br>".join(told) for told in places.values()],
            "mode": "markers",
            "marker": {
                "symbol": [_SYMBOLS[kind] for _, kind in places],
                "size": [7 if kind == "other" else 11 for _, kind in places],
                "color": look["color"],
                "line": {"width": 1.5, "color": "white"},
            },
            "showlegend": False,
            "hovertemplate": f"{_WHO}step %{{x}}: %{{customdata}}<extra></extra>",
        }
    ]


def _levels(
    references: Sequence[Shown], column: str, longest: int, y: str, first: bool
) -> Iterator[dict]:
    """Teacher and floor: a level line each, over the whole width."""
    for label, name, found in _by_label(references):
        values = [v for run in found if isinstance(v := run.metrics.get(column), float) and v == v]
        if not values:
            continue
        value = sum(values) / len(values)
        several = f", mean of {len(values)}" if len(values) > 1 else ""
        yield {
            "type": "scatter",
            "x": [1, longest],
            "y": [100 * value] * 2,
            "yaxis": y,
            "name": f"{name}{several}",
            "legendgroup": name,
            "showlegend": first,
            "mode": "lines",
            "line": {
                "color": color_of(label),
                "dash": _REFERENCES.get(label, "dash"),
                "width": 1.5,
            },
            "customdata": [exact(value, True)] * 2,
            "hovertemplate": f"{_WHO}{column.upper()} %{{customdata}}<extra></extra>",
        }


def _ends(
    groups: Sequence[Sequence[Shown]], names: Sequence[str], looks: Sequence[Mapping[str, str]]
) -> Iterator[dict]:
    """Each run's end as a point, each line of the legend in its colour."""
    for group, name, look in zip(groups, names, looks, strict=True):
        ends = [(*scores, run) for run in group if (scores := end_of(run)) is not None]
        if ends:
            yield _points(ends, name, look["color"], "circle")


def _reference_ends(references: Sequence[Shown]) -> Iterator[dict]:
    for label, name, found in _by_label(references):
        ends = [(*scores, run) for run in found if (scores := end_of(run)) is not None]
        if ends:
            yield _points(ends, name, color_of(label), "star")


def _points(ends: list[tuple], name: str, color: str, symbol: str) -> dict:
    return {
        "type": "scatter",
        "x": [100 * asr for _, asr, _ in ends],
        "y": [100 * acc for acc, _, _ in ends],
        "customdata": [
            f"ACC {exact(acc, True)}, ASR {exact(asr, True)}<br>{run.name}"
            for acc, asr, run in ends
        ],
        "name": name,
        "mode": "markers",
        "marker": {"color": color, "symbol": symbol, "size": 11, "opacity": 0.85},
        "hovertemplate": f"{_WHO}%{{customdata}}<extra></extra>",
    }


def end_of(run: Shown) -> tuple[float, float] | None:
    """ACC and ASR that a run ended with, as shares: of its metrics, or where it was
    killed before it had any, its history's last ones; None where one of them is unknown.
    """
    found = []
    for column in ("acc", "asr"):
        value = run.metrics.get(column)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
            seen = run.history[column].dropna() if column in run.history else ()
            if not len(seen):
                return None
            value = float(seen.iloc[-1])
        found.append(float(value))
    return found[0], found[1]


def _by_label(references: Sequence[Shown]) -> Iterator[tuple[str, str, list[Shown]]]:
    """Label, name in the legend, and runs of the references of one label below one root,
    whatever their seeds; where there are several roots, the name says which. The copies
    of a teacher that jobs of one study took over are one.
    """
    once = {json.dumps([r.label, r.metrics], sort_keys=True, default=str): r for r in references}
    kept = [*once.values()]
    roots = dict.fromkeys(PurePath(run.name).parent.parent for run in kept)
    for label in in_order([run.label for run in kept]):
        for root in roots:
            found = [r for r in kept if (r.label, PurePath(r.name).parent.parent) == (label, root)]
            where = "/".join(root.parts[:2])
            name = "clean KD (floor)" if label == FLOOR else name_of(label)
            if found:
                yield label, f"{name} in {where}" if where and len(roots) > 1 else name, found


def _axis(title: str, log: bool) -> dict:
    title = f"{title}, logarithmic: without zeros" if log else title
    return {
        "title": {"text": title, "standoff": 6},
        "type": "log" if log else "linear",
        "automargin": True,
    }


def _layout(axes: Mapping[str, dict], ink: str, data: Sequence[Mapping]) -> dict:
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)"}
    grid |= {"linecolor": ink, "showline": True, "ticks": "outside", "tickcolor": ink}
    lines, nothing = sum(trace.get("showlegend", True) for trace in data), "rgba(0,0,0,0)"
    below = 62 + _LINE * lines
    legend = {"orientation": "v", "x": 0, "xanchor": "left", "yanchor": "top", "tracegroupgap": 0}
    return {
        **{name: {**grid, **axis} for name, axis in axes.items()},
        "font": {"color": ink, "size": 12},
        "paper_bgcolor": nothing,
        "plot_bgcolor": nothing,
        "modebar": {"bgcolor": nothing, "color": "rgba(128,128,128,0.7)", "activecolor": ink},
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1, "align": "left"},
        "legend": {**legend, "y": -56 / _PANELS, "bgcolor": nothing},
        "margin": {"l": 60, "r": 16, "t": 28, "b": below},
        "height": _PANELS + 28 + below,
        "showlegend": True,
        "autosize": True,
    }


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
