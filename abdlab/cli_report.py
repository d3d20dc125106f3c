"""What ``abdlab report`` prints: runs, a study's cells, and ours beside the paper's. No
figure is drawn, so that no plotting library is loaded.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pandas as pd
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from abdlab.threads import mixed


def export(path: Path, text: str) -> None:
    """Write a file; ValueError when that cannot be done."""
    from abdlab.checkpoint import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def put_into(console: Console, folder: Path, file: Path) -> None:
    """Put a study's models into a CSV file of results, and say how many are new there."""
    from abdlab.studies.page_rows import merge, page_rows

    rows = page_rows(folder, file.stem)
    try:
        new = merge(rows, file)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror or error}") from None
    console.print(f"{file}: {len(rows)} rows, {new} of them new", markup=False, highlight=False)


def _grid(table: pd.DataFrame, **look) -> Table:
    """A data frame for the terminal: text to the left, numbers to the right, nothing
    where there is none.
    """
    from pandas.api.types import is_numeric_dtype

    grid = Table(title_justify="left", **look)
    for heading in table.columns:
        grid.add_column(
            heading,
            justify="right" if is_numeric_dtype(table[heading]) else "left",
            overflow="fold",
        )
    for row in table.to_dict("records"):
        grid.add_row(
            *("" if value != value or value is None else str(value) for value in row.values())
        )
    return grid


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, a line for every row."""
    page = Console(file=io.StringIO(), width=sys.maxsize)  # a row is a line, whatever the terminal
    page.print(_grid(table, box=MARKDOWN), markup=False)
    return page.file.getvalue().strip() + "\n"


def study_cells(console: Console, folder: Path, matrix: bool = False) -> pd.DataFrame:
    """Print a study's cells and its failures; the cells as a table."""
    from abdlab import studies
    from abdlab.studies.tables import study_matrix, study_summary, varied

    state, results = studies.status(folder), studies.results(folder)
    if results.empty:
        raise ValueError(f"no job of the study in {folder} is done yet: there is nothing to report")
    axes = varied(results, studies.open_study(folder).axes)
    cells = (study_matrix(results) if matrix else study_summary(results, axes)).reset_index()
    counts = ", ".join(f"{n} {name}" for name, n in state["state"].value_counts().items())
    # a narrow terminal breaks lines there
    shown = cells.replace("/", " / ", regex=True) if matrix else cells
    look = {"box": None, "pad_edge": False, "collapse_padding": True}
    console.print(
        _grid(shown, title=f"{studies.open_study(folder).title}: {counts}", **look), markup=False
    )
    for row in state[state["state"] == "failed"].to_dict("records"):
        console.print(f"failed: {row['name']}: {row['error']}", markup=False, highlight=False)
    _say_threads(console, results)
    return cells


def runs(console: Console, folder: Path) -> pd.DataFrame:
    """Print every run below a folder; them as a table."""
    from abdlab.runs import table

    found = table(folder)
    if found.empty:
        raise ValueError(
            f"{folder} holds no finished run (no metrics.json): run a notebook first, for example"
            " abdlab demo"
        )
    grid = Table(title=str(folder), title_justify="left", box=None)
    shown = found[found["acc"].notna()] if "acc" in found else found.iloc[:0]
    robust = bool("robust" in shown and shown["robust"].notna().any())  # older runs do not say
    headings = ("run", "method", "seed", "ACC (%)", "ASR (%)", *(["robust (%)"] * robust))
    for heading in (*headings, "seconds", "threads"):
        grid.add_column(
            heading, justify="left" if heading in ("run", "method") else "right", overflow="fold"
        )
    for row in shown.to_dict("records"):
        cells = [
            row["run"],
            row.get("label", ""),
            number(row.get("seed"), 0),
            number(row["acc"], 1, 100),
        ]
        cells += [number(row.get("asr"), 1, 100)]
        cells += [number(row.get("robust"), 1, 100)] * robust + [number(row.get("seconds"), 0)]
        grid.add_row(*cells, number(row.get("threads"), 0))
    console.print(grid, markup=False)
    _say_threads(console, shown)
    return shown


