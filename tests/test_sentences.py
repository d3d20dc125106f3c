"""What notebooks end with: sentences computed from numbers, all by hand here."""

import numpy as np
import pandas as pd
import pytest
import torch

from abdlab.activations import nearest_share
from abdlab.studies import sentences, tables
from abdlab.studies.sentences import Sign, outcome, percent


def row(label, acc, asr, seed=0, **more):
    return {"label": label, "seed": seed, "acc": acc, "asr": asr, **more}


def test_the_issues_own_sentence():
    rows = [row("clean", 0.99, 0.03), row("zskt", 0.98, 1.0), row("zskt+sv+tu", 0.97, 0.07)]
    assert (
        outcome(rows) == "ZSKT+SV+TU takes ASR from 100 to 7 %, ACC lost 1 point; the floor is 3 %."
    )
    assert outcome(reversed(rows)) == outcome(rows)


@pytest.mark.parametrize(
    ("acc", "told"),
    [
        (0.98, "ACC is unchanged"),
        (0.97996, "ACC is unchanged"),
        (0.9849, "ACC gained 0.5 points"),
        (0.99, "ACC gained 1 point"),
        (0.955, "ACC lost 2.5 points"),
    ],
)
def test_what_it_costs(acc, told):
    rows = [row("cmi", 0.98, 0.5), row("bounded/cmi", acc, 0.0)]
    assert outcome(rows) == f"Bounded/CMI takes ASR from 50 to 0 %, {told}."


def test_what_changes_nothing_says_so():
    rows = [row("zskt", 0.98, 1.0), row("zskt+sv", 0.97, 0.9996)]
    assert outcome(rows) == "ZSKT+SV leaves ASR at 100 %, ACC lost 1 point."


def test_a_defended_student_without_an_undefended_one_is_told_too():
    rows = [row("zskt", 0.98, 1.0), row("zskt+sv", 0.97, 0.5), row("bounded/nayer", 0.96, 0.04)]
    assert outcome(rows) == (
        "ZSKT+SV takes ASR from 100 to 50 %, ACC lost 1 point; bounded/NAYER has ACC 96 % and ASR"
        " 4 %."
    )


def test_means_are_over_seeds_and_the_most_defended_counts():
    rows = [
        row("zskt", 0.9, 0.8, 0),
        row("zskt", 1.0, 0.9, 1),
        row("zskt+tu", 0.5, 0.0, 0),
        row("zskt+sv+sr", 0.7, 0.4, 0),
        row("zskt+sv+tu", 0.9, 0.1, 0),  # as many parts, and later
        row("zskt+sv+tu", 0.8, 0.3, 1),
        row("clean", 1.0, 0.0, 0),
        row("clean", 1.0, 0.05, 1),
        row("unlearn+bounded/teacher", 1.0, 0.0, 0),  # no student
        row("teacher", 1.0, 1.0, 0),
    ]
    assert outcome(rows) == (
        "ZSKT+SV+TU takes ASR from 85 to 20 %, ACC lost 10 points; the floor is 2.5 % (means of 2"
        " seeds)."
    )
    assert outcome(rows, defense="tu").startswith("ZSKT+TU takes ASR from 85 to 0 %, ACC lost 45")


def test_experiments_that_differ_are_pairs_of_their_own_and_shared_models_count_once():
    rows = [
        row("zskt", 0.9, 1.0, trigger="blend", model="a"),
        row("zskt", 0.9, 1.0, trigger="blend", model="a"),  # of another job
        row("zskt", 0.9, 0.0, seed=1, trigger="blend", model="b"),
        row("zskt+sv", 0.8, 0.4, trigger="blend", model="c"),
        row("cmi", 0.7, 0.9, trigger="sig", model="d"),
        row("cmi+sv", 0.7, 0.0, trigger="sig", model="e"),
        row("ood", 0.1, 0.1, trigger="sig", model="f"),  # without a defended one
    ]
    # blend .5 to .4, sig .9 to 0: .7 to .2; ACC .9 to .8 and .7 to .7: .05
    assert outcome(rows, ["trigger"]) == (
        "Over 2 pairs of undefended and defended students, the defense takes ASR from 70 to 20 %,"
        " ACC lost 5 points (means of 2 seeds)."
    )


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row("teacher", 0.997, 1.0)], "Teacher has ACC 99.7 % and ASR 100 %."),
        ([row("teacher", 0.997, None)], "Teacher has ACC 99.7 %."),
        (
            [row("teacher", 1, 1), row("zskt", 0.9, 0.8), row("clean", 0.9, 0.0)],
            "ZSKT has ACC 90 % and ASR 80 %; the floor is 0 %.",
        ),
        ([row("zskt", 0.9, None), row("zskt+sv", 0.8, None)], "ZSKT+SV: ACC lost 10 points."),
        ([row("zskt", None, None)], "Nothing was measured."),
        ([], "Nothing was measured."),
    ],
)
def test_what_is_not_there_is_not_said(rows, told):
    assert outcome(rows) == outcome(pd.DataFrame(rows)) == told
    assert "nan" not in told


