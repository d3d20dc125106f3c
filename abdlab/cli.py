"""abdlab demo | run | report | presets | notebooks. Bad input: one sentence on standard error and exit code 2."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from abdlab import batch
from abdlab.errors import did_you_mean

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Data-free distillation from poisoned teachers, and the defence ABD: notebooks, run headlessly.",
)
console = Console()


def _clear_errors(command: Callable) -> Callable:
    """What a user can mend is one sentence and exit code 2; a notebook that fails is one sentence and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, FileNotFoundError) as error:
            print(f"abdlab: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except batch.NotebookFailed as error:
            print(f"abdlab: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped


@app.command()
@_clear_errors
def notebooks() -> None:
    """List the notebooks with their parameters, types and defaults."""
    for name, path in batch.notebooks().items():
        known = batch.parameters(path)
        grid = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in ("parameter", "type", "default", "what it is"):
            grid.add_column(heading, overflow="fold")
        for key, entry in known.items():
            grid.add_row(f"  {key}", entry["type"], repr(entry["default"]), entry["help"])
        console.print(grid, markup=False)
        console.print()


@app.command()
@_clear_errors
def run(
    notebook: Annotated[str, typer.Argument(help="A name (02_distillation, or 02) or a path.")],
    p: Annotated[
        list[str] | None, typer.Option("-p", help="A parameter: -p KEY VALUE, or -p KEY=VALUE. Repeat for more.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The executed notebook; default: in its run's folder.")
    ] = None,
) -> None:
    """Run one notebook headlessly; its progress goes to the terminal."""
    path = batch.find_notebook(notebook)
    given = batch.check_parameters(path, _pairs(p or []))
    if output is None:
        folder = given.get("run") or batch.parameters(path).get("run", {}).get("default", "runs")
        output = Path(folder) / path.name
    done = batch.execute(path, output, given)
    console.print(f"executed notebook: {done}", highlight=False)


@app.command()
@_clear_errors
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with runs in it.")],
    against: Annotated[
        str | None, typer.Option(help="Numbers to set beside ours, averaged over seeds: paper, those of the ABD paper.")
    ] = None,
) -> None:
    """Print ACC and ASR of every run below a folder."""
    from abdlab.runs import table

    if against not in (None, "paper"):
        raise ValueError(did_you_mean("reference", against, ["paper"]))
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if against == "paper":
        _beside_the_paper(folder)
        return
    found = table(folder)
    if found.empty:
        raise ValueError(f"{folder} holds no finished run (no metrics.json): run a notebook first, for example abdlab demo")
    grid = Table(title=str(folder), title_justify="left", box=None)
    for heading in ("run", "method", "seed", "ACC (%)", "ASR (%)", "seconds"):
        grid.add_column(heading, justify="left" if heading in ("run", "method") else "right", overflow="fold")
    for row in found.to_dict("records"):
        if row.get("acc") == row.get("acc") and row.get("acc") is not None:
            cells = [row["run"], row.get("label", ""), _number(row.get("seed"), 0), _number(row["acc"], 1, 100)]
            grid.add_row(*cells, _number(row.get("asr"), 1, 100), _number(row.get("seconds"), 0))
    console.print(grid, markup=False)


@app.command()
@_clear_errors
def presets(
    name: Annotated[str | None, typer.Argument(help="Print every value of this one; without it, list all.")] = None,
) -> None:
    """List the named settings, or print all values of one."""
    from abdlab.presets import ABOUT, PRESETS, SECTIONS, defaults, settings

    if name is None:
        for each in PRESETS:
            console.print(f"{each}: {ABOUT[each].title}", markup=False, highlight=False, soft_wrap=True)
            console.print(f"    {ABOUT[each].mark}", markup=False, highlight=False, soft_wrap=True)
        return
    chosen = settings(name).values
    console.print(f"{name}: {ABOUT[name].title}; {ABOUT[name].mark}\n", markup=False, highlight=False, soft_wrap=True)
    grid = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", ""):
        grid.add_column(heading, overflow="fold")
    named = [section for section in SECTIONS if section in PRESETS[name]]
    for section in named:
        given = defaults(section)
        for key in SECTIONS[section]:
            if key in chosen[section]:
                grid.add_row(f"{section}.{key}", repr(chosen[section][key]), "")
            else:
                grid.add_row(f"{section}.{key}", repr(given.get(key)), "default")
    console.print(grid, markup=False)
    rest = [section for section in SECTIONS if section not in named]
    if rest:
        console.print(f"\nall default: {', '.join(rest)}", markup=False, highlight=False)


@app.command()
@_clear_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where notebooks, figures and metrics go.")] = Path("runs/demo"),
    preset: Annotated[str, typer.Option(help="The settings to run.")] = "quick/digits",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Run the whole walk, 01 to 05, on the digits data, and print the comparison."""
    began = time.perf_counter()
    walk = [path for name, path in batch.notebooks().items() if name[:2] in ("01", "02", "03", "04", "05")]
    for number, path in enumerate(walk, start=1):
        console.rule(f"{number}/{len(walk)}  {path.stem}", align="left")
        given = {"run": str(out), "preset": preset, **({"seeds": [seed]} if path.stem.startswith("05") else {"seed": seed})}
        started = time.perf_counter()
        batch.execute(path, out / path.name, given)
        console.print(f"{path.stem}: {time.perf_counter() - started:.0f} s", highlight=False)
    metrics = json.loads((out / "05_abd_ablation" / "metrics.json").read_text())
    console.rule("result", align="left")
    grid = Table(title=f"{preset}, seed {seed}: ACC and ASR on test images (%)", title_justify="left")
    grid.add_column("method")
    grid.add_column("ACC", justify="right")
    grid.add_column("ASR", justify="right")
    for row in metrics["rows"]:
        grid.add_row(row["name"], _number(row["acc"], 1, 100), _number(row["asr"], 1, 100))
    console.print(grid)
    for note in metrics["notes"]:
        console.print(note, markup=False, highlight=False)
    console.print(f"\n{time.perf_counter() - began:.0f} s. Executed notebooks, figures and metrics.json: {out}", highlight=False)


def _beside_the_paper(folder: Path) -> None:
    """One table per data set, trigger and teacher; what differs from the paper's settings stands under it, numbered."""
    from abdlab.paper import SOURCE, TOLERANCE, compare

    found = compare(folder)
    if found.empty:
        raise ValueError(f"{folder} holds no finished run (no metrics.json beside a config.json): run a notebook first")
    double = found.duplicated(["data", "teacher", "student", "trigger", "method", "runs"], keep=False)
    for (data, trigger, teacher), rows in found.assign(double=double).groupby(["data", "trigger", "teacher"], sort=False):
        students = sorted(set(rows["student"]) - {"-"})
        title = f"{data}, {trigger}, teacher {teacher}" + (f", student {students[0]}" if len(students) == 1 else "")
        grid = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, collapse_padding=True)
        for heading in ("method", "seeds", "ACC (%)", "paper", "", "ASR (%)", "paper", "", "settings"):
            left = heading in ("method", "", "settings")
            grid.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=heading != "settings")
        notes: dict[str, int] = {}
        for row in rows.to_dict("records"):
            method = f"{row['method']} ({row['student']})" if len(students) > 1 and row["student"] != "-" else row["method"]
            if row["double"]:  # the paper has two numbers for this cell
                method += f" ({row['part']})"
            cells = [method, str(row["n"])]
            for kind in TOLERANCE:
                spread = _number(row[f"{kind}_std"], 1)
                ours = _number(row[kind], 1) + (f" ± {spread}" if spread else "")
                cells += [ours, _number(row[f"paper_{kind}"], 1), row[f"{kind}_is"]]
            grid.add_row(*cells, _mark(row, notes))
        console.print(grid, markup=False)
        for note, number in notes.items():
            console.print(f"({number}) {note}", markup=False, highlight=False)
        console.print()
    acc, asr = TOLERANCE["acc"], TOLERANCE["asr"]
    console.print(
        f"Ours: mean ± sample standard deviation over seeds. The paper: {SOURCE}; it prints no spread and disagrees with itself by "
        f"up to 10 points of ASR. within: ours differs by at most 2 of our standard deviations, or {acc:g} points of ACC, "
        f"{asr:g} of ASR. settings: the same as in the paper's preset (abdlab presets), or not. A shortened or changed run is no reproduction.",
        markup=False,
        highlight=False,
    )