def _say_threads(console: Console, runs: pd.DataFrame) -> None:
    """One sentence where runs of one table were not computed alike."""
    labelled = runs[runs["label"].notna()] if "label" in runs else runs.iloc[:0]
    told = mixed(labelled["threads"]) if "threads" in labelled else ""
    if told:
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def beside_the_paper(console: Console, folder: Path) -> pd.DataFrame:
    """Print one table per data set, trigger and teacher, each with what differs from
    the paper's settings, numbered; all as one table.
    """
    from abdlab.runs import table
    from abdlab.studies.paper import SOURCE, TOLERANCE, compare

    found = compare(folder)
    if found.empty:
        raise ValueError(
            f"{folder} holds no finished run (no metrics.json beside a config.json): run a notebook"
            " first"
        )
    double = found.duplicated(
        ["data", "teacher", "student", "trigger", "method", "runs"], keep=False
    )
    for (data, trigger, teacher), rows in found.assign(double=double).groupby(
        ["data", "trigger", "teacher"], sort=False
    ):
        students = sorted(set(rows["student"]) - {"-"})
        title = f"{data}, {trigger}, teacher {teacher}" + (
            f", student {students[0]}" if len(students) == 1 else ""
        )
        grid = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            collapse_padding=True,
        )
        for heading in (
            "method",
            "seeds",
            "ACC (%)",
            "paper",
            "",
            "ASR (%)",
            "paper",
            "",
            "settings",
        ):
            left = heading in ("method", "", "settings")
            grid.add_column(
                heading,
                justify="left" if left else "right",
                overflow="fold",
                no_wrap=heading != "settings",
            )
        notes: dict[str, int] = {}
        for row in rows.to_dict("records"):
            method = (
                f"{row['method']} ({row['student']})"
                if len(students) > 1 and row["student"] != "-"
                else row["method"]
            )
            if row["double"]:  # the paper has two numbers for this cell
                method += f" ({row['part']})"
            cells = [method, str(row["n"])]
            for kind in TOLERANCE:
                spread = number(row[f"{kind}_std"], 1)
                ours = number(row[kind], 1) + (f" ± {spread}" if spread else "")
                cells += [ours, number(row[f"paper_{kind}"], 1), row[f"{kind}_is"]]
            grid.add_row(*cells, _mark(row, notes))
        console.print(grid, markup=False)
        for note, at in notes.items():
            console.print(f"({at}) {note}", markup=False, highlight=False)
        console.print()
    acc, asr = TOLERANCE["acc"], TOLERANCE["asr"]
    console.print(
        f"Ours: mean ± sample standard deviation over seeds. The paper: {SOURCE}; it prints no"
        " spread and disagrees with itself by up to 10 points of ASR. within: ours differs by at"
        f" most 2 of our standard deviations, or {acc:g} points of ACC, {asr:g} of ASR. settings:"
        " the same as in the paper's preset (abdlab presets), or not. A shortened or changed run"
        " is no reproduction.",
        markup=False,
        highlight=False,
    )
    _say_threads(console, table(folder))
    return found


def _mark(row: dict, notes: dict[str, int]) -> str:
    """How a run's settings relate to the paper's; what differs gets a number in
    ``notes``.
    """
    if row["part"] != row["part"]:
        return "no such cell in the paper"
    if not isinstance(row["shortened"], str):
        return "no preset to compare with"
    note = "; ".join(f"{word}: {row[word]}" for word in ("shortened", "changed") if row[word])
    if not note:
        return "the same"
    return (
        f"{'shortened' if row['shortened'] else 'changed'}"
        f" ({notes.setdefault(note, len(notes) + 1)})"
    )


def number(value: float | None, digits: int, scale: float = 1) -> str:
    """A number for a table; nothing for one that is missing."""
    return "" if value is None or value != value else f"{scale * value:.{digits}f}"
