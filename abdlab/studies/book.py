"""The page of results: prose in Markdown, and tables made from small CSV files.

``results/*.csv`` hold one row per run, or per cell of several seeds. ``book.md`` holds the
prose, and a fenced block for each table, which says in YAML what it shows::

    ```table
    where: {study: digits_table}           # which rows: a value per column, or a list
    rows: [trigger, defense]               # a row of the table per different values of these
    pivot: source                          # a column of the table per value of this one
    cells: "{acc}/{asr}"                   # what a cell says
    ```

Without ``pivot``, ``cells`` maps headings to what stands below them, and ``rows`` may map
headings to columns too. ``abdlab book`` writes README.md from both.

The files are read as one table, so a new sitting is a new file, or new rows in an old one.
Two rows with the same :data:`KEY` are an error that names both places: a figure that was
measured again replaces the old one by hand, or says in ``setting`` what was other.
"""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from abdlab.checkpoint import write_atomically
from abdlab.errors import did_you_mean
from abdlab.labels import Label, name_of

#: what a run was. Equal in all of these, two rows are the same figure
KEY = ("study", "preset", "trigger", "method", "setting", "seed")
#: what was measured, in percent: ACC, ASR, accuracy on triggered images by their true class,
#: and ASR above that of a clean model. Each may have a column of its standard deviation
#: over seeds, ``acc_std`` and so on.
MEASURES = ("acc", "asr", "robust", "excess")
#: what every row has from its method, so that no file says it twice
DERIVED = ("purifier", "source", "defense", "name")

