"""The paper's numbers as collected, and ours beside them, on run folders that the real
Run class wrote.
"""

import json

import pandas as pd
import pytest

from abdlab.runs import Run
from abdlab.settings import settings
from abdlab.studies import paper

ZSKT = "paper/cifar10/zskt"
SECTIONS = ("data", "attack", "teacher")


def write(root, label, seed, acc, asr, preset=ZSKT, overrides=None):
    """One finished run, ROOT/seedN/LABEL, with the config that a run has and made-up
    scores.
    """
    chosen = settings(preset, overrides, seed=seed)
    sections = SECTIONS if label == "teacher" else (*SECTIONS, "student", *label.split("+"))
    run = Run(root / f"seed{seed}" / label, chosen.config(*sections))
    run.save_metrics({"label": label, "seed": seed, "acc": acc, "asr": asr, "seconds": 1.0})
    return run


def only(table):
    assert len(table) == 1
    return table.iloc[0]


def printed(**cell):
    table = paper.numbers()
    for column, value in cell.items():
        table = table[table[column] == value]
    return [(row.acc, row.asr) for row in table.itertuples()]


MAIN = {  # trigger: teacher, ZSKT, ABD's label, ABD, clean KD
    "badnet_grid": ((92.1, 99.9), (71.9, 96.9), "zskt+sv+sr", (68.3, 0.7), (74.6, 4.3)),
    "trojan_wm": ((93.8, 100), (82.7, 93.9), "zskt+sv+sr", (78.2, 22.5), (77.5, 11.1)),
    "trojan_3x3": ((93.4, 98.7), (80.9, 96.8), "zskt+sv+sr", (71.7, 33.3), (72.9, 1.7)),
    "blend": ((93.9, 99.7), (77.0, 74.4), "zskt+sv+sr", (71.5, 23.1), (78.0, 4.3)),
    "trojan_8x8": ((93.7, 99.6), (80.5, 57.2), "zskt+sv+sr", (72.6, 17.8), (75.2, 9.3)),
    "badnet_sq": ((93.4, 97.8), (80.8, 37.8), "zskt+sv", (77.9, 1.9), (76.2, 9.1)),
    "cl": ((91.2, 94.3), (76.8, 17.5), "zskt+sv+sr", (67.4, 10.2), (69.4, 2.1)),
    "sig": ((90.5, 97.3), (77.9, 0.0), "zskt+sv", (72.2, 0.0), (77.4, 0.0)),
    "l2_inv": ((93.9, 100), (82.0, 0.3), "zskt+sv", (70.7, 1.9), (77.2, 1.2)),
    "l0_inv": ((92.4, 99.6), (72.8, 8.3), "zskt+sv", (69.4, 0.0), (79.2, 3.7)),
}


