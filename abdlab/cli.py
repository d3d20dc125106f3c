"""abdlab demo | run | sweep | report | book | presets | notebooks. Bad input: one
sentence on standard error and exit code 2.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from abdlab import batch
from abdlab.errors import did_you_mean

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Data-free distillation from poisoned teachers, and the defence ABD: notebooks, run"
        " headlessly."
    ),
)
console = Console()


def _clear_errors(command: Callable) -> Callable:
    """What a user can mend is one sentence and exit code 2; a notebook that fails is
    one sentence and exit code 1.
    """

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
        list[str] | None,
        typer.Option("-p", help="A parameter: -p KEY VALUE, or -p KEY=VALUE. Repeat for more."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The executed notebook; default: in its run's folder."),
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
def sweep(
    study: Annotated[
        Path,
        typer.Argument(
            help="A YAML file: a notebook, its parameters and axes; see notebooks/studies."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; default: runs/sweeps/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and an estimate, and start nothing.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    slots: Annotated[
        int | None, typer.Option(help="Jobs at a time; default: one per GPU, or else one per core.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray: a cluster to join (auto, or HOST:PORT); default: start one here."),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="Ray: GPUs per job. local: GPUs to share out, one per job.")
    ] = None,
    shared: Annotated[
        bool | None,
        typer.Option(
            "--shared/--shipped",
            help="Ray: do all nodes see the study's folder? Default: ask them.",
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds per job; default: the study's.")
    ] = None,
) -> None:
    """Run a study: many jobs of one notebook. Call it again to go on after a failure or
    an interrupt.
    """
    from abdlab import studies
    from abdlab.studies import engines

    if engine not in ("local", "ray"):
        raise ValueError(did_you_mean("engine", engine, ("local", "ray")))
    for name, value in (("slots", slots), ("timeout", timeout)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is above 0, not {value:g}")
    planned = studies.read_study(study)
    if timeout is not None:
        planned = replace(planned, timeout=timeout)
    out = out or Path("runs/sweeps") / study.stem
    if dry_run:
        _plan(planned, out, slots or engines.default_slots())
        return
    if engine == "ray":
        place = engines.RayEngine(
            out, address, cpus=planned.threads, gpus=gpus or 0, slots=slots, shared=shared
        )
    else:
        place = engines.LocalEngine(slots, None if gpus is None else int(gpus))
    try:
        with Live(console=console, refresh_per_second=1, transient=False) as live:
            seen: dict[str, str] = {}

            def tell(frame, planned) -> None:
                if console.is_terminal:
                    live.update(studies.render(frame, planned.title))
                    return
                for row in frame.to_dict("records"):
                    # a file or a pipe gets one line per change
                    if row["state"] in ("done", "failed") and seen.get(row["name"]) != row["state"]:
                        numbers = {
                            name: _number(row[name.lower()], 1, 100) for name in ("ACC", "ASR")
                        }
                        scores = "".join(
                            f" {name} {number}" for name, number in numbers.items() if number
                        )
                        print(
                            f"{row['state']}: {row['name']}{scores} {row['error'] or ''}".rstrip(),
                            flush=True,
                        )
                    seen[row["name"]] = row["state"]

            frame = studies.sweep(
                planned, out, place, tell=tell, shipped=engine == "ray" and not place.shared
            )
    except KeyboardInterrupt:
        print(f"abdlab: stopped; the same command goes on where it was ({out})", file=sys.stderr)
        raise typer.Exit(130) from None
    failed = frame[frame["state"] != "done"]
    console.print(f"{len(frame) - len(failed)} of {len(frame)} jobs done: {out}", highlight=False)
    if len(failed):
        grid = Table(title="failed", title_justify="left")
        grid.add_column("job", overflow="fold")
        grid.add_column("error", overflow="fold")
        for row in failed.to_dict("records"):
            grid.add_row(escape(row["name"]), escape(row["error"] or row["state"]))
        console.print(grid)
        console.print(
            f"each job's executed notebook, log.txt and traceback.txt: {out}/jobs", highlight=False
        )
        raise typer.Exit(1)


def _plan(study, out: Path, slots: int) -> None:
    """What a sweep would do."""
    from abdlab.studies.job import status_of
    from abdlab.studies.sweep import estimate

    grid = Table(title=study.title, title_justify="left", box=None)
    for heading in ("job", "notebook", "state"):
        grid.add_column(heading, overflow="fold")
    for job in study.all_jobs:
        grid.add_row(escape(job.name), job.notebook, status_of(out, job)["state"])
    console.print(grid)
    left, seconds = estimate(study, out, slots)
    console.print(
        f"{len(study.jobs)} jobs and {len(study.teachers)} shared teachers, {left} to run, {slots}"
        " at a time",
        highlight=False,
    )
    told = (
        f"about {max(1, round(seconds / 60))} min"
        if seconds is not None
        else "no estimate: no job of these notebooks is done yet"
    )
    console.print(f"{told}; folder: {out}", highlight=False)


@app.command()
@_clear_errors
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with runs in it, or a study's.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="Numbers to set beside ours, averaged over seeds: paper, those of the ABD paper."
        ),
    ] = None,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix",
            help=(
                "A study as ACC/ASR, triggers and defences against sources; means over seeds and"
                " all other axes."
            ),
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="A study's figures and tables as one HTML file.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="The printed table as CSV.")] = None,
    latex: Annotated[Path | None, typer.Option(help="The printed table as LaTeX.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The printed table as Markdown.")] = None,
) -> None:
    """Print ACC and ASR of every run below a folder; of a study's folder, mean and
    standard deviation of every cell.
    """
    if against not in (None, "paper"):
        raise ValueError(did_you_mean("reference", against, ["paper"]))
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    study = (folder / "study.json").is_file()
    if against and matrix:
        raise ValueError("--matrix and --against are two tables: ask for one of them")
    if (html or matrix) and not study:
        option = "--html" if html else "--matrix"
        raise ValueError(
            f"{option} is the report of a study, and {folder} holds none (no study.json): see"
            " abdlab sweep"
        )
    if against == "paper":
        table = _beside_the_paper(folder)
    elif study:
        table = _study_cells(folder, matrix)
    else:
        table = _runs(folder)
    if csv:
        _export(csv, table.to_csv(index=False))
    if latex:
        _export(latex, table.to_latex(index=False, na_rep=""))
    if markdown:
        _export(markdown, _markdown(table))
    if html:
        from abdlab.studies.results import report as study_report

        study_report(folder, html)
        console.print(f"report: {html}", highlight=False)


def _export(path: Path, text: str) -> None:
    from abdlab.checkpoint import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def _grid(table, **look) -> Table:
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


def _markdown(table) -> str:
    page = Console(file=io.StringIO(), width=sys.maxsize)  # a row is a line, whatever the terminal
    page.print(_grid(table, box=MARKDOWN), markup=False)
    return page.file.getvalue().strip() + "\n"


def _study_cells(folder: Path, matrix: bool = False):
    """Print a study's cells and its failures; the cells as a table."""
    from abdlab import studies
    from abdlab.studies.tables import study_matrix, study_summary

    state, results = studies.status(folder), studies.results(folder)
    if results.empty:
        raise ValueError(f"no job of the study in {folder} is done yet: there is nothing to report")
    cells = (study_matrix if matrix else study_summary)(results).reset_index()
    counts = ", ".join(f"{n} {name}" for name, n in state["state"].value_counts().items())
    # a narrow terminal breaks lines there
    shown = cells.replace("/", " / ", regex=True) if matrix else cells
    look = {"box": None, "pad_edge": False, "collapse_padding": True}
    console.print(
        _grid(shown, title=f"{studies.open_study(folder).title}: {counts}", **look), markup=False
    )
    for row in state[state["state"] == "failed"].to_dict("records"):
        console.print(f"failed: {row['name']}: {row['error']}", markup=False, highlight=False)
    return cells


