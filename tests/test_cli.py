"""The command line as a user sees it: exit codes, one clear sentence, no traceback."""

import json
import subprocess
import sys

import pytest

from abdlab import batch, cli


def abdlab(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from abdlab.cli import main; main()", *arguments], capture_output=True, text=True
    )


def test_notebooks_lists_names_parameters_and_defaults():
    done = abdlab("notebooks")
    assert done.returncode == 0
    for word in ("01_poisoning", "05_abd_ablation", "poison_rate", "quick/digits"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "02_distilation"], "unknown notebook '02_distilation': did you mean '02_distillation'?"),
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


def test_parameters_are_typed_by_the_notebooks_own_defaults():
    given = {"seed": "3", "sv_alpha": "1", "pseudo_batches": "None", "defenses": "['sv']", "run": "x"}
    assert batch.check_parameters("02", given) == {
        "seed": 3,
        "sv_alpha": 1.0,
        "pseudo_batches": None,
        "defenses": ["sv"],
        "run": "x",
    }


def test_both_ways_to_write_a_parameter():
    words = ["run", "02", "-p", "seed", "1", "-p", "run=here", "-o", "out.ipynb"]
    assert cli._join_pairs(words) == ["run", "02", "-p", "seed=1", "-p", "run=here", "-o", "out.ipynb"]


@pytest.mark.slow
def test_a_failing_notebook_is_kept_and_exits_with_1(tmp_path):
    output = tmp_path / "out.ipynb"
    done = abdlab("run", "01", "-p", "run", str(tmp_path / "run"), "-p", "preset", "quick/digit", "-o", str(output))
    assert done.returncode == 1
    assert "did you mean 'quick/digits'?" in done.stderr.splitlines()[-1]
    assert output.exists()
