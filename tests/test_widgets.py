"""Every widget driven through its traits and its buttons' calls, without a browser."""

import json
import re
import threading
import time
from pathlib import Path

import ipywidgets
import pytest
import torch
import yaml
from traitlets import TraitError

import abdlab
from abdlab import batch
from abdlab.attacks.optimize import options_of
from abdlab.attacks.patterns import pack
from abdlab.attacks.triggers import Trigger
from abdlab.checkpoint import load_state, read_card, read_weights
from abdlab.defenses import DEFENSES
from abdlab.defenses.late import Late
from abdlab.defenses.plans import tunable
from abdlab.labels import Label
from abdlab.methods import methods
from abdlab.presets import DEFENDED
from abdlab.runs import Run
from abdlab.settings import Settings, settings
from abdlab.stream import Step
from abdlab.students import distilled
from abdlab.teachers import _request, poisoned_teacher, prepare
from abdlab.widgets import (
    DefenseTuner,
    Queue,
    RunBrowser,
    SampleExplorer,
    TriggerDesigner,
    Workbench,
    looks,
)
from abdlab.widgets import worker as workers
from abdlab.widgets.branches import method_of, next_folder, parent_of
from abdlab.widgets.controls import Controls
from abdlab.widgets.knobs import Knobs, check_branch, knobs_of
from abdlab.widgets.live import Live
from abdlab.widgets.messages import in_turn

TINY = {
    "data.size": 8,
    "teacher.epochs": 2,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 8,
    "zskt.student_steps": 2,
    "zskt.width": 4,
    "zskt.batch_size": 16,
    "clean.epochs": 1,
    "sv.verify": False,
    "sv.alpha": 0.55,
    "sv.layers": 3,
    "sv.warmup": 0.0,
    "tu.start": 0.5,
    "tu.inner_steps": 2,
}

pytestmark = pytest.mark.filterwarnings("ignore::abdlab.WeakTeacher")


@pytest.fixture(autouse=True)
def page():
    """A page of its own, so that a change of theme draws this test's widgets alone."""
    looks._page.clear()
    yield
    looks._page.clear()


@pytest.fixture(scope="session")
def chosen():
    return settings("quick/digits", TINY, device="cpu")


@pytest.fixture(scope="session")
def data(chosen):
    return chosen.dataset()


@pytest.fixture(scope="session")
def teacher(chosen, data, tmp_path_factory):
    """A root that has a teacher."""
    root = tmp_path_factory.mktemp("teacher")
    poisoned_teacher(root, chosen, data)
    return root


