"""A study's models as rows of the page of results."""

import json

import pandas as pd
import pytest

import abdlab
from abdlab import studies
from abdlab.studies.book import KEY, read_results
from abdlab.studies.page_rows import merge, page_rows, setting_of

pytestmark = pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")

TINY = {
    "data.size": 8,
    "teacher.epochs": 1,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 2,
    "zskt.student_steps": 1,
    "zskt.width": 4,
    "zskt.batch_size": 16,
}
#: what the study varies, and what the page calls it
ATTACKS = {
    "no backdoor": {"attack.rate": 0.0},
    "none": {"attack.rate": 0.1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of one method, run without kernels; and its jobs."""
    out = tmp_path_factory.mktemp("study")
    study = studies.make_study(
        "05_abd_ablation",
        parameters={"overrides": TINY, "device": "cpu", "methods": ["zskt"]},
        list=[*ATTACKS.values()],
        seeds=[3],
    )
    studies.write_study(study, out)
    for job in study.jobs:
        chosen = abdlab.settings("quick/digits", job.parameters["overrides"], seed=3, device="cpu")
        abdlab.distill_all(out / job.folder, chosen, chosen.dataset(), ["zskt"])
        (out / job.folder / "status.json").write_text(json.dumps({"state": "done"}))
    return out, study


@pytest.fixture(scope="module")
def rows(finished):
    return page_rows(finished[0], "attackers")


def test_each_model_is_a_row_with_its_attack_in_words(rows):
    assert sorted(set(rows["setting"])) == sorted(ATTACKS)
    assert sorted(rows["method"]) == sorted(["teacher", "zskt"] * len(ATTACKS))
    assert not rows.duplicated(list(KEY)).any()


@pytest.mark.parametrize(
    ("overrides", "axes", "words"),
    [
        ({"teacher.objective": "clamped"}, {"teacher.objective": "clamped"}, "clamped"),
        (
            {"attack.relabel": "all_to_all", "attack.rate": 0.3},
            {},
            "all to all, 30 % poisoned",
        ),
        (
            {"attack.more": [{"trigger": "blend", "target": 3, "rate": 0.1}]},
            {"seeds": [1]},
            "2 triggers with 2 targets, 10 % poisoned each",
        ),
        (
            {"attack.more": [{"trigger": "blend", "target": 0, "rate": 0.05}]},
            {"unlearn.scans": 4},
            "2 triggers with 1 target, 10 and 5 % poisoned, unlearn.scans 4",
        ),
        ({}, {"sv.alpha": 0.2, "methods": ["zskt"]}, "sv.alpha 0.2"),
    ],
)
def test_a_setting_in_words(overrides, axes, words):
    assert setting_of(abdlab.settings("quick/digits", overrides), axes) == words


def test_excess_is_the_asr_less_that_of_the_clean_teachers_student(finished, rows):
    out, study = finished
    clean, attacked = (out / job.folder / "seed3" / "zskt" for job in study.jobs[:2])
    chosen = abdlab.settings("quick/digits", TINY, seed=3, device="cpu")
    exam = chosen.exam(chosen.dataset())
    asr = json.loads((attacked / "metrics.json").read_text())["asr"]
    floor = exam(abdlab.load_model(clean / "student.safetensors"))["asr"]
    students = rows[rows["method"] == "zskt"].set_index("setting")
    assert students.loc["none", "excess"] == pytest.approx(100 * (asr - floor), abs=0.051)
    assert pd.isna(students.loc["no backdoor", "excess"])
    assert students.drop("no backdoor")["excess"].notna().all()


def test_rows_replace_those_of_the_same_run_and_leave_the_others(rows, tmp_path):
    file = tmp_path / "attackers.csv"
    file.write_text(
        "study,preset,trigger,method,setting,seed,acc,adversarial\n"
        "attackers,quick/digits,badnet_sq,zskt,none,3,1.0,7\nother,,,zskt,,0,2.0,\n"
    )
    assert merge(rows, file) == len(rows) - 1
    assert merge(rows, file) == 0  # the same again
    found = read_results(tmp_path)
    assert len(found) == len(rows) + 1
    (first, second) = found.to_dict("records")[:2]
    student = rows[(rows["method"] == "zskt") & (rows["setting"] == "none")].iloc[0]
    assert (first["acc"], first["adversarial"]) == (student["acc"], "7")
    assert (second["study"], second["acc"]) == ("other", 2.0)


def test_only_a_study_has_such_rows(here, tmp_path):
    code, _, err = here("report", tmp_path, "--into", tmp_path / "x.csv")
    assert code == 2
    assert "--into is the report of a study" in err