def _runs(folder: Path):
    """Print every run below a folder; them as a table."""
    from abdlab.runs import table

    found = table(folder)
    if found.empty:
        raise ValueError(
            f"{folder} holds no finished run (no metrics.json): run a notebook first, for example"
            " abdlab demo"
        )
    grid = Table(title=str(folder), title_justify="left", box=None)
    for heading in ("run", "method", "seed", "ACC (%)", "ASR (%)", "seconds"):
        grid.add_column(
            heading, justify="left" if heading in ("run", "method") else "right", overflow="fold"
        )
    shown = found[found["acc"].notna()] if "acc" in found else found.iloc[:0]
    for row in shown.to_dict("records"):
        cells = [
            row["run"],
            row.get("label", ""),
            _number(row.get("seed"), 0),
            _number(row["acc"], 1, 100),
        ]
        grid.add_row(*cells, _number(row.get("asr"), 1, 100), _number(row.get("seconds"), 0))
    console.print(grid, markup=False)
    return shown


@app.command()
@_clear_errors
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print every value of this one; without it, list all.")
    ] = None,
) -> None:
    """List the named settings, or print all values of one."""
    from abdlab.presets import ABOUT, PRESETS
    from abdlab.settings import SECTIONS, defaults, settings

    if name is None:
        for each in PRESETS:
            console.print(
                f"{each}: {ABOUT[each].title}", markup=False, highlight=False, soft_wrap=True
            )
            console.print(f"    {ABOUT[each].mark}", markup=False, highlight=False, soft_wrap=True)
        return
    chosen = settings(name).values
    console.print(
        f"{name}: {ABOUT[name].title}; {ABOUT[name].mark}\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
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
def book(
    folder: Annotated[
        Path, typer.Argument(help="A folder with book.md, and tables as CSV in results/.")
    ] = Path("notebooks/studies"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; is README.md what would be written?")
    ] = False,
) -> None:
    """Write the page of results, README.md, from its prose and its CSV files."""
    from abdlab.studies.book import write_book

    console.print(f"{write_book(folder, check)}", highlight=False)


@app.command()
@_clear_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where notebooks, figures and metrics go.")] = Path(
        "runs/demo"
    ),
    preset: Annotated[str, typer.Option(help="The settings to run.")] = "quick/digits",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Run the whole walk, 01 to 05, on the digits data, and print the comparison."""
    began = time.perf_counter()
    walk = [
        path
        for name, path in batch.notebooks().items()
        if name[:2] in ("01", "02", "03", "04", "05")
    ]
    for number, path in enumerate(walk, start=1):
        console.rule(f"{number}/{len(walk)}  {path.stem}", align="left")
        given = {
            "run": str(out),
            "preset": preset,
            **({"seeds": [seed]} if path.stem.startswith("05") else {"seed": seed}),
        }
        started = time.perf_counter()
        batch.execute(path, out / path.name, given)
        console.print(f"{path.stem}: {time.perf_counter() - started:.0f} s", highlight=False)
    metrics = json.loads((out / "05_abd_ablation" / "metrics.json").read_text())
    console.rule("result", align="left")
    grid = Table(
        title=f"{preset}, seed {seed}: ACC and ASR on test images (%)", title_justify="left"
    )
    grid.add_column("method")
    grid.add_column("ACC", justify="right")
    grid.add_column("ASR", justify="right")
    for row in metrics["rows"]:
        grid.add_row(row["name"], _number(row["acc"], 1, 100), _number(row["asr"], 1, 100))
    console.print(grid)
    for note in metrics["notes"]:
        console.print(note, markup=False, highlight=False)
    console.print(
        f"\n{time.perf_counter() - began:.0f} s. Executed notebooks, figures and metrics.json:"
        f" {out}",
        highlight=False,
    )


def _beside_the_paper(folder: Path):
    """Print one table per data set, trigger and teacher, each with what differs from
    the paper's settings, numbered; all as one table.
    """
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
        f"Ours: mean ± sample standard deviation over seeds. The paper: {SOURCE}; it prints no"
        " spread and disagrees with itself by up to 10 points of ASR. within: ours differs by at"
        f" most 2 of our standard deviations, or {acc:g} points of ACC, {asr:g} of ASR. settings:"
        " the same as in the paper's preset (abdlab presets), or not. A shortened or changed run"
        " is no reproduction.",
        markup=False,
        highlight=False,
    )
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
    """``-p KEY VALUE`` (papermill's way) as ``-p KEY=VALUE``, which the parser can
    repeat.
    """
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
