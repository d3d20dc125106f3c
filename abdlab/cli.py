"""abdlab audit | purify | defend | demo | run | sweep | report | book | presets |
notebooks. Bad input: one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from abdlab import batch, cli_audit, cli_plan, cli_report
from abdlab.cli_report import number
from abdlab.errors import did_you_mean, short
from abdlab.home import at_home, there
from abdlab.processes import skip_grammars
from abdlab.values import pairs

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Data-free distillation from poisoned teachers, and the defense ABD: notebooks, run"
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
        except (ValueError, OSError) as error:
            print(f"abdlab: {one_sentence(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except batch.NotebookFailed as error:
            print(f"abdlab: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped


def one_sentence(error: Exception, longest: int = 300) -> str:
    """An error's text in one line of at most so many characters, cut where it is
    longest: what was wrong stands first, and what would be right last.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    half = longest // 2 - 3
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the parameters, and start nothing.")
    ] = False,
) -> None:
    """Run one notebook headlessly; its progress goes to the terminal."""
    path = batch.find_notebook(notebook)
    known = batch.parameters(path)
    given = batch.check(path, pairs(p or []), known)
    named = {"run": "runs", **{name: entry["default"] for name, entry in known.items()}, **given}
    folder = at_home(str(named["run"]))
    output = folder / path.name if output is None else output
    _say(f"results: {folder}")
    if dry_run:
        for name, value in given.items():
            _say(f"{name}: {short(value, 200)}")
        cli_plan.run(_say, known, given, folder)
        _say(f"{path.stem} can run with these; nothing was started")
        return
    try:
        done = batch.execute(path, output, given)
    except KeyboardInterrupt:
        _stopped(folder)
    _say(f"executed notebook: {done}")


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
    out = at_home(out or Path("runs/sweeps") / study.stem)
    _say(f"results: {out}")
    if dry_run:
        cli_plan.study(console, planned, out, slots or engines.default_slots())
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
                            name: number(row[name.lower()], 1, 100) for name in ("ACC", "ASR")
                        }
                        scores = "".join(f" {name} {n}" for name, n in numbers.items() if n)
                        print(
                            f"{row['state']}: {row['name']}{scores} {row['error'] or ''}".rstrip(),
                            flush=True,
                        )
                    seen[row["name"]] = row["state"]

            frame = studies.sweep(
                planned, out, place, tell=tell, shipped=engine == "ray" and not place.shared
            )
    except KeyboardInterrupt:
        _stopped(out)
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


def _say(text: str) -> None:
    """One line, as it is, however wide the terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _stopped(folder: Path) -> NoReturn:
    """End after Ctrl-C with how to go on."""
    print(f"abdlab: stopped; the same command goes on where it was ({folder})", file=sys.stderr)
    raise typer.Exit(130) from None


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
                "A study as ACC/ASR, triggers and defenses against sources; means over seeds and"
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
    into: Annotated[
        Path | None,
        typer.Option(help="A study's models as rows of a CSV file of results, for abdlab book."),
    ] = None,
) -> None:
    """Print ACC and ASR of every run below a folder; of a study's folder, mean and
    standard deviation of every cell.
    """
    if against not in (None, "paper"):
        raise ValueError(did_you_mean("reference", against, ["paper"]))
    asked, folder = folder, there(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {asked}")
    study = (folder / "study.json").is_file()
    if against and matrix:
        raise ValueError("--matrix and --against are two tables: ask for one of them")
    if (html or matrix or into) and not study:
        option = "--html" if html else "--matrix" if matrix else "--into"
        raise ValueError(
            f"{option} is the report of a study, and {asked} holds none (no study.json): see"
            " abdlab sweep"
        )
    if against == "paper":
        table = cli_report.beside_the_paper(console, folder)
    elif study:
        table = cli_report.study_cells(console, folder, matrix)
    else:
        table = cli_report.runs(console, folder)
    if csv:
        cli_report.export(csv, table.to_csv(index=False))
    if latex:
        cli_report.export(latex, table.to_latex(index=False, na_rep=""))
    if markdown:
        cli_report.export(markdown, cli_report.markdown(table))
    if into:
        cli_report.put_into(console, folder, into)
    if html:
        from abdlab.studies.results import report as study_report

        study_report(folder, html)
        console.print(f"report: {html}", highlight=False)


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
        "runs/walk"
    ),
    preset: Annotated[str, typer.Option(help="The settings to run.")] = "quick/digits",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Run the whole walk, 01 to 05, on the digits data, and print the comparison."""
    began, out = time.perf_counter(), at_home(out)
    _say(f"results: {out}")
    walk = [
        path
        for name, path in batch.notebooks().items()
        if name[:2] in ("01", "02", "03", "04", "05")
    ]
    for count, path in enumerate(walk, start=1):
        console.rule(f"{count}/{len(walk)}  {path.stem}", align="left")
        given = {
            "run": str(out),
            "preset": preset,
            **({"seeds": [seed]} if path.stem.startswith("05") else {"seed": seed}),
        }
        started = time.perf_counter()
        try:
            batch.execute(path, out / path.name, given)
        except KeyboardInterrupt:
            _stopped(out)
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
        grid.add_row(row["name"], number(row["acc"], 1, 100), number(row["asr"], 1, 100))
    console.print(grid)
    for note in metrics["notes"]:
        console.print(note, markup=False, highlight=False)
    console.print(
        f"\n{time.perf_counter() - began:.0f} s. Executed notebooks, figures and metrics.json:"
        f" {out}",
        highlight=False,
    )


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


cli_audit.add_to(app, _clear_errors, console)


def main() -> None:
    """Entry point of the ``abdlab`` command."""
    skip_grammars()
    app(_join_pairs(sys.argv[1:]))