class TestNumbers:
    @pytest.mark.parametrize("trigger", MAIN)
    def test_the_main_table(self, trigger):
        teacher, zskt, label, abd, clean = MAIN[trigger]
        cell = {"data": "cifar10", "teacher": "wrn-16-2", "trigger": trigger}
        assert printed(**cell, student="-", method="teacher") == [teacher]
        for method, numbers in (("zskt", zskt), (label, abd), ("clean", clean)):
            assert numbers in printed(**cell, student="wrn-16-1", method=method)

    @pytest.mark.parametrize(
        ("data", "teacher", "trigger", "numbers"),
        [
            (
                "gtsrb",
                "wrn-16-2",
                "badnet_grid",
                [(88.1, 98.8), (87.0, 99.5), (78.4, 13.0), (89.8, 0.3)],
            ),
            (
                "cifar10",
                "wrn-40-2",
                "badnet_grid",
                [(94.5, 100), (84.2, 4.6), (76.9, 10.7), (72.0, 4.7)],
            ),
            (
                "cifar10",
                "wrn-40-2",
                "trojan_wm",
                [(94.5, 100), (87.6, 54.5), (82.9, 5.8), (71.2, 5.3)],
            ),
        ],
    )
    def test_other_data_and_teachers(self, data, teacher, trigger, numbers):
        cell = {"data": data, "teacher": teacher, "trigger": trigger}
        for method, number in zip(("teacher", "zskt", "zskt+sv+sr", "clean"), numbers, strict=True):
            assert printed(**cell, method=method) == [number]

    @pytest.mark.parametrize(
        ("source", "trigger", "undefended", "defended"),
        [
            ("cmi", "trojan_wm", (89.1, 99.0), (79.8, 8.0)),
            ("cmi", "badnet_sq", (88.3, 95.9), (83.2, 6.0)),
            ("ood", "trojan_wm", (82.3, 100), (62.3, 21.8)),
            ("ood", "badnet_grid", (79.8, 99.6), (78.2, 14.5)),
        ],
    )
    def test_other_sources(self, source, trigger, undefended, defended):
        assert printed(trigger=trigger, method=source) == [undefended]
        assert printed(trigger=trigger, method=f"{source}+sv+sr") == [defended]

    @pytest.mark.parametrize(
        ("method", "grid", "wm"),
        [
            (
                "zskt",
                [(71.9, 96.9), (70.7, 87.8)],
                [(82.7, 93.9)],
            ),  # grid: the paper has two numbers
            ("zskt+sv", [(67.2, 0.3)], [(79.0, 57.0)]),
            ("zskt+sr", [(68.3, 76.2)], [(79.7, 44.1)]),
            ("zskt+sv+sr", [(68.3, 0.7)], [(78.2, 22.5)]),
        ],
    )
    def test_the_ablation(self, method, grid, wm):
        assert (
            printed(trigger="badnet_grid", teacher="wrn-16-2", data="cifar10", method=method)
            == grid
        )
        assert printed(trigger="trojan_wm", teacher="wrn-16-2", data="cifar10", method=method) == wm

    def test_there_are_no_others(self):
        # 40 of the main table, 12 of other data and teachers, 8 of other sources, 8 of
        # the ablation, of which 3 repeat
        assert len(paper.numbers()) == 40 + 12 + 8 + 8 - 3
        assert paper.numbers().part.str.split(", ").explode().value_counts().to_dict() == {
            "main": 40,
            "gtsrb": 4,
            "wrn-40-2": 8,
            "cmi": 4,
            "ood": 4,
            "ablation": 8,
        }

    def test_every_cell_has_its_settings(self):
        for row in paper.numbers().to_dict("records"):
            assert paper.preset_of(row) is not None, row


class TestVerdict:
    @pytest.mark.parametrize(
        ("ours", "std", "theirs", "tolerance", "said"),
        [
            (76.9, 0.0, 71.9, 5, "within"),  # just at the tolerance
            (76.91, 0.0, 71.9, 5, "above"),
            (66.9, 0.0, 71.9, 5, "within"),
            (66.89, 0.0, 71.9, 5, "below"),
            (10.0, 5.0, 0.0, 10, "within"),
            (20.0, 10.0, 0.0, 10, "within"),  # just at 2 std
            (20.1, 10.0, 0.0, 10, "above"),
            (79.9, 10.0, 100.0, 10, "below"),
            (50.0, float("nan"), 59.9, 10, "within"),  # one seed has no std
            (50.0, float("nan"), 60.1, 10, "below"),
            (float("nan"), 1.0, 60.1, 10, ""),
            (50.0, 1.0, float("nan"), 10, ""),
        ],
    )
    def test_at_the_boundaries(self, ours, std, theirs, tolerance, said):
        assert paper.verdict(ours, std, theirs, tolerance) == said

    def test_the_tolerances(self):
        assert paper.TOLERANCE == {"acc": 5.0, "asr": 10.0}