def test_rows_of_different_threads_are_said():
    rows = [row("zskt", 0.9, 0.8, threads=1), row("zskt+sv", 0.9, 0.1, threads=2)]
    assert outcome(rows).endswith(
        "Rows differ in threads (1 thread: 1 row, 2 threads: 1 row): training amplifies that."
    )
    assert "Rows" not in outcome([{**r, "threads": 2} for r in rows])


def test_percent_knows_no_minus_nought():
    assert [percent(x) for x in (-1e-9, -0.0004, 0.9996, 0.12345, -0.02)] == [
        "0",
        "0",
        "100",
        "12.3",
        "-2",
    ]


def test_signs_by_hand():
    signs = [Sign("a", 0.021, 0.02), Sign("b", 0.02, 0.02), Sign("c", 0.5, 0.25)]
    assert [sign.shows for sign in signs] == [True, False, True]
    assert str(signs[1]) == "b: 2 %, not above 2 %: no sign"
    say = sentences.signs_in_words
    assert say(signs, "cmi", 0.1) == (
        "CMI: its images show 2 of 3 signs of the backdoor, and its ASR is 10 %."
    )
    assert say(signs[1:2], "zskt+sv", 1.0) == (
        "ZSKT+SV: its images show 0 of 1 signs of the backdoor, and its ASR is 100 %: it can pass"
        " unseen."
    )
    assert say(signs[1:2], "zskt", None) == ("ZSKT: its images show 0 of 1 signs of the backdoor.")


def test_the_nearest_point_of_another_group_by_hand():
    points = np.array([[0, 0], [10, 0], [1, 0], [9, 1], [1.5, 0], [2, 0]])
    groups = ["clean", "triggered", "synthetic", "synthetic", "synthetic", "other"]
    # the first synthetic point is nearest to clean (a synthetic one does not count), the second
    # to triggered, the third to other
    assert nearest_share(points, groups, "synthetic", "triggered") == pytest.approx(1 / 3)
    assert nearest_share(points, groups, "synthetic", "clean") == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="points of dreamt"):
        nearest_share(points, groups, "dreamt", "clean")


def test_the_channel_that_moves_most_is_named():
    changes = {
        "teacher": {"a": torch.tensor([0.1, 2.0]), "b": torch.tensor([3.04, 0.0, 1.0])},
        "ZSKT": {"a": torch.tensor([0.1, 0.5]), "b": torch.tensor([0.2])},
    }
    assert sentences.most_moved(changes) == (
        "The trigger moves most: teacher: channel 0 of b, 3.0 times the layer's clean norm; ZSKT:"
        " channel 1 of a, 0.5 times the layer's clean norm."
    )


def test_a_table_has_a_dash_where_there_is_no_number_and_a_row_per_axis_value():
    results = pd.DataFrame(
        [
            row("zskt", 0.9, 0.8, 0, model="a", alpha=0.1),
            row("zskt", 0.7, 0.6, 1, model="b", alpha=0.1),
            row("zskt", 0.5, None, 0, model="c", alpha=0.5),
        ]
    ).assign(trigger="blend", source="zskt", defense="none")
    assert tables.varied(results, ["alpha", "seed", "methods", "gone", "trigger"]) == ["alpha"]
    one = tables.shown(tables.study_summary(results, ["alpha"]))
    assert one.loc[("blend", "zskt", "none", 0.1)].tolist() == ["80.0", "14.1", "70.0", "14.1", "2"]
    assert one.loc[("blend", "zskt", "none", 0.5)].tolist() == ["50.0", "-", "-", "-", "1"]
    some = pd.DataFrame({"alpha": [0.1, None], "k": ["a", "b"], "x": [1.0, 2.0]})
    assert tables.shown(some.set_index(["alpha", "k"])).index.tolist() == [(0.1, "a"), ("-", "b")]
    assert tables.shown(pd.DataFrame({"x": [-0.0, -0.04]}))["x"].tolist() == ["0.0", "0.0"]
    lone = tables.results_table(pd.DataFrame([row("zskt", 0.5, None)]))
    assert lone.loc["ZSKT"].tolist() == ["50.0", "unknown", 1]
