"""The command line as a user sees it: exit codes, one clear sentence, no traceback."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from abdlab import batch, cli
from abdlab.presets import ABOUT, PRESETS
from abdlab.runs import Run
from abdlab.settings import SECTIONS, settings


def abdlab(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from abdlab.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
    )


def test_notebooks_lists_names_parameters_and_defaults():
    done = abdlab("notebooks")
    assert done.returncode == 0
    for word in ("01_poisoning", "05_abd_ablation", "poison_rate", "quick/digits"):
        assert word in done.stdout


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
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = abdlab(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_report_of_a_folder_without_runs_says_what_to_do(tmp_path):
    done = abdlab("report", str(tmp_path))
    assert done.returncode == 2
    assert "abdlab demo" in done.stderr


def test_report_prints_acc_and_asr_of_every_run(tmp_path):
    (tmp_path / "seed0" / "zskt").mkdir(parents=True)
    values = {"label": "zskt", "seed": 0, "acc": 0.9515, "asr": 0.987, "seconds": 12.3}
    (tmp_path / "seed0" / "zskt" / "metrics.json").write_text(json.dumps(values))
    done = abdlab("report", str(tmp_path))
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("seed0/zskt", "95.2", "98.7", "12"))


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
def test_a_failing_notebook_is_kept_and_exits_with_1(tmp_path):
    output = tmp_path / "out.ipynb"
    done = abdlab(
        "run",
        "01",
        "-p",
        "run",
        str(tmp_path / "run"),
        "-p",
        "preset",
        "quick/digit",
        "-o",
        str(output),
    )
    assert done.returncode == 1
    assert "did you mean 'quick/digits'?" in done.stderr.splitlines()[-1]
    assert output.exists()