_BLOCK = re.compile(r"^```table\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)
_PARTS = ("where", "rows", "pivot", "cells")
_HEAD = "<!-- Written by `abdlab book` from book.md and results/*.csv: edit those. -->\n\n"


def read_results(folder: str | Path) -> pd.DataFrame:
    """All rows of a folder's CSV files as one table, file by file in the order of names.

    A file needs the columns study and method, and may have any others: the rest of
    :data:`KEY`, those of :data:`MEASURES`, n, note, and what else a table wants to show. What
    a file does not have is empty. ``seed`` lists the seeds of the row, apart by blanks; n is
    their number and need not be given. :data:`DERIVED` columns are added.

    Raises:
        ValueError: for a file without those columns, a figure that is no number, a method
            that is no label, an n that is not the number of seeds, and a key that was there
            before. The message names file and line.
    """
    frames = [_read(path) for path in sorted(Path(folder).glob("*.csv"))]
    if not frames:
        raise ValueError(f"there is no CSV file in {folder}: each row of one is a run's result")
    found = pd.concat(frames, ignore_index=True)
    numbers = [c for c in found if _is_number(c)]
    texts = found.columns.difference(numbers)
    found[texts] = found[texts].fillna("")
    for column in (*KEY, "note"):
        if column not in found:
            found[column] = ""
    for same, rows in found.groupby(list(KEY), sort=False):
        if len(rows) > 1:
            first, second = rows["place"].iloc[:2]
            raise ValueError(
                f"{second} is the same figure as {first} ({', '.join(filter(None, same))}): keep"
                " one, or say in the column setting what was other"
            )
    return found


def table(results: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """A table in Markdown.

    A cell takes all rows that agree in ``rows`` (and ``pivot``). One row is shown as it
    stands, "97.5 ± 0.6" where it has a spread. Several are the seeds of one run: their mean
    and sample standard deviation are shown. Rows and columns come in the order of the files.

    >>> results = pd.DataFrame({
    ...     "study": "s", "method": ["zskt", "cmi"], "acc": [98.0, 97.5], "asr": [91.0, 4.2]})
    >>> print(table(results, {"rows": ["study"], "pivot": "method", "cells": "{acc}/{asr}"}))
    | study | zskt | cmi |
    | --- | --- | --- |
    | s | 98.0/91.0 | 97.5/4.2 |

    Args:
        results: as :func:`read_results` returns them.
        spec: where, rows, pivot and cells, see the head of this module. A cell's text has
            columns in braces; ``{each}`` is ACC/ASR of every seed, ``{n}`` how many there are.

    Raises:
        ValueError: for a part or a column that there is not, for no rows, and for a cell in
            which runs of different settings would be averaged.
    """
    spec = _checked(spec)
    chosen = _where(results, spec["where"])
    keys, pivot, cells = list(spec["rows"].values()), spec["pivot"], spec["cells"]
    names = _fields(*(cells.values() if isinstance(cells, Mapping) else [cells]))
    for column in (*keys, *([pivot] if pivot else []), *(names - {"each", "n"})):
        _known(results, column)
    lines: dict[Hashable, dict[str, str]] = {}
    columns = list(cells) if not pivot else list(dict.fromkeys(chosen[pivot]))
    by = [*keys, pivot] if pivot else keys
    for values, rows in chosen.groupby(by, sort=False):
        line = lines.setdefault(values[: len(keys)], {})
        if pivot:
            line[values[-1]] = _cell(rows, cells)
        else:
            line |= {heading: _cell(rows, text) for heading, text in cells.items()}
    shown = [[*map(str, key), *(line.get(c, "") for c in columns)] for key, line in lines.items()]
    head = [*spec["rows"], *columns]
    return "\n".join(_line(cells) for cells in (head, ["---"] * len(head), *shown))


def page(template: str, results: pd.DataFrame) -> str:
    """A template's text with a table in place of each ``table`` block.

    Raises:
        ValueError: for a block that is no YAML, or see :func:`table`; it names the block's
            line.
    """

    def made(block: re.Match) -> str:
        line = template.count("\n", 0, block.start()) + 1
        try:
            return table(results, yaml.safe_load(block[1])) + "\n"
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"the table in line {line}: {error}") from None

    return _HEAD + _BLOCK.sub(made, template)


def write_book(folder: str | Path, check: bool = False) -> Path:
    """Write a folder's README.md from its book.md and results/*.csv.

    Args:
        check: write nothing; the README.md there must be what would be written.

    Raises:
        ValueError: where book.md is missing or :func:`page` finds a mistake, and, with
            ``check``, for a README.md that is not what would be written.
    """
    folder = Path(folder)
    source, written = folder / "book.md", folder / "README.md"
    if not source.is_file():
        raise ValueError(f"there is no {source}: a book is Markdown with blocks of tables")
    text = page(source.read_text(encoding="utf-8"), read_results(folder / "results"))
    if not check:
        write_atomically(written, text.encode())
    elif not written.is_file() or written.read_text(encoding="utf-8") != text:
        raise ValueError(f"{written} is not what abdlab book would write: run make book")
    return written


def _read(path: Path) -> pd.DataFrame:
    found = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    for column in ("study", "method"):
        if column not in found:
            raise ValueError(f"{path.name} has no column {column}")
    if own := set(DERIVED) & {*found}:
        raise ValueError(f"{path.name} has a column {min(own)}: that follows from the method")
    found["place"] = [f"{path.name}, line {line}" for line in range(2, len(found) + 2)]
    labels = [_label(row) for row in found.to_dict("records")]
    found["purifier"] = ["+".join(label.purifiers) or "none" for label in labels]
    found["source"] = [label.source for label in labels]
    found["defense"] = [label.defense or "none" for label in labels]
    found["name"] = [name_of(label) for label in labels]
    for column in found:
        if _is_number(column):
            pairs = zip(found[column], found["place"], strict=True)
            found[column] = [_number(text, column, place) for text, place in pairs]
    seeds = found["seed"].str.split().str.len() if "seed" in found else 0 * found.index
    given = found["n"] if "n" in found else pd.Series(float("nan"), found.index)
    for count, n, place in zip(seeds, given, found["place"], strict=True):
        if count and n == n and count != n:
            raise ValueError(f"{place}: n is {n:g}, but seed names {count}")
    found["n"] = given.fillna(pd.Series(seeds, found.index).clip(lower=1).astype(float))
    return found


def _label(row: Mapping[str, str]) -> Label:
    try:
        return Label.parse(row["method"])
    except ValueError as error:
        raise ValueError(f"{row['place']}: {error}") from None


def _is_number(column: str) -> bool:
    return column.removesuffix("_std") in MEASURES or column == "n"


def _number(text: str, column: str, place: str) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise ValueError(f"{place}: {column} is a number, in percent, not {text!r}") from None


def _checked(spec: Any) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise ValueError("a table is a mapping with rows and cells")
    for part in spec:
        if part not in _PARTS:
            raise ValueError(did_you_mean("part of a table", part, _PARTS))
    rows, cells = spec.get("rows"), spec.get("cells")
    rows = {column: column for column in rows} if isinstance(rows, list) else rows
    if not rows or not isinstance(rows, Mapping):
        raise ValueError("rows lists the columns that tell one row from another")
    if not isinstance(cells, str if spec.get("pivot") else Mapping):
        raise ValueError("cells is a text with pivot, and maps headings to texts without")
    return {
        "where": spec.get("where") or {},
        "rows": rows,
        "pivot": spec.get("pivot"),
        "cells": cells,
    }


def _where(results: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    for column, values in wanted.items():
        _known(results, column)
        values = [str(v) for v in (values if isinstance(values, list) else [values])]
        results = results[results[column].astype(str).isin(values)]
    if results.empty:
        raise ValueError(f"no row has {', '.join(f'{k} {v}' for k, v in wanted.items())}")
    return results


def _known(results: pd.DataFrame, column: str) -> None:
    if column not in results:
        raise ValueError(did_you_mean("column of the results", column, list(results)))


def _fields(*texts: str) -> set[str]:
    return {name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name}


def _cell(rows: pd.DataFrame, text: str) -> str:
    """What a cell says of its rows."""
    if len(rows) > 1:
        apart = [c for c in KEY if c != "seed" and c in rows and rows[c].nunique() > 1]
        if apart or (rows["n"] > 1).any():
            raise ValueError(
                f"rows that differ in {', '.join(apart) or 'their seeds only, one of them a mean,'}"
                f" fall into one cell ({', '.join(rows['place'])}): add them to rows or where"
            )
    return text.format(**{name: _value(rows, name) for name in _fields(text)})


def _value(rows: pd.DataFrame, name: str) -> str:
    if name == "each":
        pairs = zip(rows["acc"], rows["asr"], strict=True)
        return ", ".join(f"{_percent(acc)}/{_percent(asr)}" for acc, asr in pairs)
    if name == "n":
        return f"{rows['n'].sum():g}"
    if name not in MEASURES:
        return "; ".join(dict.fromkeys(str(value) for value in rows[name] if value != ""))
    several = len(rows) > 1
    spread = rows.get(f"{name}_std", pd.Series(float("nan"), rows.index))
    std = rows[name].std() if several else spread.iloc[0]
    mean = rows[name].mean() if several else rows[name].iloc[0]
    return _percent(mean) + (f" ± {std:.1f}" if std == std else "")


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
