"""The command line as a user sees it: exit codes, one clear sentence, no traceback."""

import asyncio
import gc
import inspect
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from rich.console import Console

from abdlab import batch, cli, cli_report
from abdlab.home import home, there
from abdlab.presets import ABOUT, PRESETS
from abdlab.processes import alive
from abdlab.runs import Run
from abdlab.settings import SECTIONS, settings


def abdlab(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "abdlab", *arguments],
        capture_output=True,
        text=True,
    )


def test_notebooks_lists_names_parameters_and_defaults(here):
    code, out, _ = here("notebooks")
    assert code == 0
    for word in ("01_poisoning", "05_abd_ablation", "poison_rate", "quick/digits"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "02_distilation"],
            "unknown notebook '02_distilation': did you mean '02_distillation'?",
        ),
        (["run", "02", "-p", "sv_alhpa", "1"], "did you mean 'sv_alpha'?"),
        (["run", "02", "-p", "seed", "one"], "parameter seed takes a whole number, not 'one'"),
        (["run", "02", "-p", "seed", "1.5"], "parameter seed takes a whole number, not 1.5"),
        (["run", "05", "-p", "seeds", "3"], "parameter seeds takes a list, not 3"),
        (["run", "02", "-p", "seed"], "has no value"),
        (["report", "no/such/folder"], "there is no folder no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, sentence, tmp_path, monkeypatch, here
):
    monkeypatch.chdir(tmp_path)
    code, _, told = here(*arguments, columns=400)
    assert code == 2
    assert sentence in told
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_report_of_a_folder_without_runs_says_what_to_do(tmp_path):
    done = abdlab("report", str(tmp_path))  # a process of its own, as a user starts it
    assert done.returncode == 2
    assert "abdlab demo" in done.stderr
    assert "Traceback" not in done.stderr