class TestCompare:
    def test_mean_std_and_seeds_by_hand(self, tmp_path):
        for seed, (acc, asr) in enumerate([(0.70, 0.10), (0.74, 0.30), (0.72, 0.50)]):
            write(tmp_path, "zskt+sv", seed, acc, asr)
        row = only(paper.compare(tmp_path))
        assert row.n == 3
        assert (row.acc, row.asr) == pytest.approx((72, 30))
        assert (row.acc_std, row.asr_std) == pytest.approx(
            (2, 20)
        )  # sqrt((4 + 4 + 0) / 2), sqrt((400 + 400 + 0) / 2)
        assert (row.paper_acc, row.paper_asr, row.part) == (67.2, 0.3, "ablation")
        assert (row.acc_is, row.asr_is) == ("within", "within")  # 4.8 <= 5; 29.7 <= 2 x 20
        assert (row.shortened, row.changed) == ("", "")
        assert row.runs == "seed0/zskt+sv, seed1/zskt+sv, seed2/zskt+sv"

    def test_above_and_below(self, tmp_path):
        write(tmp_path, "clean", 0, 0.80, 0.043)
        write(tmp_path, "zskt+sv+sr", 0, 0.60, 0.20)
        clean, abd = paper.compare(tmp_path).itertuples()
        assert (clean.acc_is, clean.asr_is) == (
            "above",
            "within",
        )  # 80 against 74.6, 4.3 against 4.3
        assert (abd.acc_is, abd.asr_is) == ("below", "above")  # 60 against 68.3, 20 against .7
        assert (clean.n, pd.isna(clean.acc_std)) == (1, True)

    def test_a_teacher_has_a_cell_of_its_own_and_comes_first(self, tmp_path):
        write(tmp_path, "clean", 0, 0.746, 0.043)
        write(tmp_path, "teacher", 0, 0.921, 0.999)
        table = paper.compare(tmp_path)
        assert list(table.method) == ["teacher", "clean"]
        assert (table.student[0], table.paper_acc[0], table.acc_is[0], table.shortened[0]) == (
            "-",
            92.1,
            "within",
            "",
        )

    def test_both_of_the_papers_numbers_are_shown(self, tmp_path):
        write(tmp_path, "zskt", 0, 0.72, 0.80)
        table = paper.compare(tmp_path)
        assert list(zip(table.part, table.paper_asr, table.asr_is, strict=True)) == [
            ("main", 96.9, "below"),
            ("ablation", 87.8, "within"),
        ]

    def test_a_shortened_run_says_so(self, tmp_path):
        write(
            tmp_path,
            "zskt+sv",
            0,
            0.7,
            0.1,
            overrides={"zskt.pseudo_batches": 4000, "teacher.epochs": 30},
        )
        row = only(paper.compare(tmp_path))
        assert row.shortened == "teacher.epochs 30 of 200; zskt.pseudo_batches 4,000 of 80,000"
        assert row.changed == ""

    @pytest.mark.parametrize("steps", [80_000, 100_000])
    def test_as_long_or_longer_is_not_shortened(self, tmp_path, steps):
        write(tmp_path, "zskt+sv", 0, 0.7, 0.1, overrides={"zskt.pseudo_batches": steps})
        row = only(paper.compare(tmp_path))
        assert row.shortened == ""
        assert row.changed == ("" if steps == 80_000 else "zskt.pseudo_batches 100000, not 80000")

    def test_every_other_setting_that_differs_is_named(self, tmp_path):
        changes = {
            "sv.layers": 3,
            "attack.params": {"size": 5},
            "zskt.batch_size": 64,
            "sr.weight": 2.0,
            "data.size": 16,
        }
        write(tmp_path, "zskt+sv", 0, 0.7, 0.1, overrides=changes)
        said = only(paper.compare(tmp_path)).changed.split("; ")
        assert said == [
            "data.size 16, not the default",
            "attack.params {'size': 5}, not the default",
            "zskt.batch_size 64, not 128",
            "sv.layers 3, not 5",
        ]  # sr is no part of zskt+sv

    def test_where_the_data_lie_is_no_setting(self, tmp_path):
        write(
            tmp_path,
            "zskt+sv",
            0,
            0.7,
            0.1,
            overrides={"data.root": "/elsewhere", "data.download": True},
        )
        write(tmp_path, "zskt+sv", 1, 0.7, 0.1)
        row = only(paper.compare(tmp_path))
        assert (row.n, row.changed) == (2, "")

    def test_a_default_that_is_written_out_is_the_same_setting(self, tmp_path):
        write(
            tmp_path, "zskt+sv", 0, 0.7, 0.1, overrides={"sv.form": "auto", "data.download": False}
        )
        write(tmp_path, "zskt+sv", 1, 0.7, 0.1)
        row = only(paper.compare(tmp_path))
        assert (row.n, row.changed) == (2, "")

    def test_runs_with_other_settings_are_never_averaged(self, tmp_path):
        write(tmp_path, "zskt+sv", 0, 0.7, 0.1)
        write(tmp_path, "zskt+sv", 1, 0.5, 0.1, overrides={"sv.alpha": 0.2})
        table = paper.compare(tmp_path)
        assert sorted(zip(table.acc.round(6), table.n, table.changed, strict=True)) == [
            (50.0, 1, "sv.alpha 0.2, not 0.1"),
            (70.0, 1, ""),
        ]

    def test_a_seed_counts_once(self, tmp_path):
        """A study's jobs each hold a copy of the teacher that they share."""
        for job, acc in (("a", 0.90), ("b", 0.92)):
            write(tmp_path / job, "teacher", 0, acc, 1.0)
        write(tmp_path / "c", "teacher", 1, 0.95, 1.0)
        row = only(paper.compare(tmp_path))
        assert row.n == 2
        assert row.acc == pytest.approx(93)  # of 91 and 95
        assert row.acc_std == pytest.approx(8**0.5)  # sqrt((4 + 4) / 1)

    def test_an_optimised_pattern_is_not_a_setting(self, tmp_path):
        for seed in (0, 1):
            overrides = {
                "attack.trigger": "trojan_3x3",
                "attack.params": {"pattern": f"3x3x3:{seed}"},
            }
            write(tmp_path, "zskt", seed, 0.8, 0.9, overrides=overrides)
        row = only(paper.compare(tmp_path))
        assert (row.n, row.trigger, row.paper_asr, row.changed) == (2, "trojan_3x3", 96.8, "")

    def test_the_order_of_the_defenses_is_no_other_method(self, tmp_path):
        write(tmp_path, "zskt+sr+sv", 0, 0.683, 0.007)
        assert only(paper.compare(tmp_path)).method == "zskt+sv+sr"

    def test_a_folder_of_cifar10_is_its_cell_but_changed(self, tmp_path):
        write(
            tmp_path, "zskt+sv", 0, 0.7, 0.1, overrides={"data.name": "folder:/data/cifar10-jpeg"}
        )
        row = only(paper.compare(tmp_path))
        assert (row.paper_acc, row.changed) == (
            67.2,
            "data.name folder:/data/cifar10-jpeg, not cifar10",
        )

    def test_a_folder_with_the_classes_of_cifar10_is_its_cell_whatever_its_name(self, tmp_path):
        folder = tmp_path / "data"
        overrides = {"data.name": f"folder:{folder}"}
        write(tmp_path / "runs", "zskt+sv", 0, 0.7, 0.1, overrides=overrides)
        last, *others = sorted(paper.CIFAR10_CLASSES)
        for name in others:
            (folder / "train" / name).mkdir(parents=True)
        assert pd.isna(only(paper.compare(tmp_path / "runs")).paper_acc), "a class is missing"
        (folder / "train" / last).mkdir()
        row = only(paper.compare(tmp_path / "runs"))
        assert (row.data, row.paper_acc, row.changed) == (
            "cifar10",
            67.2,
            f"data.name folder:{folder}, not cifar10",
        )

    @pytest.mark.parametrize(
        ("preset", "overrides", "label"),
        [
            ("quick/digits", {}, "zskt"),
            ("quick/digits", {"data.name": "folder:/my/cats"}, "zskt"),
            (ZSKT, {"attack.trigger": "smooth"}, "zskt"),
            (ZSKT, {"attack.trigger": "badnet_grid+blend"}, "zskt"),
            (ZSKT, {"student.model": "wrn-10-1"}, "zskt"),
            (ZSKT, {"attack.trigger": "badnet_sq"}, "zskt+sv+sr"),  # the paper stops at SV there
        ],
    )
    def test_no_such_cell(self, tmp_path, preset, overrides, label):
        write(tmp_path, label, 0, 0.9, 0.8, preset, overrides)
        row = only(paper.compare(tmp_path))
        assert pd.isna(row.part)
        assert (row.n, row.acc_is, row.asr_is) == (1, "", "")

    def test_a_trigger_composed_by_hand(self, tmp_path):
        card = {"name": "badnet_grid", "params": {}, "then": [{"name": "blend", "params": {}}]}
        write(tmp_path, "zskt", 0, 0.9, 0.8, overrides={"attack.trigger": card})
        row = only(paper.compare(tmp_path))
        assert (row.trigger, pd.isna(row.part)) == ("badnet_grid+blend", True)

    @pytest.mark.parametrize("preset", ["paper/cifar10/cmi", "paper/cifar10/ood"])
    def test_other_sources(self, tmp_path, preset):
        source = preset.rsplit("/", 1)[1]
        write(tmp_path, f"{source}+sv+sr", 0, 0.7, 0.1, preset)
        row = only(paper.compare(tmp_path))
        assert (row.part, row.shortened, row.changed) == (source, "", "")

    def test_the_length_of_other_sources(self, tmp_path):
        write(
            tmp_path,
            "cmi",
            0,
            0.7,
            0.1,
            "paper/cifar10/cmi",
            {"cmi.rounds": 20, "cmi.kd_steps": 100},
        )
        write(tmp_path, "ood", 0, 0.7, 0.1, "paper/cifar10/ood", {"ood.epochs": 30})
        cmi, ood = paper.compare(tmp_path).itertuples()
        assert cmi.shortened == "cmi.rounds 20 of 200; cmi.kd_steps 100 of 400"
        assert ood.shortened == "ood.epochs 30 of 300"

    def test_a_teacher_without_an_attack_has_no_cell(self, tmp_path):
        run = Run(tmp_path / "seed0" / "clean_teacher", settings(ZSKT).config("data", "teacher"))
        run.save_metrics({"label": "clean_teacher", "seed": 0, "acc": 0.95})
        row = only(paper.compare(tmp_path))
        assert (row.method, row.trigger, pd.isna(row.asr), pd.isna(row.part)) == (
            "clean_teacher",
            "-",
            True,
            True,
        )

    def test_folders_of_notebooks_and_unfinished_runs_do_not_count(self, tmp_path):
        Run(tmp_path / "05_abd_ablation").save_metrics({"acc": 0.5})
        Run(tmp_path / "seed0" / "zskt", settings(ZSKT).config("data"))
        assert paper.compare(tmp_path).empty

    def test_a_broken_file_is_named(self, tmp_path):
        write(tmp_path, "zskt", 0, 0.7, 0.9).file("metrics.json").write_text("{")
        with pytest.raises(ValueError, match=r"seed0/zskt/metrics\.json is no JSON"):
            paper.compare(tmp_path)

    def test_nothing_is_written(self, tmp_path):
        write(tmp_path, "zskt", 0, 0.7, 0.9)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        paper.compare(tmp_path)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert json.loads((tmp_path / "seed0/zskt/config.json").read_text())["preset"] == ZSKT