@pytest.fixture
def root(teacher, tmp_path):
    """A root of one's own, with the teacher in it."""
    import shutil

    shutil.copytree(teacher, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def tuner(root, chosen, data):
    made = DefenseTuner(root, chosen, data, needs_page=False)
    made.controls.with_floor.value = False
    yield made
    made.stop()
    if made.worker is not None and made.worker.alive():
        made.worker._thread.join(60)


@pytest.fixture(scope="session")
def finished(teacher, chosen, data, tmp_path_factory):
    """A root with a finished run of the tuner."""
    import shutil

    root = tmp_path_factory.mktemp("finished") / "runs"
    shutil.copytree(teacher, root)
    DefenseTuner(root, chosen, data, needs_page=False).run()
    return root


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def hold(tuner, at):
    """Pause the run once it has done ``at`` steps: it waits there, however busy the
    machine is.
    """

    def watch(change):
        if change["new"] == at:
            tuner.worker.pause()

    tuner.observe(watch, "step")


class TestTriggerDesigner:
    @pytest.fixture
    def designer(self, tmp_path, chosen, data):
        return TriggerDesigner(tmp_path, chosen, data)

    def test_shows_the_presets_trigger_at_once(self, designer):
        assert designer.picture.png.startswith(b"\x89PNG")
        assert designer.overrides["attack.params"]["size"] == 5
        assert 0.15 < designer.sizes["l0"] <= 25 / 64  # some pixels are white already
        assert not designer.trouble.sentence

    def test_a_slider_changes_picture_and_sizes(self, designer):
        before = designer.picture.png, designer.sizes["l0"]
        designer.controls["size"].value = 6
        assert designer.picture.png != before[0]
        assert designer.sizes["l0"] > before[1]
        designer.controls["corner"].value = "top_left"
        assert designer.overrides["attack.params"]["corner"] == "top_left"

    @pytest.mark.parametrize("name", abdlab.TRIGGERS)
    def test_every_trigger_has_controls(self, designer, name):
        designer.trigger.value = name
        assert not designer.trouble.sentence
        assert designer.overrides["attack.trigger"] == name
        if designer.designed.needs_pattern:
            assert "optimised against a clean model" in designer._legend.value
        else:
            assert designer.picture.png

    def test_another_trigger_and_back_keeps_its_size(self, designer):
        """5x5 from the preset, or what the user has set since."""
        for size in (5, 6):
            designer.controls["size"].value = size
            designer.trigger.value = "sig"
            designer.trigger.value = "badnet_sq"
            assert designer.controls["size"].value == size
            assert designer.overrides["attack.params"]["size"] == size

    def test_takes_what_the_preset_recommends(self, designer):
        designer.trigger.value = "sig"
        assert designer.overrides["attack.params"] == {"strength": 0.6, "frequency": 3}
        assert designer.overrides["attack.rate"] == 0.09
        designer.rate.value = 0.2  # the user's own stays
        designer.trigger.value = "badnet_sq"
        assert designer.overrides["attack.rate"] == 0.2

    def test_a_trigger_of_ones_own_has_controls_of_its_types(self, designer, monkeypatch):
        def ring(
            images,
            radius: int = 3,
            style: str = "dotted",
            filled: bool = False,
            gain: float = 2.5,
            width: int | None = None,
            anything=None,
        ):
            return images

        monkeypatch.setitem(abdlab.TRIGGERS, "ring", ring)
        designer.trigger.options = [*designer.trigger.options, "ring"]
        designer.trigger.value = "ring"
        assert not designer.trouble.sentence
        values = {key: control.value for key, control in designer.controls.items()}
        assert values == {
            "radius": 3,
            "style": "dotted",
            "filled": False,
            "gain": 2.5,
            "width": 0,
        }
        assert isinstance(values["radius"], int)
        assert designer.overrides["attack.params"]["radius"] == 3

    def test_two_triggers_compose_and_the_settings_take_them(self, designer, chosen, data):
        designer.also.value = "blend"
        designer.rate.value, designer.target.value = 0.2, 3
        made = settings("quick/digits", designer.overrides)
        assert str(made.trigger) == "badnet_sq+blend"
        assert (made.target, made.attacks[0].rate) == (3, 0.2)
        images = data.test_images[:4]
        assert torch.equal(made.trigger(images), designer.designed(images))

    def test_saves_parameters_that_a_notebook_takes(self, designer):
        path = designer.save()
        saved = yaml.safe_load(path.read_text())
        assert str(settings("quick/digits", saved["overrides"]).trigger) == "badnet_sq"
        designer.name.value = "../out"
        assert designer.save() is None
        assert "without folders" in designer.trouble.sentence

    def test_a_data_set_that_is_not_there_is_one_sentence(self, designer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        designer.dataset.value = "cifar10"
        assert (
            "cifar10" in designer.trouble.sentence.lower()
            or "cifar-10" in designer.trouble.sentence.lower()
        )
        assert designer.picture.png == b""
        assert designer.hand_button.disabled
        designer.dataset.value = "digits"
        assert designer.picture.png
        assert not designer.trouble.sentence

    def test_a_saved_trigger_is_loaded_with_all_that_was_chosen(self, designer):
        designer.trigger.value, designer.also.value = "blend", "sig"
        designer.controls["alpha"].value, designer.rate.value = 0.003, 0.25
        designer.target.value, designer.name.value = 7, "mine"
        designer.save()
        saved = dict(designer.overrides)
        designer.trigger.value, designer.also.value = "badnet_sq", "nothing more"
        designer.target.value, designer.rate.value = 0, 0.1
        designer.saved.value = "mine"
        assert not designer.trouble.sentence
        assert designer.overrides == saved
        (designer.root / "triggers/bad.yaml").write_text("overrides: 3\n")
        with pytest.raises(ValueError, match="holds no trigger that was saved here"):
            designer.load("bad")

    def test_an_optimised_trigger_is_drawn_once_a_run_has_made_it(self, designer, chosen):
        designer.trigger.value = "l2_inv"
        assert not designer.picture.png
        before = dict(designer.overrides)
        wanted = settings("quick/digits", {**TINY, **before}, device="cpu")
        options = options_of(wanted.trigger, **wanted.values["attack"].get("optimize", {}))
        name = _request(wanted, wanted.trigger, wanted.target, options)[1]
        levels = torch.zeros(1, 8, 8)
        levels[:, 2, 3] = 200
        made = Trigger("l2_inv", {**wanted.trigger.params, "pattern": pack(levels)})
        (designer.root / name).parent.mkdir(parents=True)
        (designer.root / name).write_text(json.dumps({"made": made.card()}))
        designer.draw()
        assert designer.picture.png
        assert designer.overrides == before  # a run makes it from the same request

    def test_hands_over_again_and_again(self, designer):
        seen = []
        designer.observe(lambda change: seen.append(change["new"]), "handed")
        designer.hand()
        designer.hand()
        assert [s for s in seen if s] == [designer.overrides] * 2


class TestDefenseTuner:
    def test_says_what_to_do_first(self, tuner):
        assert "press Start" in tuner.empty.value
        assert tuner.state == "idle"
        assert tuner.controls.buttons["Stop"].disabled
        assert tuner.controls.buttons["Copy as parameters"].disabled

    @pytest.mark.slow
    def test_equals_the_headless_run_number_for_number(self, tuner, root, chosen, data, tmp_path):
        tuner.start()
        until(lambda: tuner.state not in ("preparing", "running"))
        assert tuner.state == "done", tuner.trouble.sentence
        _, metrics = distilled(
            root, chosen, data, poisoned_teacher(root, chosen, data), "zskt+sv+tu"
        )
        same = ("acc", "asr", "defenses", "threads")
        ours = Run(root / "seed0" / tuner.folder)
        assert {k: ours.metrics[k] for k in same} == {k: metrics[k] for k in same}
        theirs = Run(root / "seed0" / "zskt+sv+tu")
        a, b = (read_weights(r.file("student.safetensors"))[0] for r in (ours, theirs))
        assert all(torch.equal(a[k], b[k]) for k in b)
        both = [
            r.history().set_index("step").drop(columns=["seconds", "events"]).loc[[8]]
            for r in (ours, theirs)
        ]
        assert both[0].equals(both[1])

    @pytest.mark.slow
    def test_a_weight_changed_on_the_way_a_branch_and_their_repetition(
        self, tuner, root, data, tmp_path
    ):
        hold(tuner, 3)
        tuner.start()
        until(lambda: tuner.step == 3)
        assert tuner.knob("sv.k").disabled
        assert not tuner.knob("sv.alpha").disabled
        tuner.state = "paused"
        tuner.knob("sv.alpha").value = 0.3
        tuner.unobserve_all("step")
        hold(tuner, 5)
        tuner.start()
        until(lambda: tuner.step == 5)
        tuner.state = "paused"
        history = Run(root / "seed0" / "zskt+sv+tu@1")
        tuner.branch()  # stops the paused run
        assert tuner.state == "stopped"
        assert history.metrics["stopped_at"] == 5
        assert "sv: alpha 0.55 -> 0.3 from pseudo-batch 3 on" in str(
            history.history()["events"].tolist()
        )
        assert history.config["sv"]["alpha"] == [[0, 0.55], [3, 0.3]]

        tuner.unobserve_all("step")
        tuner.knob("sv.alpha").value = 0.8
        tuner.start()
        until(lambda: tuner.state not in ("preparing", "running"))
        assert tuner.state == "done", tuner.trouble.sentence
        assert tuner.folder == "zskt+sv+tu@2"
        branch = Run(root / "seed0" / "zskt+sv+tu@2")
        assert branch.config["sv"]["alpha"] == [[0, 0.55], [3, 0.3], [5, 0.8]]
        assert branch.history()["step"].min() <= 3  # it has its trunk's history
        assert parent_of(branch.path) == "zskt+sv+tu@1 at 5"

        # and the first one goes on to its own end
        tuner.find()
        tuner.origin.value = next(
            o
            for _, o in tuner.origin.options
            if o.folder == "zskt+sv+tu@1" and o.checkpoint is None
        )
        assert tuner.knob("sv.alpha").value == 0.3
        tuner.start()
        until(lambda: tuner.state not in ("preparing", "running"))
        assert tuner.state == "done", tuner.trouble.sentence
        assert history.metrics.get("stopped_at") is None

        for folder in ("zskt+sv+tu@1", "zskt+sv+tu@2"):
            given = yaml.safe_load(tuner.parameters(folder))
            given["run"] = str(tmp_path / folder)
            if folder.endswith("@2"):
                batch.execute("02", tmp_path / "02.ipynb", given, threads=1)
            else:  # by the library, which saves a kernel
                same = settings(given["preset"], given["overrides"], device="cpu")
                theirs = poisoned_teacher(given["run"], same, data)
                distilled(given["run"], same, data, theirs, "zskt+sv+tu")
            again = Run(tmp_path / folder / "seed0" / "zskt+sv+tu")
            ours = Run(root / "seed0" / folder)
            for key in ("acc", "asr", "threads"):
                assert again.metrics[key] == ours.metrics[key]
            a, b = (read_weights(r.file("student.safetensors"))[0] for r in (ours, again))
            assert all(torch.equal(a[k], b[k]) for k in b)

    def test_what_is_turned_while_the_teacher_is_made_ready_counts_or_is_turned_back(
        self, tuner, root, monkeypatch
    ):
        """As does a value that the page sends late: a slider sends its latest once the
        kernel has answered the one before.
        """
        turned = threading.Event()

        def slow(*args, **more):
            assert turned.wait(60)
            return prepare(*args, **more)

        monkeypatch.setattr("abdlab.widgets.job.prepare", slow)
        layers, began = tuner.knob("sv.layers").value, tuner.knob("tu.start").value
        tuner.start()
        tuner.knob("sv.alpha").value = 0.3
        assert "sv.alpha is 0.3 from the student" in tuner.status.value
        tuner.knob("sv.layers").value, tuner.knob("tu.start").value = layers + 1, 0.9
        assert (tuner.knob("sv.layers").value, tuner.knob("tu.start").value) == (layers, began)
        assert f"tu.start is {began:g} in this run" in tuner.status.value
        turned.set()
        until(lambda: tuner.state == "done")
        run = Run(root / "seed0" / tuner.folder)
        assert run.config["sv"]["alpha"] == 0.3
        assert (run.config["sv"]["layers"], run.config["tu"]["start"]) == (layers, began)
        assert "sv: alpha 0.55 -> 0.3 from pseudo-batch 0 on" in str(
            run.history()["events"].tolist()
        )

        tuner.knob("sv.layers").value = layers + 1  # of the next run
        assert tuner.knob("sv.layers").value == layers + 1
        # what was turned stays for the next run, until its user wants the preset's values
        assert tuner.knob("sv.alpha").value == 0.3
        tuner.reset()
        assert (tuner.knob("sv.alpha").value, tuner.knob("sv.layers").value) == (0.55, layers)

    def test_stop_finishes_the_step_measures_and_saves(self, tuner, root):
        hold(tuner, 2)
        tuner.exams = 1
        tuner.start()
        until(lambda: tuner.step == 2)
        tuner.state = "running"
        tuner.stop()
        until(lambda: tuner.state == "stopped")
        run = Run(root / "seed0" / tuner.folder)
        assert (
            run.metrics["stopped_at"] == read_card(run.file("checkpoint.safetensors"))["index"] == 2
        )
        assert run.history()["acc"].notna().sum() == 1
        until(lambda: not tuner.worker.alive())
        assert tuner.controls.buttons["Start"].description == "Go on"

    def test_an_error_is_one_sentence_with_the_details_folded(self, tuner, monkeypatch):
        def broken(*_args, **_more):
            raise ValueError("the generator is <broken>")

        monkeypatch.setattr("abdlab.widgets.job.distillation", broken)
        tuner.start()
        until(lambda: tuner.state == "failed")
        assert tuner.trouble.sentence == "the generator is <broken>"
        assert "<details>" in tuner.trouble.value
        assert "&lt;broken&gt;" in tuner.trouble.value
        assert workers.current() is None

    def test_one_run_per_kernel(self, tuner, tmp_path, chosen, data):
        hold(tuner, 1)
        tuner.start()
        until(lambda: tuner.step == 1)
        other = DefenseTuner(tmp_path / "elsewhere", chosen, data, needs_page=False)
        other.start()
        assert "one run at a time" in other.trouble.sentence
        assert other.state == "failed"

    def test_a_cell_that_is_run_again_leaves_no_thread(self, tuner, root, chosen, data):
        hold(tuner, 1)
        tuner.start()
        until(lambda: tuner.step == 1)
        again = DefenseTuner(root, chosen, data, needs_page=False)
        assert not tuner.worker.alive()
        assert [t for t in threading.enumerate() if t.name == "abdlab-run"] == []
        # it begins with the run that was stopped, and shows it
        assert str(again.origin.value) == "go on with zskt+sv+tu@1 at step 1"
        assert again.controls.buttons["Start"].description == "Go on"
        assert not again.controls.buttons["Copy as parameters"].disabled
        assert not again.controls.buttons["Branch here"].disabled
        assert [row["step"] for row in again.live.rows] == [1]
        assert again.live.curves.png
        assert "zskt+sv+tu@1 at step 1 of 8: Go on continues it" in again.status.value

    def test_asks_before_it_distils_from_a_teacher_without_a_backdoor(
        self, tuner, root, monkeypatch
    ):
        monkeypatch.setattr("abdlab.widgets.defense_tuner.USELESS", 1.1)
        tuner.live.add("old", Step(8, 8, {"kd": 0.5}, acc=0.9, asr=0.2))
        tuner.live.redraw()
        tuner.start()
        until(lambda: tuner.state == "asking")
        assert "there is next to no backdoor" in tuner.status.value
        # nothing is left of the run before
        assert (tuner.live.numbers.value, tuner.live.curves.png, tuner.live.bar.value) == (
            "",
            b"",
            0,
        )
        tuner.stop()
        until(lambda: tuner.state == "stopped")
        assert not list((root / "seed0").glob("*@*"))
        assert tuner.folder == ""
        assert tuner.controls.buttons["Copy as parameters"].disabled
        tuner.start()
        until(lambda: tuner.state == "asking")
        tuner.exams = 1
        tuner.start()
        until(lambda: tuner.state == "done")

    def test_asks_nothing_where_the_backdoor_is_to_sleep(self, tmp_path, data, monkeypatch):
        monkeypatch.setattr("abdlab.widgets.defense_tuner.USELESS", 1.1)
        dormant = settings("quick/digits", {**TINY, "teacher.objective": "dormant"}, device="cpu")
        tuner = DefenseTuner(tmp_path, dormant, data, needs_page=False)
        tuner.controls.with_floor.value = False
        tuner.start()
        until(lambda: tuner.state in ("asking", "done", "failed"))
        assert tuner.state == "done"

    def test_a_page_that_is_gone_stops_the_run(self, tuner, monkeypatch):
        monkeypatch.setattr(workers, "PATIENCE", 0.0)
        page = looks.page()
        monkeypatch.setattr(page, "heard", time.monotonic() - 1)
        tuner.controls.keep_on.value = False
        tuner.start()
        until(lambda: tuner.state == "stopped")
        assert "the page was closed" in tuner.worker.why

    def test_a_branch_cannot_change_what_has_already_acted(self, tuner):
        hold(tuner, 6)
        tuner.start()
        until(lambda: tuner.step == 6)
        tuner.state = "paused"
        tuner.branch()
        tuner.knob("tu.lr").value = 2e-3
        tuner.start()
        assert "branch off earlier" in tuner.trouble.sentence

    def test_takes_another_attack_into_a_folder_of_its_own(self, tuner, root):
        tuner.use(
            {
                "attack.trigger": "blend",
                "attack.params": {"alpha": 0.3},
                "attack.rate": 0.2,
                "attack.target": 1,
            }
        )
        assert tuner.root.parent == root
        assert tuner.root.name.startswith("blend-")
        assert str(tuner.chosen.trigger) == "blend"
        tuner.use({"attack.trigger": "blond"})
        assert "did you mean 'blend'" in tuner.trouble.sentence

    def test_knows_how_long_it_takes(self, tuner):
        assert tuner.left() is None
        tuner.total = 20
        tuner.live._pace.extend([(1, 0.0), (2, 1.0), (5, 4.0)])
        assert tuner.left() == pytest.approx(15)

    def test_the_time_left_counts_whole_rounds(self, monkeypatch):
        """Of a source that makes images for 9 s and then trains 40 steps in 1 s."""
        clock = [0.0]
        monkeypatch.setattr("abdlab.widgets.live.time.monotonic", lambda: clock[0])
        live = Live()
        live.rest(0)
        for index in range(1, 401):
            clock[0] += 9.025 if index % 40 == 1 else 0.025
            live.add("cmi", Step(index, 800, {}))
        assert live.left(800) == pytest.approx(100, rel=0.3)

    def test_knobs_that_are_not_turned_change_nothing(self, tuner, chosen):
        assert tuner.chosen.values == chosen.values
        tuner.knob("sv.layers").value = 2
        tuner.knob("tu.lr").value = 2e-3
        assert tuner.chosen.values["sv"]["layers"] == 2
        assert tuner.chosen.values["tu"]["lr"] == 2e-3
        tuner.method.value = "zskt"
        assert tuner.knobs.shown == []
        assert tuner.chosen.values == chosen.values

    def test_the_floor_comes_after_the_first_student(self, finished):
        clean, student = (finished / "seed0" / name for name in ("clean", "zskt+sv+tu@1"))
        made = [(folder / "metrics.json").stat().st_mtime_ns for folder in (student, clean)]
        assert made == sorted(made)

    def test_the_teachers_numbers_are_shown_until_the_student_has_some(self, tuner):
        tuner.live.getting_ready("teacher", Step(3, 8, {}, acc=0.5, asr=0.25))
        assert re.findall("<b>(.*?)</b>", tuner.live.numbers.value) == ["50.0%", "25.0%"]
        assert "teacher" in tuner.live.numbers.value
        tuner.live.getting_ready("teacher", Step(4, 8, {}))
        assert "50.0%" in tuner.live.numbers.value
        tuner.live.add("zskt", Step(1, 8, {"kd": 0.5}, acc=0.9, asr=0.2))
        tuner.live.redraw()
        assert re.findall("<b>(.*?)</b>", tuner.live.numbers.value) == ["90.0%", "20.0%"]


NOISE = """
from abdlab.defenses.defense import Defense

class Noise(Defense):
    \'\'\'Noise on the student's images.

    Args:
        strength: of the noise, in [0, 1] units.
        steps: how often it is drawn.
        often: draw it anew in each step.
        kind: its name.
    \'\'\'

    tunable = ("strength",)

    def __init__(self, *, steps: int = 2, strength: float = 0.003, often: bool = True, kind="a"):
        pass
"""


class TestKnobs:
    def test_every_registered_defense_has_knobs_from_its_signature(self, chosen):
        for name, kind in DEFENSES.items():
            knobs = {knob.key: knob for knob in knobs_of(chosen, name)}
            assert {key for key, knob in knobs.items() if knob.live} == set(tunable(kind))
            assert all(knob.late == issubclass(kind, Late) for knob in knobs.values())
            for key, knob in knobs.items():
                assert knob.control.value == pytest.approx(knob.of(chosen)), key
                assert knob.control.tooltip, f"{name}.{key} is not explained"

    def test_a_defense_of_ones_own_has_knobs_by_its_import_path(
        self, root, chosen, data, tmp_path, monkeypatch
    ):
        (tmp_path / "someones.py").write_text(NOISE)
        monkeypatch.syspath_prepend(tmp_path)
        tuner = DefenseTuner(root, chosen, data, "zskt+someones:Noise", needs_page=False)
        assert [(knob.key, knob.live) for knob in tuner.knobs.shown] == [
            ("strength", True),
            ("steps", False),
            ("often", False),
        ]
        strength = tuner.knob("someones:Noise.strength")
        assert (strength.label, strength.description) == ("strength", "NOISE: strength")
        assert strength.tooltip == "of the noise, in [0, 1] units."
        for value in (0.0025, 150.0):  # a typed number stays what it is
            strength.value = value
            assert tuner.chosen.values["someones:Noise"] == {"strength": value}

    def test_a_slider_reaches_what_the_settings_say(self, chosen):
        wide = settings("quick/digits", {"sv.alpha": 40.0, "tu.lr": 0.3, "tu.inner_steps": 90})
        knobs = Knobs()
        knobs.show("zskt+sv+tu", wide)
        assert knobs["sv.alpha"].control.value == 40.0
        assert knobs["tu.lr"].control.value == pytest.approx(0.3)
        assert knobs["tu.inner_steps"].control.value == 90
        assert knobs.applied(wide).values == wide.values

    def test_what_is_no_number_has_no_knob(self):
        named = settings("quick/digits", {"sv.layers": ["conv1"], "tu.natural": None})
        assert "layers" not in {knob.key for knob in knobs_of(named, "sv")}
        knobs = Knobs()
        knobs.show("zskt+sv", settings("quick/digits"))
        knobs.show("zskt+sv", named)  # the knob that there is leaves the names alone
        assert knobs.applied(named).values == named.values

    def test_what_acts_late_can_be_changed_at_a_branch_before_it_begins(self):
        old = settings("quick/digits", {"tu.start": 0.5})
        other = settings("quick/digits", {"tu.start": 0.5, "tu.penalty": 0.5})
        check_branch("zskt+sv+tu", old, other, index=50, length=100)
        with pytest.raises(ValueError, match=r"TU is on since step 50.* change its penalty"):
            check_branch("zskt+sv+tu", old, other, index=51, length=100)
        with pytest.raises(ValueError, match="TU would have begun at step 20"):
            check_branch("zskt+tu", old, settings("quick/digits", {"tu.start": 0.2}), 40, 100)
        check_branch("zskt+sv", old, other, index=51, length=100)

    def test_purifiers_and_what_may_be_off_have_knobs_too(self):
        chosen = settings("quick/digits")
        knobs = Knobs()
        knobs.show("unlearn+bounded/zskt+tu", chosen)
        assert {"bounded.k", "unlearn.rounds", "tu.natural", "tu.cover", "tu.hold"} <= {
            knob.name for knob in knobs.shown
        }
        assert knobs["bounded.k"].control.value is None
        knobs["bounded.k"].control.value, knobs["tu.natural"].control.value = 3, None
        made = knobs.applied(chosen).values
        assert (made["bounded"]["k"], made["tu"]["natural"]) == (3.0, None)
        with pytest.raises(TraitError, match="TU: triggers is a whole number"):
            knobs["tu.triggers"].control.value = 2.5
        with pytest.raises(TraitError, match=r"TU: start .* is a number"):
            knobs["tu.start"].control.value = "late"


class TestTeacherOpener:
    """A stranger's file: none of its teacher's attack is known."""

    @pytest.fixture
    def file(self, tmp_path):
        net = abdlab.build("wrn-10-1", classes=3, channels=1, width=4, seed=1)
        return abdlab.save_model(tmp_path / "theirs.safetensors", net)

    @pytest.fixture
    def bench(self, tmp_path, chosen, file):
        bench = Workbench(tmp_path / "runs", chosen, "zskt+sv")
        bench.opener.fields["file"].value = str(file)
        bench.opener.fields["shape"].value = "8"
        return bench

    @pytest.mark.parametrize(
        ("field", "text", "told"),
        [
            ("file", "", "name a file of weights first"),
            ("file", "/no/such.pt", "there is no file"),
            ("shape", "", "weights do not say how large images are"),
            ("shape", "big", "shape takes numbers"),
            ("classes", "few", "classes is a number"),
            ("architecture", "wrn-16-1", "theirs.safetensors"),
            ("images", "digitz", "did you mean 'digits'"),
            ("mean", "0,5,x", "mean takes numbers"),
        ],
    )
    def test_what_does_not_fit_is_one_sentence_beside_the_button(self, bench, field, text, told):
        bench.opener.fields[field].value = text
        bench.opener.check()
        assert told in bench.opener.trouble.sentence
        assert bench.opener.audit_button.disabled
        assert bench.opener.use_button.disabled

    def test_from_the_file_to_a_student_with_all_that_is_unknown(self, bench, file):
        opener, tuner = bench.opener, bench.tuner
        opener.check()
        assert not opener.trouble.sentence
        assert "3 classes; teacher theirs.safetensors, trigger unknown" in opener.loaded.value
        assert "ACC unknown, ASR unknown" in opener.loaded.value
        opener.hand()
        assert bench.tabs.selected_index == 1
        assert "Teacher theirs.safetensors, trigger unknown, target unknown" in tuner.who.value
        assert tuner.controls.with_floor.disabled
        assert tuner.chosen.values["zskt"]["pseudo_batches"] == 8  # what was said stays
        tuner.exams = 1
        tuner.start()
        until(lambda: tuner.state == "done")
        assert tuner.live.numbers.value.count("unknown") == 2
        assert (tuner.acc, tuner.asr, tuner.floor) == (None, None, None)
        assert tuner.live.curves.png
        given = yaml.safe_load(tuner.parameters())
        assert given["overrides"]["teacher.file"] == str(file)

        bench.tabs.selected_index = 2
        assert "Teacher theirs.safetensors, trigger unknown" in bench.explorer.who.value
        assert bench.explorer.detail.png
        assert not bench.explorer.trouble.sentence
        bench.tabs.selected_index = 3
        bench.browser.rows.chosen = [row["id"] for row in bench.browser.rows.rows]
        assert not bench.browser.trouble.sentence

        bench.designer.hand()  # and back to one that is made here
        assert "Teacher made here, trigger badnet_sq" in tuner.who.value
        assert tuner.chosen.opened is None
        assert tuner.chosen.values["data"] == bench.chosen.values["data"]

    def test_with_labelled_images_only_the_asr_is_unknown(self, bench, tmp_path, data):
        net = abdlab.build("wrn-10-1", classes=10, channels=1, width=4, seed=1)
        abdlab.save_model(tmp_path / "ten.safetensors", net)
        fields = bench.opener.fields
        fields["file"].value, fields["images"].value = str(tmp_path / "ten.safetensors"), "digits"
        fields["shape"].value = ""
        bench.opener.check()
        acc = abdlab.accuracy(net, *(bench.opener.opened[1].test_images, data.test_labels))
        assert f"ACC {acc:.1%}".replace("%", " %") in bench.opener.loaded.value
        assert "ASR unknown" in bench.opener.loaded.value
        bench.opener.hand()
        bench.tuner.exams = 1
        bench.tuner.run()
        assert 0 <= bench.tuner.acc <= 1
        assert "ACC<b>unknown" not in bench.tuner.live.numbers.value
        assert "ASR<b>unknown" in bench.tuner.live.numbers.value
        assert bench.tuner.live.curves.png

    def test_audits_in_the_background_and_keeps_it(self, bench):
        opener = bench.opener
        opener.check()
        opener.audit()
        assert opener.state == "auditing"
        assert opener.check_button.disabled
        until(lambda: opener.state != "auditing", 300)
        assert opener.state == "audited", opener.trouble.sentence
        assert "suspicious" in opener.verdict.value or "Nothing found" in opener.verdict.value
        assert opener.costs.png.startswith(b"\x89PNG")
        assert opener.inverted.png.startswith(b"\x89PNG")
        first = opener.found.seconds
        opener.check()
        opener.audit()  # read from its folder
        until(lambda: opener.state == "audited", 300)
        assert opener.found.seconds == first
        opener.fields["shape"].value = "9"  # another file is meant
        assert (opener.state, opener.costs.png, opener.opened) == ("idle", b"", None)

    def test_a_run_under_way_refuses_and_the_tab_stays(self, bench):
        bench.tuner.state = "running"
        bench.designer.hand()
        assert bench.tabs.selected_index == 0
        assert "a run is under way" in bench.designer.trouble.sentence
        assert "Handed on" not in bench.designer.note.value
        bench.opener.check()
        bench.opener.hand()
        assert "a run is under way" in bench.opener.trouble.sentence
        bench.tuner.state = "idle"

    def test_begins_with_the_file_that_the_settings_name(self, tmp_path, file):
        more = {"teacher.file": str(file), "data.shape": [1, 8, 8]}
        bench = Workbench(tmp_path / "r", settings("quick/digits", {**TINY, **more}), "zskt")
        assert bench.opener.fields["shape"].value == "1,8,8"
        assert bench.designer.layout.display == "none"
        bench.opener.check()
        assert not bench.opener.trouble.sentence
        assert str(bench.designer.designed) == "badnet_sq"


class TestMethods:
    def test_every_source_with_what_makes_sense(self):
        found = methods()
        late = [name for name, kind in DEFENSES.items() if issubclass(kind, Late)]
        assert {"zskt", "zskt+sv", "zskt+sr", "zskt+tu", "zskt+sv+sr", "cmi+sv+tu"} <= set(found)
        assert not any(set(late) <= set(Label.parse(label).defenses) for label in found)
        assert not any(Label.parse(label).source == "clean" for label in found)

    def test_folders_and_labels_go_both_ways(self, tmp_path):
        for label in ("zskt+sv+tu", "bounded+unlearn/cmi+tc", "zskt+my_pkg.mine:Noise+tu"):
            folder = next_folder(tmp_path, label)
            assert method_of(folder) == label
            (tmp_path / folder).mkdir()
            assert next_folder(tmp_path, label).endswith("@2")


class TestSampleExplorer:
    @pytest.fixture
    def explorer(self, finished):
        return SampleExplorer(finished, "cpu")

    def test_says_where_samples_come_from(self, tmp_path):
        assert "No samples yet" in SampleExplorer(tmp_path, "cpu").empty.value

    def test_opens_a_run_with_all_its_numbers(self, explorer):
        assert explorer.run.value == "seed0/zskt+sv+tu@1"
        assert list(explorer.table) == [
            "step",
            "index",
            "class",
            "suspicion",
            "disagreement",
            "confidence",
        ]
        assert explorer.table["disagreement"].notna().all()
        assert all(p.png for p in (explorer.grid, explorer.histogram, explorer.detail))

    def test_steps_classes_and_orders(self, explorer):
        explorer.time.value = explorer.time.options[0]
        assert set(explorer.table.loc[explorer.shown, "step"]) == {explorer.time.options[0]}
        explorer.all_steps.value = True
        explorer.order.value = "teacher-student disagreement, largest first"
        seen = explorer.table.loc[explorer.shown, "disagreement"]
        assert seen.is_monotonic_decreasing
        some = int(explorer.table["class"].mode()[0])
        explorer.label.value = some
        assert set(explorer.table.loc[explorer.shown, "class"]) == {some}

    def test_clicks_and_arrows_on_the_grid(self, explorer):
        explorer.grid.pick("click", 2.5 / 12, 0.01)
        assert explorer.enlarged == explorer.shown[2]
        before = explorer.detail.png
        explorer.grid.pick("key", 1, 0)
        assert explorer.enlarged == explorer.shown[3]
        assert explorer.detail.png != before
        assert f"image {explorer.enlarged}" in explorer.detail.alt

    def test_a_range_on_the_histogram_selects(self, explorer):
        left, _, right, _ = explorer._boxes["histogram"]
        explorer.histogram.pick("brush", left, 0.5, (left + right) / 2, 0.6)
        middle = sum(explorer._limits) / 2
        scores = explorer.table["suspicion"]
        assert (
            set(scores.index[scores < middle - 0.02])
            <= set(explorer.selected)
            <= set(scores.index[scores < middle + 0.02])
        )
        explorer.clear()
        assert explorer.selected == []
        explorer.tail()
        assert 0 < len(explorer.selected) < len(scores) / 2
        assert set(explorer.shown[: len(explorer.selected)]) == set(explorer.selected)

    def test_the_map_and_the_histogram_select_the_same_images(self, explorer):
        shown = []
        explorer.no_map.observe(lambda change: shown.append(change["new"]), "value")
        explorer.draw_map()
        assert "<progress" in shown[0]
        assert "<progress" not in shown[-1]
        places = explorer._on_picture()
        assert ((places > 0) & (places < 1)).all()
        explorer.map.pick(
            "brush",
            places[0][0] - 1e-6,
            places[0][1] - 1e-6,
            places[0][0] + 1e-6,
            places[0][1] + 1e-6,
        )
        assert int(explorer._mapped[0]) in explorer.selected
        explorer.map.pick("click", *places[5])
        assert explorer.enlarged == explorer._mapped[5]
        before = explorer.map.png
        explorer.tail()
        assert explorer.map.png != before

    def test_exports_the_selection(self, explorer):
        assert explorer.export() is None
        assert "nothing is selected" in explorer.trouble.sentence
        explorer.tail()
        folder = explorer.export()
        images, card = load_state(folder / "images.safetensors")
        assert card["numbers"] == sorted(explorer.selected)
        assert torch.equal(images["images"], explorer.known.images[card["numbers"]])
        assert (folder / "numbers.csv").read_text().count("\n") == len(images["images"]) + 1
        assert explorer.export().name == str(int(folder.name) + 1)

    def test_a_damaged_run_is_one_sentence(self, explorer, finished, tmp_path):
        import shutil

        shutil.copytree(finished, tmp_path / "r")
        (tmp_path / "r/seed0/zskt+sv+tu@1/checkpoint.safetensors").write_bytes(b"no")
        broken = SampleExplorer(tmp_path / "r", "cpu")
        assert (
            "not a whole safetensors file" in broken.trouble.sentence
            or broken.run.value != "seed0/zskt+sv+tu@1"
        )


class TestRunBrowser:
    def test_shows_threads_and_says_a_mismatch(self, tmp_path):
        for label, threads in (("zskt", 1), ("zskt+sv", 2), ("clean", None)):
            metrics = {"label": label, "seed": 0, "acc": 0.9, "asr": 0.5, "threads": threads}
            Run(tmp_path / "seed0" / label).save_metrics(metrics)
        browser = RunBrowser(tmp_path)
        assert [row["cells"][-1] for row in browser.rows.rows] == ["", "1", "2"]
        assert browser.rows.columns[-1] == "threads"
        assert "Rows differ in threads (1 thread: 1 row, 2 threads: 1 row" in browser.note.value
        browser.method.value = "zskt"
        assert "differ" not in browser.note.value

    @pytest.fixture
    def browser(self, finished, tmp_path):
        import shutil

        shutil.copytree(finished, tmp_path / "r")
        return RunBrowser(tmp_path / "r")

    def test_says_how_to_get_a_run(self, tmp_path):
        assert (
            "No runs yet: run 01_poisoning, or press Start"
            in RunBrowser(tmp_path / "none").note.value
        )

    def test_lists_and_filters(self, browser):
        names = [row["id"] for row in browser.rows.rows]
        assert names == ["seed0/clean", "seed0/teacher", "seed0/zskt+sv+tu@1"]
        browser.method.value = "teacher"
        assert [row["id"] for row in browser.rows.rows] == ["seed0/teacher"]
        browser.method.value, browser.text.value = "all", "sv"
        assert [row["id"] for row in browser.rows.rows] == ["seed0/zskt+sv+tu@1"]
        browser.text.value, browser.least_acc.value = "", 100
        assert "None of the 3 runs passes" in browser.note.value

    def test_two_runs_side_by_side(self, browser):
        browser.rows.chosen = ["seed0/clean", "seed0/zskt+sv+tu@1"]
        assert len(browser.sides.children) == 2
        text = str(
            [
                child.value
                for side in browser.sides.children
                for child in side.children
                if hasattr(child, "value")
            ]
        )
        assert "Settings that differ" in text

    def test_deletes_only_after_asking(self, browser):
        folder = browser.root / "seed0/zskt+sv+tu@1"
        browser.rows.chosen = ["seed0/zskt+sv+tu@1"]
        browser.ask()
        assert "Delete seed0/zskt+sv+tu@1 with all files?" in browser._question.value
        browser.keep()
        browser.delete()
        assert folder.exists()
        browser.ask()
        browser.delete()
        assert not folder.exists()
        assert browser.rows.chosen == []

    def test_delete_leaves_what_the_filters_hide(self, browser):
        hidden, shown = "seed0/zskt+sv+tu@1", "seed0/clean"
        browser.rows.chosen = [hidden, shown]
        browser.text.value = "clean"
        browser.ask()
        assert browser._question.value.count("seed0/") == 1
        browser.delete()
        assert (browser.root / hidden).exists()
        assert not (browser.root / shown).exists()

        browser.ask()  # nothing that is chosen is in sight
        assert f"the filters hide {hidden}" in browser.trouble.sentence
        assert browser._asked == []

    def test_a_filter_withdraws_the_question(self, browser):
        browser.rows.chosen = ["seed0/clean"]
        browser.ask()
        browser.text.value = "teacher"
        browser.delete()
        assert (browser.root / "seed0/clean").exists()

    @pytest.mark.parametrize(
        "metrics",
        [
            {"acc": {"teacher": 0.9}, "asr": {"zskt": 0.9}, "seconds": "long", "label": None},
            {"acc": [0.9], "asr": float("nan"), "label": {"a": 1}, "stopped_at": 3},
            ["no", "mapping"],
            {"label": "not a/method/at all", "seed": {}},
        ],
    )
    def test_only_numbers_count(self, browser, metrics):
        """A notebook may keep a dict under asr, as 04 does."""
        folder = browser.root / "04_trigger_activations"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics))
        browser.refresh()
        assert not browser.trouble.sentence
        row = next(row for row in browser.rows.rows if row["id"] == folder.name)
        assert row["cells"][1:5] == ["notebook", row["cells"][2], "", ""]
        browser.most_asr.value = 50
        browser.rows.chosen = [folder.name, "seed0/clean"]
        assert not browser.trouble.sentence
        assert len(browser.sides.children) == 2
        assert len(RunBrowser(browser.root).found) == 4

    def test_a_callback_that_raises_says_so(self, browser):
        (browser.root / "seed0/clean/history.jsonl").write_text("{not json\n")
        browser.rows.chosen = ["seed0/clean"]
        assert "JSONDecodeError" in browser.trouble.sentence or browser.trouble.sentence
        assert "<details>" in browser.trouble.value

    def test_any_number_of_runs_in_one_figure_and_what_can_be_done_with_one(self, browser):
        """Notes are kept beside a run; a run is copied or continued; a folder without
        settings says so.
        """
        (browser.root / "seed0/zskt").mkdir()
        (browser.root / "seed0/zskt/metrics.json").write_text('{"label": "zskt", "seed": 0}')
        browser.refresh()
        names = [row["id"] for row in browser.rows.rows]
        browser.rows.chosen = names
        assert len(names) == 4
        assert [run.name for run in browser.many.shown] == [n for n in names if n != "seed0/zskt"]
        assert len(browser.sides.children) == 2
        said = [c.value for c in browser.sides.children[0].children if "value" in c.keys]
        assert any("records no settings" in text for text in said)

        browser.rows.chosen = ["seed0/zskt+sv+tu@1"]
        (side,) = browser.sides.children
        field = next(child for child in side.children if isinstance(child, ipywidgets.Textarea))
        field.value = "the one for the paper\n"
        folder = browser.root / "seed0/zskt+sv+tu@1"
        assert (folder / "notes.txt").read_text() == "the one for the paper\n"
        row = dict(zip(browser.rows.columns, cells_of(browser, "seed0/zskt+sv+tu@1"), strict=True))
        assert row["notes"] == "the one for the paper"
        assert row["weights"].startswith("sv alpha 0.55, tu weight")
        assert row["trigger"] == "badnet_sq"
        assert row["date"][:2] == "20"
        assert float(row["robust (%)"]) <= 100 - float(row["ASR (%)"]) + 0.1
        assert any("confusion" in getattr(child, "alt", "") for child in side.children)

        assert yaml.safe_load(browser.copy())["overrides"]["sv.alpha"] == 0.55
        taken = []
        browser.on_take(taken.append)
        browser.take_button.click()
        assert taken == [folder]
        browser.rows.chosen = ["seed0/teacher"]
        browser.copy_button.click()
        assert "teacher is no student's run" in browser.trouble.sentence

    def test_a_link_is_not_followed(self, browser, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious/config.json").write_text("{}")
        (browser.root / "link").symlink_to(tmp_path / "precious")
        browser._asked = ["link"]
        browser.delete()
        assert (tmp_path / "precious/config.json").exists()
        browser._asked = ["../precious"]
        browser.delete()
        assert (tmp_path / "precious/config.json").exists()
        assert "by hand" in browser.trouble.sentence


def cells_of(browser, name):
    return next(row["cells"] for row in browser.rows.rows if row["id"] == name)


class TestWorkbench:
    def test_a_chosen_run_is_taken_up_by_the_tuner(self, finished, chosen, tmp_path):
        import shutil

        root = tmp_path / "runs"
        shutil.copytree(finished, root)
        bench = Workbench(root, chosen, "zskt")
        bench.browser.rows.chosen = ["seed0/zskt+sv+tu@1"]
        bench.browser.take_button.click()
        assert bench.tabs.children[bench.tabs.selected_index] is bench.tuner
        assert bench.tuner.method.value == "zskt+sv+tu"
        origin = bench.tuner.origin.value  # it is done: its latest checkpoint but the last
        assert (origin.folder, origin.index) == ("zskt+sv+tu@1", 7)
        assert bench.tuner.knob("sv.alpha").value == 0.55

        away = root / "elsewhere/seed5/zskt+sv"  # another root's, of another seed
        config = json.loads((root / "seed0/zskt+sv+tu@1/config.json").read_text())
        Run(away, config | {"seed": 5, "sv": {**config["sv"], "alpha": 0.25}})
        bench.browser.refresh()
        bench.browser.rows.chosen = ["elsewhere/seed5/zskt+sv"]
        bench.browser.take_button.click()
        assert str(bench.tuner.origin.value) == "from scratch"
        assert (bench.tuner.chosen.seed, bench.tuner.knob("sv.alpha").value) == (5, 0.25)
        assert "begin from scratch with the settings of zskt+sv" in bench.tuner.status.value
        bench.browser.rows.chosen = ["seed0/teacher"]
        bench.browser.take_button.click()
        assert "no student's run" in bench.browser.trouble.sentence

    def test_a_trigger_goes_from_tab_to_tab(self, root, chosen):
        bench = Workbench(root, chosen)
        assert bench.tabs.selected_index == 0
        bench.designer.trigger.value = "sig"
        bench.designer.hand()
        assert bench.tabs.selected_index == 1
        assert str(bench.tuner.chosen.trigger) == "sig"

    def test_finish_does_nothing_in_a_browser(self, root, chosen, monkeypatch):
        monkeypatch.delenv("ABDLAB_HEADLESS", raising=False)
        assert Workbench(root, chosen).finish() == {}

    def test_headless_it_runs_to_its_end_and_shows_what_came_of_it(self, root, chosen, monkeypatch):
        monkeypatch.setenv("ABDLAB_HEADLESS", "1")
        bench = Workbench(root, chosen, "zskt+tu")
        assert 0 <= bench.finish()["acc"] <= 1
        assert bench.explorer.run.value == "seed0/zskt+tu@1"
        assert "seed0/zskt+tu@1" in [row["id"] for row in bench.browser.rows.rows]


def test_the_time_left_of_a_source_that_works_in_rounds(monkeypatch):
    """One slow step, then nine quick ones, as CMI has them: 1.9 s a round of ten steps."""
    live, clock = Live(), [0.0]
    monkeypatch.setattr("abdlab.widgets.live.time.monotonic", lambda: clock[0])
    for index in range(1, 201):
        clock[0] += 1.0 if index % 10 == 1 else 0.1
        live.add("cmi", Step(index, 400, {}, seconds=clock[0]))
        if index in (10, 50, 200):
            assert live.left(400) == pytest.approx(0.19 * (400 - index), rel=0.1)
    live.rest()
    live.add("cmi", Step(201, 400, {}, seconds=999.0))  # a pause is no pace
    assert live.left(400) is None


class TestQueue:
    @pytest.fixture
    def queue(self, tmp_path, chosen):
        made = Queue(tmp_path / "runs", lambda: chosen, "zskt+sv")
        made.setting.value, made.values.value = "sv.alpha", "0.1, 5e-1"
        return made

    def test_it_is_a_study_of_the_settings_as_they_stand(self, queue, chosen):
        queue.seeds.value = "0, 2"
        jobs = queue.study().jobs
        told = [(j.parameters["overrides"]["sv.alpha"], j.parameters["seeds"]) for j in jobs]
        assert told == [(0.1, [0]), (0.1, [2]), (0.5, [0]), (0.5, [2])]
        assert jobs[0].parameters["methods"] == ["zskt+sv"]
        given = settings("quick/digits", jobs[0].parameters["overrides"])
        assert given.values["teacher"] == chosen.values["teacher"]
        assert "sv.layers" in queue.setting.options
        assert queue.folder == queue.root / "queues/zskt+sv-sv.alpha"

    @pytest.mark.parametrize(
        ("setting", "values", "seeds", "sentence"),
        [
            ("sv.alpha", "", "0", "fill in both"),
            ("", "1", "0", "fill in both"),
            ("sv.alpha", "1; 2", "0", "values are numbers with commas"),
            ("sv.alpha", "1", "", "seeds are numbers with commas"),
            ("sv.alhpa", "1", "0", "did you mean"),
        ],
    )
    def test_says_what_is_wrong_before_it_begins(self, queue, setting, values, seeds, sentence):
        queue.setting.value, queue.values.value, queue.seeds.value = setting, values, seeds
        queue.start_button.click()
        assert sentence in queue.trouble.sentence
        assert queue.state == "idle"

    @pytest.mark.slow
    def test_it_stops_at_once(self, queue):
        queue.start()
        until(lambda: queue.rows.rows)
        assert queue.setting.disabled
        queue.start_button.click()
        assert "under way" in queue.trouble.sentence
        queue.stop_button.click()
        queue.wait(60)
        assert (queue.state, queue.setting.disabled) == ("stopped", False)
        assert "goes on with what is not done" in queue.status.value


class TestMessages:
    def test_what_a_page_tells_is_answered_one_after_another(self):
        inside, most = [], []

        @in_turn
        def answer(again):
            inside.append(again)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
            if again:
                answer(False)  # an answer may change what tells more

        threads = [threading.Thread(target=answer, args=(True,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert most == [1] * 6


class TestLooks:
    def test_figures_are_drawn_in_the_themes_ink(self):
        drawn = looks.figure(2, 1)
        drawn.subplots().set_title("words")
        light, dark = looks.png_of(drawn), looks.png_of(drawn, dark=True)
        assert light != dark

    def test_a_change_of_theme_draws_anew(self, finished):
        explorer = SampleExplorer(finished, "cpu")
        themed = next(c for c in explorer.children if isinstance(c, looks.Themed))
        light = explorer.histogram.png
        looks.page().dark = True
        try:
            dark = explorer.histogram.png
            assert dark != light
            themed.gone = True  # a cell that is run again throws its old output away
            looks.page().dark = False
            assert explorer.histogram.png == dark
            themed.gone = False  # the same widget is shown again
            assert explorer.histogram.png == light
        finally:
            looks.page().dark = False

    def test_a_mosaic_shows_pixels_as_they_are(self):
        import io

        import numpy as np
        from PIL import Image

        images = torch.zeros(3, 1, 2, 2)
        images[1] = 1
        pixels = np.asarray(
            Image.open(io.BytesIO(looks.mosaic([images], side=4, gap=1, marks={2: "#ff0000"})))
        )
        assert pixels.shape == (6, 16, 4)
        assert pixels[2, 2].tolist() == [0, 0, 0, 255]
        assert pixels[2, 7].tolist() == [255, 255, 255, 255]
        assert pixels[0, 0, 3] == 0
        assert pixels[0, 11].tolist() == [255, 0, 0, 255]

    def test_errors_are_sentences(self):
        assert looks.sentence_of(ValueError("mend this")) == "mend this"
        assert looks.sentence_of(KeyError("x")) == "KeyError: 'x'"
        assert looks.sentence_of("as it is") == "as it is"


class TestSettingsTakenAlong:
    @pytest.mark.parametrize(
        "overrides", [{}, TINY, {"attack.trigger": "blend"}, {"sv.alpha": [[0, 0.5], [3, 0.1]]}]
    )
    def test_overrides_make_the_same_settings_again(self, overrides):
        made = settings("quick/digits", overrides)
        assert settings("quick/digits", made.overrides()).values == made.values

    def test_a_config_makes_its_settings_again(self, chosen):
        again = Settings.of(json.loads(json.dumps(chosen.config())), "cpu")
        assert again.values == json.loads(json.dumps(chosen.values))
        assert isinstance(again, Settings)


def test_the_scripts_come_with_the_package():
    folder = Path(looks.__file__).parent
    assert {p.name for p in folder.glob("*.[jc]s*")} == {
        "copy.js",
        "dial.js",
        "fit.js",
        "lead.js",
        "page.css",
        "page.js",
        "picture.js",
        "rows.js",
        "themed.js",
    }


def test_one_switch_cleans_the_teacher_first():
    """It keeps the method, names the purifiers, and a label that has others shows those."""
    controls = Controls("zskt+sv", {}, lambda knob, value: None, looks.Trouble())
    plain = dict(controls.method.options)
    controls.purify.value = True
    assert controls.method.value == f"{'+'.join(Label.parse(DEFENDED).purifiers)}/zskt+sv"
    assert len(controls.method.options) == len(plain)
    assert all(Label.parse(value).purifiers for _, value in controls.method.options)
    controls.purify.value = False
    assert controls.method.value == "zskt+sv"
    assert dict(controls.method.options) == plain
    controls.choose("bounded/cmi+tc")
    assert controls.purify.value
    assert controls.purify.description.endswith(": bounded")
    controls.lock("running")
    assert controls.purify.disabled
