"""abdlab audit | purify | defend: a stranger's file of weights on the command line."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from abdlab.home import at_home, there
from abdlab.values import pairs, read

File = Annotated[Path, typer.Argument(help="Weights: .safetensors, .pt, .pth, .ckpt or .bin.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Their architecture: torchvision:resnet18, wrn-16-2, or my_model:TheirNet, a class"
        " in my_model.py here. Default: what the file says."
    ),
]
Keywords = Annotated[
    str | None, typer.Option(help="What the class is made with: '{\"depth\": 18}'.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Images, for numbers only: a folder of them, a folder with train/CLASS and"
        " test/CLASS, a data set's name, or none."
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(help="Of the images, where --data names none: 32, or 3,32,32."),
]
Classes = Annotated[int | None, typer.Option(help="How many; default: as many as the weights say.")]
Mean = Annotated[
    str | None, typer.Option(help="Of images that the model expects normalised: .485,.456,.406")
]
Std = Annotated[str | None, typer.Option(help="The same, standard deviations.")]
Key = Annotated[
    str | None, typer.Option(help="Where the state dict lies in a file with several: ema.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Names in the file to leave out; repeat for more.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]


def overrides_of(
    file: File,
    *,
    model: Model = None,
    keywords: Keywords = None,
    data: Data = "none",
    shape: Shape = None,
    classes: Classes = None,
    mean: Mean = None,
    std: Std = None,
    key: Key = None,
    ignore: Ignore = None,
) -> dict[str, Any]:
    """The settings that the options of a command stand for, by dotted name."""
    from abdlab.defend import file_settings

    more = {"shape": shape, "classes": classes, "mean": mean, "std": std, "key": key}
    more |= {"keywords": keywords, "ignore": ignore, "prefix": "--"}
    return file_settings(there(file), model=model, data=data, **more)


def _on_a_file(command: Callable) -> Callable:
    """A command that also takes the options of :func:`overrides_of`, and is handed what
    they stand for as ``given``.
    """
    shared = inspect.signature(overrides_of, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def wrapped(**values):
        given = overrides_of(**{name: values[name] for name in shared})
        mine = {name: value for name, value in values.items() if name in own}
        return command(given=given, **mine)

    every = {**shared, **{name: p for name, p in own.items() if name not in {"given", *shared}}}
    wrapped.__signature__ = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in every.values()]
    )
    wrapped.__annotations__ = {name: p.annotation for name, p in every.items()}
    return wrapped


def _settings(words: list[str]) -> dict[str, Any]:
    """Values by dotted name from texts KEY=VALUE."""
    found: dict[str, Any] = pairs(words)
    for name, text in found.items():
        with suppress(ValueError):
            found[name] = read(text)
    return found


def add_to(app: typer.Typer, clear_errors: Callable, console: Console) -> None:
    """Give the app its three commands on a stranger's file."""

    def tell(*lines: str) -> None:
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    @app.command()
    @clear_errors
    @_on_a_file
    def audit(
        given: dict,
        seed: Seed = 0,
        device: Device = "auto",
        as_json: Annotated[
            Path | None, typer.Option("--json", help="Write scores and verdict to this file.")
        ] = None,
    ) -> None:
        """Is there a backdoor in these weights, and towards which class? Without data."""
        from abdlab.audit import audit as look
        from abdlab.audit import turned
        from abdlab.defend import audit_seconds, introduce, open_file, share
        from abdlab.forecast import told_time
        from abdlab.stream import stages

        chosen, images, teacher = open_file(given, seed, device)
        scores = chosen.exam(images)(teacher)
        tell(introduce(teacher, chosen, images, scores))
        tell(f"about {told_time(audit_seconds(teacher, images))} on this machine")
        where = images.train_images.device
        found = look(teacher, images.shape, seed=seed, device=where, tell=stages("audit"))
        grid = Table(box=None, pad_edge=False)
        for heading in ("class", *found.scores):
            grid.add_column(heading, justify="right")
        for i, name in enumerate(images.classes):
            marks = [
                f"{v[i]:.2f}{' *' if v[i] > found.thresholds[n] else '  '}"
                for n, v in found.scores.items()
            ]
            grid.add_row(name, *marks)
        console.print(grid, markup=False)
        limits = (f"{name} {value:.2f}" for name, value in found.thresholds.items())
        tell(
            f"* suspicious, which is above: {', '.join(limits)}", "", found.verdict(images.classes)
        )
        summary = {**found.summary(), "verdict": found.verdict(images.classes)}
        if len(images.test_images):
            shares = turned(teacher, found.triggers, images.test_images)
            summary["turned_on_images"] = shares
            best = max((s for s in shares if s == s), default=None)
            tell(
                f"On {len(images.test_images)} images of {images.name} the best of its inverted"
                f" triggers turns {share(best)} into class {found.nearest}."
            )
        tell(f"{found.seconds:.0f} s")
        if as_json:
            from abdlab.cli_report import export

            export(as_json, json.dumps(summary, indent=2) + "\n")

    @app.command()
    @clear_errors
    @_on_a_file
    def purify(
        file: File,
        given: dict,
        output: Annotated[
            Path, typer.Option("--output", "-o", help="The cleaned model: NAME.safetensors.")
        ],
        names: Annotated[
            str, typer.Option("--with", help="What cleans it, in order: unlearn+bounded.")
        ] = "unlearn+bounded",
        p: Annotated[
            list[str] | None,
            typer.Option("-p", help="A setting of theirs: -p unlearn.scans 4. Repeat for more."),
        ] = None,
        seed: Seed = 0,
        device: Device = "auto",
    ) -> None:
        """Clean a model of its backdoor, without data: a new file, the old one stays."""
        from abdlab.defend import open_file, share
        from abdlab.evaluate import agreement
        from abdlab.forecast import purifying_seconds, told_time
        from abdlab.labels import TEACHER, Label
        from abdlab.purifiers import purify as clean
        from abdlab.purifiers import save_purified
        from abdlab.purifiers.pool import synthetic_pool
        from abdlab.stream import stages

        if output.suffix.lower() != ".safetensors":
            raise ValueError(f"-o names a file .safetensors, not {output}")
        label = Label.parse(f"{names}/{TEACHER}")
        chosen, images, teacher = open_file(given | _settings(p or []), seed, device)
        steps = chosen.purifiers(*label.purifiers)
        expected = purifying_seconds(teacher, images, steps)
        tell(f"about {told_time(expected)} on this machine")
        bar, total, began = stages("purify"), len(steps) + 1, time.perf_counter()
        where = images.train_images.device
        bar("synthetic images", 0, total)
        pool = synthetic_pool(teacher, images.shape, device=where, seed=seed)
        made = clean(
            teacher,
            steps,
            images.shape,
            pool=pool,
            device=where,
            seed=seed,
            tell=lambda name, number, count: bar(name, number, total),
        )
        bar("done", total, total)
        scores = {"acc": None, **chosen.exam(images)(made)}
        agrees = agreement(made, teacher, pool)
        save_purified(output, made, {"label": str(label), "teacher": str(file), **scores})
        tell(
            f"{', '.join(json.dumps(entry) for entry in made.purified)}",
            f"it agrees with the teacher on {share(agrees)} of synthetic images, ACC"
            f" {share(scores['acc'])}; {time.perf_counter() - began:.0f} s",
            f"cleaned model: {output} (abdlab.purifiers.load_purified reads it)",
        )

    @app.command()
    @clear_errors
    @_on_a_file
    def defend(
        file: File,
        given: dict,
        seed: Seed = 0,
        device: Device = "auto",
        label: Annotated[
            str | None,
            typer.Option(help="The defended student: bounded/cmi. Default: what is best so far."),
        ] = None,
        preset: Annotated[
            str | None, typer.Option(help="Lengths and the student; default: by the images' size.")
        ] = None,
        p: Annotated[
            list[str] | None,
            typer.Option("-p", help="A further setting: -p cmi.rounds 20. Repeat for more."),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder of results; default: runs/NAME of the file.")
        ] = None,
    ) -> None:
        """From a file to a verdict: audit, purify, distil a defended student, report."""
        from abdlab import batch
        from abdlab.defend import preset_for
        from abdlab.settings import settings

        began = time.perf_counter()
        given |= _settings(p or [])
        if preset is None:
            chosen = settings("quick/digits", given, seed=seed, device=device)
            images = None if chosen.labelled else chosen.shape_and_classes()[0]
            preset = preset_for(images or chosen.dataset().shape)
        path, out = batch.find_notebook("08"), at_home(out or Path("runs") / file.stem)
        told = {"weights": "teacher.file", "architecture": "teacher.model", "images": "data.name"}
        known = {name: given.pop(setting, None) for name, setting in told.items()}
        known |= {"run": str(out), "preset": preset, "seed": seed, "device": device}
        known |= {"overrides": given, "defended": label}
        tell(f"results: {out}")
        try:
            batch.execute(path, out / path.name, known)
        except KeyboardInterrupt:
            print(f"abdlab: stopped; the same command goes on ({out})", file=sys.stderr)
            raise typer.Exit(130) from None
        folder = out / path.stem
        found = json.loads((folder / "metrics.json").read_text())
        console.rule("verdict", align="left")
        tell(*found["verdict"], "")
        tell(f"student: {folder / 'student.safetensors'}", f"report: {folder / 'report.html'}")
        tell(f"{time.perf_counter() - began:.0f} s")