def test_report_prints_acc_and_asr_of_every_run(tmp_path, here):
    (tmp_path / "seed0" / "zskt").mkdir(parents=True)
    values = {"label": "zskt", "seed": 0, "acc": 0.9515, "asr": 0.987, "seconds": 12.3}
    (tmp_path / "seed0" / "zskt" / "metrics.json").write_text(json.dumps(values))
    code, out, _ = here("report", tmp_path)
    assert code == 0
    assert all(word in out for word in ("seed0/zskt", "95.2", "98.7", "12"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report", "--against", "papr", "."], "unknown reference 'papr': did you mean 'paper'?"),
        (["report", "--against", "paper", "no/such/folder"], "there is no folder no/such/folder"),
        (
            ["report", "--against", "paper", "."],
            "holds no finished run (no metrics.json beside a config.json)",
        ),
        (
            ["report", "--matrix", "."],
            "--matrix is the report of a study, and . holds none (no study.json): see abdlab sweep",
        ),
        (
            ["report", "--html", "page.html", "."],
            "--html is the report of a study, and . holds none",
        ),
        (
            ["report", "--matrix", "--against", "paper", "."],
            "--matrix and --against are two tables: ask for one of them",
        ),
        (
            ["presets", "paper/cifar/zskt"],
            "unknown preset 'paper/cifar/zskt': did you mean 'paper/cifar10/zskt'?",
        ),
    ],
)
def test_bad_names_are_one_sentence_and_exit_code_2(
    arguments, sentence, here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_presets_lists_names_titles_and_marks(here):
    code, out, _ = here("presets", columns=60)  # lines are not broken
    assert code == 0
    lines = out.splitlines()
    for name, about in ABOUT.items():
        where = lines.index(f"{name}: {about.title}")
        assert lines[where + 1] == f"    {about.mark}"
    assert any("not yet verified" in line for line in lines)
    assert any("verified on seeds 13, 14, 15" in line for line in lines)


def test_presets_prints_every_value_of_one_and_marks_defaults(here):
    code, out, _ = here("presets", "paper/gtsrb/zskt")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["zskt.pseudo_batches", "10000"] in rows
    assert ["zskt.temperature", "0.5"] in rows
    assert ["attack.target", "1"] in rows
    assert ["data.root", "'data'", "default"] in rows
    assert ["attack.params", "None", "default"] in rows
    named = {row[0] for row in rows if row and "." in row[0]}
    sections = PRESETS["paper/gtsrb/zskt"]
    assert {f"{section}.{key}" for section in sections for key in SECTIONS[section]} <= named
    assert "all default: " in out  # the other sources are named, not spelled out


def _write(root, label, seed, acc, asr, **overrides):
    chosen = settings("paper/cifar10/zskt", overrides, seed=seed)
    run = Run(
        root / f"seed{seed}" / label,
        chosen.config("data", "attack", "teacher", "student", *label.split("+")),
    )
    run.save_metrics({"label": label, "seed": seed, "acc": acc, "asr": asr})


def test_report_against_the_paper(here, tmp_path):
    for seed, asr in enumerate((0.1, 0.3, 0.5)):
        _write(tmp_path / "whole", "zskt+sv", seed, 0.79, asr)
    _write(tmp_path / "short", "zskt", 0, 0.72, 0.88, **{"zskt.pseudo_batches": 4000})
    _write(tmp_path / "odd", "zskt", 0, 0.72, 0.88, **{"attack.trigger": "smooth"})
    code, out, _ = here("report", "--against", "paper", tmp_path)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "cifar10, badnet_grid, teacher wrn-16-2, student wrn-16-1" in lines
    assert "zskt+sv 3 79.0 ± 0.0 67.2 above 30.0 ± 20.0 0.3 within the same" in lines
    # the paper has two numbers for this cell
    assert "zskt (main) 1 72.0 71.9 within 88.0 96.9 within shortened (1)" in lines
    assert "zskt (ablation) 1 72.0 70.7 within 88.0 87.8 within shortened (1)" in lines
    assert "(1) shortened: zskt.pseudo_batches 4,000 of 80,000" in lines
    assert "zskt 1 72.0 88.0 no such cell in the paper" in lines
    for word in (
        "2306.02368",
        "5 points of ACC, 10 of ASR",
        "2 of our standard deviations",
        "no reproduction",
    ):
        assert word in " ".join(lines)


def test_a_shortened_run_is_marked_on_a_narrow_terminal_too(here, tmp_path):
    _write(tmp_path, "zskt+sv", 0, 0.72, 0.88, **{"zskt.pseudo_batches": 4000})
    code, out, _ = here("report", tmp_path, "--against", "paper", columns=80)
    assert code == 0
    assert "shortened (1)" in out
    assert "4,000 of 80,000" in out


def test_every_table_that_is_printed_can_be_exported(here, tmp_path):
    _write(tmp_path / "runs", "zskt", 0, 0.72, 0.88)
    for words, first in ((["--against", "paper"], "data"), ([], "run")):
        files = {kind: tmp_path / f"{first}.{kind}" for kind in ("csv", "latex", "markdown")}
        options = [word for kind, file in files.items() for word in (f"--{kind}", file)]
        code, _, err = here("report", tmp_path / "runs", *words, *options, columns=40)
        assert code == 0, err
        table = pd.read_csv(files["csv"])
        assert table.columns[0] == first
        assert table["asr"].tolist() == pytest.approx([88.0 if words else 0.88] * len(table))
        assert "tabular" in files["latex"].read_text()
        lines = files["markdown"].read_text().splitlines()
        assert lines[0].startswith(f"| {first} ")
        assert len(lines) == 2 + len(table)  # a row is a line, however narrow the terminal


def test_a_report_loads_no_plotting_library(tmp_path):
    _write(tmp_path, "zskt+sv", 0, 0.72, 0.88)
    look = """
import sys
from abdlab.cli import main
folder = sys.argv[-1]
for words in [], ["--against", "paper"]:
    sys.argv = ["abdlab", "report", folder, *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
    print([m for m in ("matplotlib", "seaborn", "plotly") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", look, str(tmp_path)], capture_output=True, text=True, check=True
    )
    plain, against, rest = done.stdout.split("[]\n")
    assert rest == "", done.stdout[-200:]
    for told in (plain, against):
        assert "zskt+sv" in told
        assert "robust" not in told  # older runs do not say


def test_a_report_shows_robust_accuracy_where_a_run_says_it(tmp_path):
    for label, more in (("zskt", {"robust": 0.125}), ("zskt+sv", {})):
        scores = {"label": label, "seed": 0, "acc": 0.72, "asr": 0.8, **more}
        Run(tmp_path / label).save_metrics(scores)
    console = Console(file=io.StringIO(), width=100)
    cli_report.runs(console, tmp_path)
    head, first, second = console.file.getvalue().splitlines()[-3:]
    assert "robust (%)" in head
    assert first.split() == ["zskt", "zskt", "0", "72.0", "80.0", "12.5"]
    assert second.split() == ["zskt+sv", "zskt+sv", "0", "72.0", "80.0"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["02", "-p", "overrides", '{"tu.hold": false, "sv.cap": null}'], "'sv.cap': None"),
        (["02", "-p", "overrides", "{'tu.hold': False}"], "'tu.hold': False"),
        (["05", "-p", "control", "true", "-p", "methods", '["zskt"]'], "control: True"),
        (["01", "-p", "trigger_params", '{"size": 4}'], "'size': 4"),
    ],
)
def test_json_is_understood_as_python_is(here, words, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # tests/test_forecast.py times steps; here every run is too short for that
    monkeypatch.setattr(sys.modules["abdlab.forecast"], "WORTH", 10**6)
    code, out, err = here("run", *words, "--dry-run", columns=200)
    assert code == 0, err
    assert shown in out
    assert f"results: {tmp_path}/runs/walk" in out.splitlines()[0]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["02", "-p", "seed", "1", "-p", "seed", "2"], "-p names seed twice"),
        (["02", "-p", "overrides", '{"sv.k": 1, "sv.k": 2}'], "stands twice"),
        (["02", "-p", "overrides", '{"sv.alhpa": 1}'], "did you mean 'sv.alpha'"),
        (["02", "-p", "source", "zsk"], "did you mean 'zskt'"),
        (["02", "-p", "tu_start", "1.5"], "start is a share"),
        (["03", "-p", "label", "zskt+rs"], "unknown defen"),
        (["01", "-p", "target", "11"], "attack.target is a class from 0 to 9"),
        (["05", "-p", "seeds", "[0, '1']"], "each of seeds is a whole number"),
        (["02", "-p", "run", "a\0b"], "null"),
        (["x" * 5000], "unknown notebook"),
    ],
)
def test_what_could_not_run_does_not_start(here, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "run_kernel", lambda *_: pytest.fail("a kernel was started"))
    code, _, err = here("run", *words)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 320


def test_the_temporary_folders_of_killed_runs_are_swept_up():
    kill = (
        "import os, sys\nfrom abdlab.batch import own_folder\n"
        "with own_folder('x-') as folder: print(folder, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", kill], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    with batch.own_folder() as mine:
        assert not left.exists()
        with batch.own_folder() as other:  # one that is in use is let alone
            assert mine.is_dir()
            assert other.is_dir()
    assert not mine.exists()


@pytest.fixture
def sleeper(tmp_path):
    """A notebook that writes its process's number, and then waits for a minute."""
    cells = [
        'run = "runs/here"  # folder',
        "import os, pathlib, time, abdlab\n"
        'book = abdlab.Run(run)\nprint(f"results: {book.path}")\n'
        'book.file("pid").write_text(str(os.getpid()))',
        "time.sleep(float(os.environ['SECONDS']))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, path := tmp_path / "sleeper.ipynb")
    return path


@pytest.mark.slow
def test_a_temporary_folder_whose_path_is_long_takes_no_kernel_down(sleeper, tmp_path, monkeypatch):
    """Sockets have short names: 103 bytes on macOS, 107 on Linux."""
    long = tmp_path / ("l" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("SECONDS", "0")
    batch.execute(sleeper, tmp_path / "out.ipynb", {"run": str(tmp_path / "here")})
    assert (tmp_path / "here" / "pid").exists()


@pytest.mark.slow
def test_ctrl_c_is_one_sentence_and_leaves_nothing_behind(sleeper, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from abdlab.cli import main; main()", "run", str(sleeper)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SECONDS": "60", "TMPDIR": str(tmp_path)},
        # tests that run in the background inherit a deaf ear for interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pid = tmp_path / "runs" / "here" / "pid"
    end = time.time() + 240
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, "waited in vain"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    folder = tmp_path / "runs" / "here"
    told = [line for line in err.splitlines() if not line.startswith("results: ")]
    assert told == [f"abdlab: stopped; the same command goes on where it was ({folder})"]
    assert not alive(int(pid.read_text()))
    assert not [*tmp_path.glob("abdlab-*")]
    assert "results: " in (folder / "sleeper.ipynb").read_text()  # kept, up to that cell


def test_a_task_that_died_with_its_kernel_is_not_told(caplog):
    """asyncio logs what nobody asked a task about when the task is thrown away."""

    async def dies():
        raise RuntimeError("Kernel died")

    async def forgets():
        task = asyncio.create_task(dies())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        gc.collect()

    logger = logging.getLogger("asyncio")
    asyncio.run(forgets())
    assert "never retrieved" in caplog.text
    caplog.clear()
    logger.addFilter(batch._is_asked_for)
    try:
        asyncio.run(forgets())
        logger.error("something else")
    finally:
        logger.removeFilter(batch._is_asked_for)
    assert caplog.messages == ["something else"]


@pytest.mark.slow
def test_every_launcher_writes_to_the_same_folder(sleeper, tmp_path):
    """The command line in a clone, a kernel in its notebooks/, papermill, and a study's
    job whose working directory is elsewhere.
    """
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "pyproject.toml").write_text('[project]\nname = "abdlab"\n')
    inside = clone / "notebooks" / sleeper.name
    sleeper.rename(inside)
    env = {k: v for k, v in os.environ.items() if k != "ABDLAB_HOME"}
    env |= {"SECONDS": "0", "PYTHONPATH": str(Path(batch.__file__).parents[1])}
    main = [sys.executable, "-c", "from abdlab.cli import main; main()"]
    mill = [sys.executable, "-m", "papermill", "--kernel", "python3", "--language", "python"]
    for cwd, words in {
        clone: [*main, "run", "notebooks/sleeper.ipynb"],
        clone / "notebooks": [*mill, "sleeper.ipynb", "out.ipynb"],
    }.items():
        done = subprocess.run(
            words, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (clone / "runs" / "here" / "pid").exists()
        (clone / "runs" / "here" / "pid").unlink()
        assert not (clone / "notebooks" / "runs").exists()
        if words[:3] == main:
            assert done.stdout.splitlines()[0] == f"results: {clone}/runs/here"
        else:
            assert f"results: {clone}/runs/here" in (cwd / "out.ipynb").read_text()


def test_home_is_the_clone_the_variable_or_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("ABDLAB_HOME", raising=False)
    deep = tmp_path / "clone" / "notebooks" / "studies"
    deep.mkdir(parents=True)
    (tmp_path / "clone" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    monkeypatch.chdir(deep)
    assert home() == deep
    (tmp_path / "clone" / "pyproject.toml").write_text('[project]\nname = "abdlab"\n')
    assert home() == tmp_path / "clone"
    assert Run("runs/x").path == tmp_path / "clone" / "runs" / "x"
    assert Run(tmp_path / "y").path == tmp_path / "y"
    monkeypatch.setenv("ABDLAB_HOME", str(tmp_path / "mine"))
    assert Run("runs/x").path == tmp_path / "mine" / "runs" / "x"
    (deep / "seen").mkdir()
    assert there("seen") == deep / "seen"  # what a command names is what the shell sees
    assert there("runs/x") == tmp_path / "mine" / "runs" / "x"


def test_the_demo_lies_where_the_workbench_looks():
    out = inspect.signature(cli.demo).parameters["out"].default
    assert str(out) == batch.parameters("00")["run"]["default"]


def test_parameters_are_typed_by_the_notebooks_own_defaults():
    given = {
        "seed": "3",
        "sv_alpha": "1",
        "pseudo_batches": "None",
        "defenses": "['sv']",
        "run": "x",
    }
    assert batch.check_parameters("02", given) == {
        "seed": 3,
        "sv_alpha": 1.0,
        "pseudo_batches": None,
        "defenses": ["sv"],
        "run": "x",
    }


def test_both_ways_to_write_a_parameter():
    words = ["run", "02", "-p", "seed", "1", "-p", "run=here", "-o", "out.ipynb"]
    assert cli._join_pairs(words) == [
        "run",
        "02",
        "-p",
        "seed=1",
        "-p",
        "run=here",
        "-o",
        "out.ipynb",
    ]


@pytest.mark.slow
def test_a_failing_notebook_is_kept_and_exits_with_1(tmp_path, here):
    import nbformat

    cells = [nbformat.v4.new_code_cell("x = 1  # a number", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("raise ValueError(f'x is {x}, and that is wrong')"))
    book = tmp_path / "mine.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book)
    output = tmp_path / "out.ipynb"
    code, _, error = here("run", book, "-p", "x", "2", "-o", output)
    assert code == 1
    assert "x is 2, and that is wrong" in error.splitlines()[-1]
    assert output.exists()
