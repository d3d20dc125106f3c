"""Any number of runs in one figure: what its lines, words, marks and table say."""

import io
import json

import pandas as pd
import pytest

from abdlab.plots.many_runs import END, band, end_of, many_runs, smoothed, views_of
from abdlab.plots.run_words import Shown, csv_of, differing, legends, marks, same_but_seed
from abdlab.runs import Run
from abdlab.widgets.many_runs import ManyRuns

TURNED = "sv: alpha 0.01 -> 0.09 from pseudo-batch 115 on"
STEPS = (1, 60, 115, 180)


def write(root, folder, label, accs, config=None, seed=0, events=None):
    """A run's folder with exams at STEPS; ASR is a tenth of ACC."""
    run = Run(root / folder, config)
    rows = [
        {"label": label, "step": s, "kd": 1 / (3 * s), "acc": a, "asr": a / 10}
        for s, a in zip(STEPS, accs, strict=True)
    ]
    rows[2] |= {"events": events} if events else {}
    run.file("history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    scores = {"acc": accs[-1], "asr": accs[-1] / 10}
    run.save_metrics({"label": label, "seed": seed, **scores})
    return Shown.of(run, folder)


def settings_of(seed=0, **sv):
    return {"preset": "quick/digits", "seed": seed, "data": {"name": "digits"}, "sv": sv}


@pytest.fixture
def runs(tmp_path):
    plan = [[0, 0.01], [115, 0.09]]
    made = [
        write(
            tmp_path, "seed0/zskt+sv@1", "zskt+sv", (0.1, 0.3, 0.5, 0.7), settings_of(alpha=0.01)
        ),
        write(
            tmp_path,
            "seed0/zskt+sv@2",
            "zskt+sv",
            (0.1, 0.2, 0.4, 0.6),
            settings_of(alpha=plan),
            events=[TURNED],
        ),
    ]
    made += [
        write(tmp_path, f"seed{s}/zskt", "zskt", (0.1, 0.2, 0.3, 0.4 + s / 10), {"seed": s}, s)
        for s in range(3)
    ]
    for s in range(3):
        for label, acc in (("teacher", 0.9 + s / 100), ("clean", 0.8)):
            scores = {"label": label, "seed": s, "acc": acc, "asr": 1 - acc}
            Run(tmp_path / f"seed{s}" / label).save_metrics(scores)
    return made


def named(spec, name, axis="y"):
    """The visible trace of a name on one axis."""
    return next(
        t
        for t in spec["data"]
        if t["name"] == name
        and "line" in t["mode"]
        and t.get("yaxis", "y") == axis
        and t.get("hoverinfo") != "skip"
    )


class TestWords:
    def test_the_legend_says_what_differs(self, runs):
        assert legends(runs[:2]) == [
            "ZSKT+SV @1: alpha 0.01",
            "ZSKT+SV @2: alpha 0.01 to 0.09 at 115",
        ]
        assert legends(runs[2:4]) == ["ZSKT: seed 0", "ZSKT: seed 1"]
        assert len(set(legends([*runs, *runs[:1]]))) == 5  # the same run twice is itself

    def test_long_lists_are_cut_and_equal_names_told_apart(self):
        empty = pd.DataFrame()
        wide = [{"alpha": a, "k": a, "layers": a, "stop": a / 9, "cap": a} for a in (1, 2)]
        made = [
            Shown(f"zskt+sv@{i}", "zskt+sv", 0, {"sv": c}, {}, empty) for i, c in enumerate(wide)
        ]
        assert legends(made)[1] == "ZSKT+SV @1: alpha 2, k 2, layers 2, 2 more"
        both = {"sr": {"weight": 1.0}, "tu": {"weight": 1.0}}
        others = {"sr": {"weight": 2.0}, "tu": {"weight": 3.0}}
        assert differing([both, others, {}]) == [
            {"sr.weight": 1.0, "tu.weight": 1.0},
            {"sr.weight": 2.0, "tu.weight": 3.0},
            {},
        ]

    def test_marks_have_kinds(self):
        told = [
            (TURNED, "turned"),
            ("self-retrospection: on from pseudo-batch 3", "begins"),
            ("shuffling vaccine: off from pseudo-batch 2 on", "ends"),
            ("shuffling vaccine: found at try 1", "other"),
        ]
        frame = pd.DataFrame({"step": range(4), "events": [[text] for text, _ in told]})
        assert [(kind, text) for _, kind, text in marks(frame)] == [(k, t) for t, k in told]

    def test_groups_are_of_one_method_and_settings(self, runs):
        assert [len(group) for group in same_but_seed(runs)] == [1, 1, 3]
        again = [*runs, runs[2]]  # a second run of a seed stays alone
        assert [len(group) for group in same_but_seed(again)][:3] == [1, 1, 3]


class TestFigure:
    def test_one_colour_a_run_exact_hover_and_marks(self, runs):
        spec = many_runs(runs, seeds=False)
        shown = [t for t in spec["data"] if t["showlegend"]]
        assert (
            len({t["line"]["color"] for t in shown}) == len(runs) == len({t["name"] for t in shown})
        )
        line = named(spec, "ZSKT+SV @2: alpha 0.01 to 0.09 at 115, seed 0")
        assert line["y"] == pytest.approx([10, 20, 40, 60])
        assert line["customdata"] == ["10.00 %", "20.00 %", "40.00 %", "60.00 %"]
        mark = next(t for t in spec["data"] if t["mode"] == "markers")
        assert (mark["x"], mark["y"], mark["customdata"]) == ([115], [40.0], [TURNED])
        assert mark["marker"]["color"] == line["line"]["color"]
        assert not [t for t in many_runs(runs, marked=False)["data"] if t["mode"] == "markers"]

    def test_seeds_are_a_mean_in_a_band(self, runs):
        spec = many_runs(runs, view="ACC")
        line = named(spec, "ZSKT (3 seeds)")
        assert line["y"][-1] == pytest.approx(50)
        assert line["customdata"][-1] == "50.00 % (mean of 3: 40.00 % to 60.00 %)"
        low, high = (t["y"][-1] for t in spec["data"] if t.get("hoverinfo") == "skip")
        assert (low, high) == (pytest.approx(40), pytest.approx(60))
        assert band(runs[:1], "nothing").empty

    def test_smoothing_moves_the_line_and_not_the_hover(self, runs):
        spec = many_runs(runs[:1], view="kd", smoothing=0.5)
        (line,) = spec["data"]
        raw = runs[0].history["kd"]
        assert line["y"][1] == pytest.approx((0.25 * raw[0] + 0.5 * raw[1]) / 0.75)
        assert line["customdata"][1] == f"{raw[1]:.6g}"
        assert smoothed([0.3, 0.1], 0).tolist() == [0.3, 0.1]
        with pytest.raises(ValueError, match=r"weight in \[0, 1\)"):
            smoothed([1.0], 1.0)

    def test_logarithmic_axes_leave_zeros_out(self, runs):
        runs[0].history.loc[0, "acc"] = 0.0
        spec = many_runs(runs[:1], view="ACC", log_x=True, log_y=True)
        assert spec["layout"]["xaxis"]["type"] == spec["layout"]["yaxis"]["type"] == "log"
        assert spec["data"][0]["x"] == [*STEPS[1:]]

    def test_the_ends_are_points_of_acc_against_asr(self, runs):
        spec = many_runs(runs, view=END)
        point = next(t for t in spec["data"] if t["name"] == "ZSKT (3 seeds)")
        assert point["x"] == pytest.approx([4, 5, 6])
        assert point["y"] == pytest.approx([40, 50, 60])
        assert end_of(runs[0]) == (0.7, pytest.approx(0.07))
        with pytest.raises(ValueError, match="the view is one of ACC and ASR"):
            many_runs(runs, view="tensorboard")
        assert views_of(runs)[-1] == "kd"


class TestWidget:
    def test_draws_with_teacher_and_floor_and_writes_what_it_read(self, runs, tmp_path):
        widget = ManyRuns(tmp_path)
        names = [run.name for run in runs]
        widget.show(names)
        assert not widget.trouble.sentence
        lines = {t.name: t for t in widget.figure.data if t.showlegend}
        assert lines["teacher, mean of 3"].y[0] == pytest.approx(91)
        assert lines["clean KD (floor), mean of 3"].y[0] == pytest.approx(80)
        for view in (END, "kd", "ASR"):
            widget.view.value = view
            assert not widget.trouble.sentence
        assert len(widget.figure.data) > 0

        table = pd.read_csv(io.StringIO(widget.save_csv().read_text()))
        for run in runs:
            part = table[table["run"] == run.name].drop(columns="run")
            lines = run_lines(tmp_path / run.name)
            for row, line in zip(part.to_dict("records"), lines, strict=True):
                known = {k: v for k, v in row.items() if v == v}
                if "events" in known:
                    known["events"] = json.loads(known["events"])
                assert known == line
        assert widget.save_csv().name == "runs-2.csv"
        assert csv_of([]).strip() == ""

    def test_the_figure_follows_the_choice(self, runs, tmp_path):
        widget = ManyRuns(tmp_path)
        widget.show([runs[0].name])
        widget.show([run.name for run in runs[:2]])
        assert len({t.legendgroup for t in widget.figure.data}) == 4  # and teacher, and floor
        widget.show([])
        assert widget._card.layout.display == "none"


def run_lines(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
