"""Figures carry what a reader needs: labelled axes, every series, values that are
right.
"""

import os
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from abdlab import labels, plots
from abdlab.attacks.triggers import Trigger, trigger_from
from abdlab.inversion import Bank, Inverted
from abdlab.plots import dark
from abdlab.studies import figures, tables

CLASSES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def images(n, channels=1):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2


def labelled(ax):
    return bool(ax.get_xlabel()) and bool(ax.get_ylabel())


def test_the_palette_is_seaborns_for_the_colour_blind():
    import seaborn

    assert list(plots.colors.PALETTE) == seaborn.color_palette("colorblind").as_hex()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_clamped(channels):
    shown = plots.picture(images(1, channels)[0])
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_training_curves_are_in_percent_with_a_floor():
    history = pd.DataFrame(
        {"label": ["zskt", "zskt"], "step": [10, 20], "acc": [0.5, 0.9], "asr": [0.1, 0.95]}
    )
    ax = plots.training_curves(history, floor=0.03)
    acc, asr, floor = ax.lines
    assert list(acc.get_ydata()) == [50, 90]
    assert list(asr.get_ydata()) == [10, 95]
    assert floor.get_ydata()[0] == pytest.approx(3)
    assert labelled(ax)
    assert acc.get_color() == asr.get_color() == plots.color_of("zskt")


def test_what_was_measured_once_is_a_point_and_no_curve():
    history = pd.DataFrame(
        {
            "label": ["cmi"] * 3 + ["teacher"],
            "step": [1, 2, 3, 9],
            "acc": [None, 0.25, 0.75, 0.995],
            "asr": [None, None, 0.5, None],
            "kd": [3.0, None, None, None],
            "sv": [1.0, 2.0, None, None],
        }
    )
    acc, asr, lone = plots.training_curves(history).lines
    assert (acc.get_linestyle(), list(acc.get_ydata())) == ("-", [25, 75])
    assert (asr.get_linestyle(), asr.get_label()) == ("None", "CMI: ASR 50.0%, measured once")
    assert lone.get_label() == "teacher: ACC 99.5%, measured once"
    kd, sv = plots.loss_curves(history).lines
    assert (kd.get_linestyle(), kd.get_marker(), sv.get_linestyle()) == ("None", "o", "-")
    plt.close("all")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_trigger_gallery_names_and_measures_every_trigger(channels):
    clean = torch.rand(5, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    figure = plots.trigger_gallery(
        clean, [Trigger("badnet_sq", {"size": 2}), Trigger("blend") + Trigger("sig")], columns=3
    )
    assert len(figure.axes) == 3 * 6
    names = [ax.get_ylabel().splitlines()[0] for ax in figure.axes[::6]]
    assert names == ["clean", "badnet_sq", "blend+sig"]
    sizes = [text.get_text() for ax in figure.axes[6:] for text in ax.texts]
    assert len(sizes) == 2
    assert "l0 6.2% of pixels" in sizes[0]
    assert "SSIM" in sizes[0]
    assert "difference x" in figure.axes[6].get_ylabel()
    # left the triggered image, right the difference, whose largest value is white
    left, right = (
        [np.asarray(ax.images[0].get_array()) for ax in figure.axes[i : i + 3]] for i in (6, 9)
    )
    assert all(image.max() == 1 for image in left)
    assert max(image.max() for image in right) == pytest.approx(1)
    assert all((image > 0).sum() == 4 for image in right)


def test_given_axes_are_used_and_returned():
    _, ax = plt.subplots()
    assert plots.suspicion_histogram(torch.randn(100), ax=ax) is ax


def test_suspicion_histogram_draws_the_line_at_three_sigma():
    scores = torch.tensor([0.0] * 50 + [2.0] * 50)
    ax = plots.suspicion_histogram(scores, sigma=1.5, others={"clean test": torch.ones(5)})
    line = next(x for x in ax.lines if x.get_linestyle() == "--")
    assert line.get_xdata()[0] == pytest.approx(1 - 1.5)
    assert labelled(ax)
    assert "clean test (n = 5)" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_samples_by_class_sorts_by_the_teachers_answer():
    logits = torch.eye(3)[[0, 0, 1]] * torch.tensor([[1.0], [5.0], [2.0]])
    figure = plots.samples_by_class(images(3), logits, CLASSES, columns=2, target=1)
    texts = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert texts == ["a: 67%", "b: 33%\n(target)", "c: 0%"]
    surest = figure.axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(surest), torch.tensor(plots.picture(images(3)[1])))