def _mark(row: dict, notes: dict[str, int]) -> str:
    """How a run's settings relate to the paper's; what differs gets a number in ``notes``."""
    if row["part"] != row["part"]:
        return "no such cell in the paper"
    if not isinstance(row["shortened"], str):
        return "no preset to compare with"
    note = "; ".join(f"{word}: {row[word]}" for word in ("shortened", "changed") if row[word])
    if not note:
        return "the same"
    return f"{'shortened' if row['shortened'] else 'changed'} ({notes.setdefault(note, len(notes) + 1)})"


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ValueError(f"-p takes a name and a value, as in -p seed 1; {word!r} has no value")
        pairs[key] = value
    return pairs


def _number(value, digits: int, scale: float = 1) -> str:
    return "" if value is None or value != value else f"{scale * value:.{digits}f}"


def _join_pairs(arguments: list[str]) -> list[str]:
    """``-p KEY VALUE`` (papermill's way) as ``-p KEY=VALUE``, which the parser can repeat."""
    out, words = [], iter(arguments)
    for word in words:
        out.append(word)
        if word in ("-p", "--parameters"):
            out[-1] = "-p"
            key = next(words, None)
            if key is None:
                continue
            value = None if "=" in key else next(words, None)
            out.append(key if value is None else f"{key}={value}")
    return out


def main() -> None:
    """Entry point of the ``abdlab`` command."""
    app(_join_pairs(sys.argv[1:]))