def test_samples_over_training_shows_first_and_last():
    figure = plots.samples_over_training(
        {i: images(4) for i in range(10, 210, 10)}, columns=4, rows=5
    )
    steps = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert steps[0] == "step 10"
    assert steps[-1] == "step 200"
    assert len(steps) == 5


def test_heatmap_rows_are_layers_sorted_by_change_on_one_scale():
    change = {"conv1": torch.tensor([0.1, 0.9]), "conv2": torch.tensor([0.2, 0.1, 0.3])}
    figure = plots.change_heatmaps(
        {"teacher": change, "ZSKT": {k: v / 2 for k, v in change.items()}}
    )
    meshes = [ax.collections[0] for ax in figure.axes if ax.get_title() in ("teacher", "ZSKT")]
    assert [m.get_clim() for m in meshes] == [(0, pytest.approx(0.9))] * 2
    assert meshes[0].get_array().filled(-1).ravel().tolist() == pytest.approx(
        [0.9, 0.1, -1, 0.3, 0.2, 0.1]
    )


def test_participation_is_a_share_of_each_layers_channels():
    # one of two channels, and four of four
    change = {"conv1": torch.tensor([0.0, 2.0]), "conv2": torch.ones(4)}
    ax = plots.participation_figure({"teacher": change, "ZSKT": change})
    assert [list(line.get_ydata()) for line in ax.lines] == [pytest.approx([0.5, 1.0])] * 2
    assert labelled(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["teacher", "ZSKT"]


def test_objectives_are_groups_of_a_bar_per_method_with_each_seed_a_point():
    kinds = ("none", "pgd")
    frame = pd.DataFrame(
        [
            {"objective": kind, "label": label, "seed": seed, "acc": 0.5 + 0.25 * seed, "asr": 0.1}
            for kind in kinds
            for label in ("teacher", "bounded/teacher")
            for seed in (0, 1)
        ]
    )
    acc, asr = plots.objectives_figure(frame).axes
    assert [bar.get_height() for bar in acc.patches[:4]] == pytest.approx([62.5] * 4)
    assert [bar.get_height() for bar in asr.patches[:4]] == pytest.approx([10.0] * 4)
    assert [t.get_text() for t in acc.get_xticklabels()] == ["none", "pgd"]
    assert all(map(labelled, (acc, asr)))


def test_ablation_shows_means_spread_and_the_floor():
    frame = pd.DataFrame(
        {
            "label": ["clean", "zskt", "zskt"],
            "seed": [1, 1, 2],
            "acc": [0.9, 0.8, 1.0],
            "asr": [0.05, 0.9, 0.7],
        }
    )
    figure = plots.ablation_figure(frame)
    assert [round(bar.get_width(), 6) for bar in figure.axes[0].patches] == [90, 90]
    assert [round(bar.get_width(), 6) for bar in figure.axes[1].patches] == [5, 80]
    assert figure.axes[1].lines[-1].get_xdata()[0] == pytest.approx(5)
    table = tables.results_table(frame)
    assert table.loc["ZSKT", "ASR (%)"] == "80.0 ± 14.1"
    assert table.loc["clean KD", "ACC (%)"] == "90.0"
    assert list(table["n"]) == [1, 2]


def test_a_vaccine_that_was_not_found_is_told_to_the_reader():
    found = tables.rows(
        {"zskt+sv": {"seed": 0, "acc": 1.0, "asr": 1.0, "defenses": {"sv": {"found": False}}}}
    )
    assert "no vaccine was found" in found[0]["notes"][0]


def test_figures_of_images_have_a_caption_per_image():
    said = torch.tensor([0, 2])
    figure = plots.prediction_figure(
        images(2), images(2), said, torch.tensor([1, 1]), CLASSES, target=1
    )
    assert [ax.get_title() for ax in figure.axes] == ["says a", "says c", "says b", "says b"]
    assert figure.axes[2].title.get_color() == plots.color_of("zskt")
    figure = plots.trigger_figure(images(2), images(2) + 0.1, ["a", "b"], "blend")
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == [
        "clean",
        "triggered",
        "difference\n(x 10)",
    ]


def test_embedding_marks_groups_and_overlay_names_its_rows():
    ax = plots.embedding_figure(
        torch.rand(6, 2).numpy(), ["clean", "triggered", "synthetic"] * 2, ["a", "b"] * 3
    )
    assert {"clean", "triggered", "synthetic", "a", "b"} <= {
        t.get_text() for t in ax.get_legend().get_texts()
    }
    figure = plots.overlay_figure(
        {"clean": (images(2), {"teacher": torch.rand(2, 4, 4)})}, {"clean/teacher": ["a", "b"]}
    )
    assert figure.axes[0].get_ylabel() == "teacher\nclean"
    assert figure.axes[1].get_title() == "b"


def study_results():
    """Two sources, two triggers, two seeds by hand: undefended ASR .8 and .9, defended
    .2 and .4; jobs repeat the undefended one.
    """
    rows = []
    for source in ("zskt", "cmi"):
        for trigger in ("badnet_sq", "blend"):
            for seed in (0, 1):
                for defense, asr in (("none", 0.8 + 0.1 * seed), ("sv+sr", 0.2 + 0.2 * seed)):
                    for alpha in (0.1, 0.5):
                        label = source if defense == "none" else f"{source}+{defense}"
                        model = f"{label} {trigger} {seed}" + (
                            f" {alpha}" if defense != "none" else ""
                        )
                        rows.append(
                            {
                                "label": label,
                                "source": source,
                                "defense": defense,
                                "trigger": trigger,
                                "seed": seed,
                            }
                        )
                        rows[-1] |= {"sv.alpha": alpha, "acc": 0.9, "asr": asr, "model": model}
    return pd.DataFrame(rows)


def test_a_study_counts_each_model_once():
    summary = tables.study_summary(study_results()).loc[("blend", "zskt")]
    assert summary.loc["none", "n"] == 2
    assert summary.loc["sv+sr", "n"] == 4
    assert summary.loc["none", "ASR mean (%)"] == pytest.approx(85)
    assert summary.loc["none", "ASR std (%)"] == pytest.approx(7.1)  # sample deviation of 80 and 90
    assert summary.loc["sv+sr", "ASR std (%)"] == pytest.approx(11.5)  # of 20, 20, 40, 40


def test_a_matrix_has_a_row_per_trigger_and_defense_and_a_column_per_source():
    frame = study_results()
    frame.loc[frame["label"] == "zskt", "acc"] = 0.875
    teacher = dict.fromkeys(("label", "source", "model"), "teacher") | {
        "defense": "none",
        "trigger": "badnet_sq",
        "acc": 1.0,
    }
    twin = teacher | dict.fromkeys(("label", "source", "model"), "clean_teacher")
    matrix = tables.study_matrix(pd.concat([frame, pd.DataFrame([teacher, twin])]))
    assert list(matrix.columns) == ["teacher", "zskt", "cmi"]
    assert list(matrix.index) == [
        ("badnet_sq", "none"),
        ("badnet_sq", "sv+sr"),
        ("blend", "none"),
        ("blend", "sv+sr"),
    ]
    assert matrix.loc[("badnet_sq", "none")].tolist() == ["100.0/-", "87.5/85.0", "90.0/85.0"]
    assert matrix.loc[("blend", "sv+sr")].tolist() == ["", "90.0/30.0", "90.0/30.0"]


def test_heatmaps_before_and_after():
    figure = figures.study_heatmaps(study_results())
    before, after = figure.axes[:2]
    assert [t.get_text() for t in before.texts] == ["85\nACC 90"] * 4
    assert [t.get_text() for t in after.texts] == ["30\nACC 90"] * 4
    assert (before.get_title(), after.get_title()) == ("undefended", "with SV+SR")
    plt.close(figure)


def test_a_clean_teacher_is_no_student_in_a_studys_table_and_figures():
    twin = dict.fromkeys(("label", "source", "model"), "clean_teacher") | {
        "defense": "none",
        "trigger": "blend",
        "acc": 1.0,
    }
    results = pd.concat([study_results(), pd.DataFrame([twin])])
    assert list(tables.study_summary(results).index.unique("source")) == ["cmi", "zskt"]
    figure = figures.study_heatmaps(results)
    for ax in figure.axes[:2]:
        assert [t.get_text() for t in ax.get_xticklabels()] == ["ZSKT", "CMI"]
        assert {t.get_rotation() for t in ax.get_yticklabels()} == {0}
    shown = {t.get_text() for t in figures.tradeoff_figure(results).get_legend().get_texts()}
    assert shown == {"ZSKT", "ZSKT+SV+SR", "CMI", "CMI+SV+SR"}
    plt.close("all")


def test_pareto_front_by_hand():
    frame = pd.DataFrame({"acc": [0.9, 0.8, 0.95, 0.9, 0.7], "asr": [0.2, 0.1, 0.5, 0.3, 0.1]})
    # .9/.3 is beaten by .9/.2, and .7/.1 by .8/.1
    assert tables.pareto_front(frame)["acc"].tolist() == [0.8, 0.9, 0.95]


def test_study_figures_say_what_they_show():
    ax = figures.tradeoff_figure(study_results())
    assert "%" in ax.get_xlabel()
    assert "%" in ax.get_ylabel()
    assert {"ZSKT", "ZSKT+SV+SR", "CMI", "CMI+SV+SR"} <= {
        t.get_text() for t in ax.get_legend().get_texts()
    }
    figure = figures.sensitivity_figure(study_results(), "sv.alpha")
    assert [a.get_ylabel() for a in figure.axes] == ["ACC (%)", "ASR (%)"]
    assert figure.axes[1].lines[1].get_ydata() == pytest.approx([30, 30])
    with pytest.raises(ValueError, match="no numeric axis"):
        figures.sensitivity_figure(study_results(), "trigger")
    plt.close("all")


def test_every_combination_has_a_colour_of_its_own():
    named = list(plots.COLORS.values())
    assert len(set(named)) == len(named)
    assert plots.color_of("bounded+unlearn/cmi+tc") == plots.COLORS["bounded+unlearn/tc"]
    unknown = ["zskt+tu+tc", "zskt+my_pkg.mine:Noise", "bounded/zskt+sv", "02_distillation"]
    colors = [plots.color_of(label) for label in unknown]
    assert len(set(colors)) == len(colors)
    assert not set(colors) & set(named)
    assert all(re.fullmatch("#[0-9a-f]{6}", color.lower()) for color in [*colors, *named])


def test_a_drawn_colour_is_the_same_in_every_process():
    code = "from abdlab import plots; print(plots.color_of('zskt+my_pkg.mine:Noise'))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == plots.color_of("cmi+my_pkg.mine:Noise")


def test_a_defense_has_one_colour_whatever_the_source():
    assert plots.color_of("cmi+sv") == plots.color_of("zskt+sv") != plots.color_of("zskt")
    assert labels.name_of("clean") == "clean KD"
    assert labels.in_order(["cmi+sv", "zskt+sr", "clean", "cmi", "zskt", "teacher"]) == [
        "teacher",
        "clean",
        "cmi",
        "cmi+sv",
        "zskt",
        "zskt+sr",
    ]


def test_what_a_purifier_sees_in_four_figures():
    """Costs with the suspect framed, inverted triggers beside the true one, activations
    beyond the bound, ACC and ASR against k.
    """
    table = torch.tensor([[0.5, 1.0], [2.0, 1.1], [2.2, 0.9]])
    ax = plots.cost_heatmap(table, ["stamp", "blend"], ["a", "b", "c"], [0])
    assert [t.get_text() for t in ax.texts][:3] == ["0.50", "1.00", "2.00"]
    assert "a" in ax.get_title()
    frames = [p for p in ax.patches if p.get_linewidth() == 3]
    assert [p.get_xy() for p in frames] == [(0, 0)]

    values = (torch.full((1, 1, 8, 8), 0.4),)
    bank = Bank(tuple(Inverted("additive", 0, values, cost, 0.4) for cost in (2.0, 1.0)))
    figure = plots.trigger_bank_figure(torch.zeros(2, 1, 8, 8), trigger_from("badnet_sq"), bank)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["without\n", "true: badnet_sq", "additive\n1.00 nats"], "the cheapest"

    ax = plots.beyond_figure({"clean": {"bn1": 0.02, "bn2": 0.04}}, k=2.5)
    assert ax.lines[0].get_ydata() == pytest.approx([2.0, 4.0])
    assert "2.5 std" in ax.get_ylabel()

    curve = pd.DataFrame({"k": [1.5, 2.0], "acc": [0.8, 0.9], "agreement": [0.5, 0.7]})
    ax = plots.bound_figure(curve, 2.0)
    assert [line.get_label() for line in ax.lines][:2] == ["ACC", "agreement on synthetic images"]


def test_confusion_matrices_frame_the_target():
    """Shares of each row, its accuracy at the right; no frame without a target."""
    _, axes = plt.subplots(1, 2)
    found = {"classes": ["a", "b"], "clean": [[3, 1], [0, 0]]}
    found["triggered"] = {"sig": [[1, 3], [0, 0]]}
    plots.confusion_figure(found, axes, target=1)
    assert axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    texts = [text.get_text() for text in axes[1].texts]
    assert texts == ["25 %", "1", "3", "no images"]
    assert axes[1].get_title() == "triggered: sig"
    assert [len(ax.patches) for ax in axes] == [1, 1]
    plots.confusion_figure(found, [plt.subplots()[1]])


def test_marks_stand_in_the_curves():
    history = pd.DataFrame({"label": "zskt+sv", "step": [1, 5], "acc": [0.1, 0.2], "asr": 0.5})
    history["events"] = [
        ["shuffling vaccine: found"],
        ["sv: alpha 0.1 -> 0.5 from pseudo-batch 4 on"],
    ]
    ax = plots.training_curves(history)
    assert [text.get_text().strip() for text in ax.texts] == ["sv: alpha 0.1 -> 0.5"]
    assert len(ax.lines) == 3


def test_branches_have_colours_of_their_own():
    history = pd.DataFrame({"label": "zskt", "step": [1, 5], "acc": [0.1, 0.2], "asr": 0.5})
    _, axes = plt.subplots(1, 2)
    plots.branch_curves({f"zskt@{i}": history for i in range(12)}, axes)
    assert len({line.get_color() for line in axes[0].lines}) == 12


class TestDark:
    """Figures on a dark ground."""

    @staticmethod
    def _png(figure):
        from io import BytesIO

        buffer = BytesIO()
        figure.savefig(buffer, dpi=50, format="raw")
        return buffer.getvalue()

    def test_a_figure_is_written_in_the_ink_and_is_itself_again_afterwards(self):
        figure, (left, right) = plt.subplots(1, 2)
        left.set_title("words")
        (line,) = left.plot([0, 1], color="black", label="a")
        bars = left.bar([0, 1], [1, 2], color=["#1b1f8a", "gold"])
        dots = left.scatter([0, 1], [1, 2], color="black")
        left.legend()
        right.imshow(np.ones((4, 4)), vmin=0, vmax=1)
        on, beside = right.text(1, 1, "on"), right.text(1.2, 0.5, "by", transform=right.transAxes)
        boxed = left.text(0, 1, "p", bbox={"facecolor": "white"})
        before = self._png(figure)
        with dark.inked(figure, True):
            ink = matplotlib.colors.to_rgba(dark.INK[True])
            colors = [left.title.get_color(), line.get_color(), beside.get_color()]
            assert {matplotlib.colors.to_rgba(color) for color in colors} == {ink}
            assert dots.get_facecolor()[0].tolist() == list(ink)
            assert boxed.get_color() == dark.INK[True]
            ground = matplotlib.colors.to_rgba(dark.GROUND)
            assert boxed.get_bbox_patch().get_facecolor() == ground
            assert on.get_color() == "black"  # the image under it is as bright as ever
            blue, gold = (bar.get_facecolor() for bar in bars)
            assert gold == matplotlib.colors.to_rgba("gold")
            light = dark.luminance(np.array(blue[:3])) + 0.05
            ground = dark.luminance(np.array(matplotlib.colors.to_rgb(dark.GROUND))) + 0.05
            assert dark.CONTRAST <= light / ground < dark.CONTRAST + 0.3
            assert self._png(figure) != before
        assert self._png(figure) == before

    def test_a_figure_in_words(self):
        figure, axes = plt.subplots(1, 2)
        axes[0].set(xlabel="ACC (%)", ylabel="method")
        axes[1].set_title("two\nlines")
        assert dark.in_words(figure) == "method against ACC (%); two lines"
        assert dark.in_words(plt.figure()) == "figure"

    def test_a_kernel_shows_both_and_a_headless_one_does_not(self):
        code = """
import os
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell("from abdlab import plots; print(plots.follow_theme())", silent=True)
shell.run_cell("%matplotlib inline")
shell.run_cell("import matplotlib.pyplot as plt; f, ax = plt.subplots(); ax.set_title('a<b')")
bundle, _ = shell.display_formatter.format(shell.user_ns["f"])
print(sorted(bundle), bundle.get("text/html", "").count("<img"), "a&lt;b" in str(bundle))
"""
        told = []
        for headless in ("", "1"):
            env = {**os.environ, "ABDLAB_HEADLESS": headless}
            ran = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
            )
            told.append(ran.stdout.splitlines())
        shows, hides = told
        assert shows[0] == "True"
        assert shows[-1].endswith("'text/html', 'text/plain'] 2 True")
        assert hides[0] == "False"
        assert "text/html" not in hides[-1]
