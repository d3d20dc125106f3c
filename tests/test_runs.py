import json
import warnings
from collections import deque

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from abdlab import students, teachers
from abdlab.attacks.optimize import trojan
from abdlab.checkpoint import load_model, read_card
from abdlab.checks import check
from abdlab.defenses import SelfRetrospection
from abdlab.defenses.shuffled_teacher import ShuffledTeacher, shuffled_layers, suspicion
from abdlab.errors import CheckpointError
from abdlab.inspection import shuffle_auc, synthesize, vaccine_of, vaccine_trials
from abdlab.labels import Label
from abdlab.runs import Run, config_of, folder_of, history, table
from abdlab.settings import settings
from abdlab.stream import HEADLESS, Step, _Board, progress
from abdlab.students import clean_teacher_control, distill_all, distilled
from abdlab.teachers import (
    WeakTeacher,
    check_teacher,
    clean_teacher,
    poisoned_teacher,
    prepare,
    ready_triggers,
)
from abdlab.train import train


@pytest.fixture(autouse=True)
def headless(monkeypatch):
    monkeypatch.setenv(HEADLESS, "1")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def steps(first, last, total, kd=1.0, exams=(), images=(), events=()):
    """A hand-made stream: Steps first..last of total."""
    for i in range(first, last + 1):
        yield Step(
            i,
            total,
            {"kd": kd},
            acc=0.5 if i in exams else None,
            asr=0.25 if i in exams else None,
            images=torch.full((2, 1, 4, 4), float(i)) if i in images else None,
            events=("something happened",) if i in events else (),
        )


class TestFolder:
    def test_is_made_with_its_config(self, tmp_path):
        run = Run(tmp_path / "a" / "b", {"seed": 1, "sv": {"alpha": 0.1}})
        assert run.config == {"seed": 1, "sv": {"alpha": 0.1}}
        assert (tmp_path / "a" / "b" / "figures").is_dir()

    def test_opening_it_again_keeps_what_it_holds(self, tmp_path):
        Run(tmp_path / "a", {"seed": 1}).save_metrics({"acc": 0.5})
        assert Run(tmp_path / "a").config == {"seed": 1}
        assert Run(tmp_path / "a").metrics == {"acc": 0.5}

    def test_belongs_to_one_config(self, tmp_path):
        Run(tmp_path / "a", {"preset": "x", "seed": 1, "sv": {"alpha": 0.1, "k": 3}})
        Run(
            tmp_path / "a", {"preset": "y", "seed": 1, "sv": {"alpha": 0.1, "k": 3}}
        )  # the name of a preset does not matter
        with pytest.raises(
            ValueError, match=r"sv\.alpha was 0\.1 and is 0\.2\): choose another folder"
        ):
            Run(tmp_path / "a", {"seed": 1, "sv": {"alpha": 0.2, "k": 3}})
        with pytest.raises(ValueError, match="seed was 1 and is 2"):
            Run(tmp_path / "a", {"seed": 2, "sv": {"alpha": 0.1, "k": 3}})
        assert Run(tmp_path / "a").config["sv"]["alpha"] == 0.1

    def test_a_setting_that_the_old_run_did_not_have_is_another_config(self, tmp_path):
        Run(tmp_path / "a", {"seed": 1, "sv": {"alpha": 0.1}})
        with pytest.raises(ValueError, match=r"sv\.k was None and is 3"):
            Run(tmp_path / "a", {"seed": 1, "sv": {"alpha": 0.1, "k": 3}})

    def test_is_empty_at_first(self, run):
        assert run.config == run.metrics == run.samples() == {}
        assert run.history().empty

    def test_metrics_are_written_whole(self, run):
        run.save_metrics({"acc": 0.1, "old": 1})
        path = run.save_metrics({"acc": 0.9})
        assert json.loads(path.read_text()) == run.metrics == {"acc": 0.9}

    def test_a_figure_becomes_a_png(self, run):
        figure = Figure(figsize=(1, 1))
        figure.add_subplot().plot([0, 1])
        path = run.save_figure(figure, "losses")
        assert path == run.file("figures/losses.png")
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(
            ValueError, match=r"cannot write to .*file.run: .*; choose another folder"
        ):
            Run(tmp_path / "file" / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").mkdir()
        with pytest.raises(ValueError, match="cannot write to"):
            Run(tmp_path / "run", {"seed": 1})


class TestWatch:
    def test_reports_every_nth_step_the_last_and_the_special_ones(self, run):
        last = run.watch(steps(1, 11, 11, exams=[3], events=[5]), "zskt", every=4)
        history = run.history()
        assert last.index == 11
        assert history["step"].tolist() == [3, 4, 5, 8, 11]
        assert history["acc"].dropna().tolist() == [0.5]
        assert history.loc[history["step"] == 5, "events"].item() == ["something happened"]
        assert history["kd"].tolist() == [1.0] * 5
        assert set(history["label"]) == {"zskt"}

    def test_keeps_samples_by_step(self, run):
        run.watch(steps(1, 4, 4, images=[2, 4]), "zskt")
        assert {k: v[0, 0, 0, 0].item() for k, v in run.samples().items()} == {2: 2.0, 4: 4.0}

    def test_a_resume_replaces_the_lines_that_it_repeats(self, run):
        run.watch(steps(1, 3, 3, kd=7.0, exams=[3]), "teacher", every=1)
        run.watch(steps(1, 6, 10, kd=1.0, exams=[2, 6], images=[6], events=[4]), "zskt", every=1)
        run.watch(steps(5, 10, 10, kd=2.0, exams=[6], images=[8]), "zskt", every=1)
        history = run.history()
        student = history[history["label"] == "zskt"]
        assert student["step"].tolist() == list(range(1, 11))
        assert student["kd"].tolist() == [1.0] * 4 + [2.0] * 6
        assert student["acc"].dropna().index.size == 2
        assert student["events"].dropna().tolist() == [["something happened"]]
        assert history[history["label"] == "teacher"]["kd"].tolist() == [7.0] * 3
        assert sorted(run.samples()) == [6, 8]
        for line in run.file("history.jsonl").read_text().splitlines():
            assert "NaN" not in line
            assert isinstance(json.loads(line)["step"], int)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interrupted_run_keeps_its_history(self, run, error):
        def broken():
            yield from steps(1, 5, 10, images=[2])
            raise error("stop")

        with pytest.raises(error):
            run.watch(broken(), "zskt", every=1)
        assert run.history().get("step", []).tolist() == [1, 2, 3, 4, 5]
        assert list(run.samples()) == [2]

    def test_a_stream_with_nothing_left(self, run):
        with pytest.raises(ValueError, match="zskt: the stream had no steps"):
            run.watch(steps(1, 0, 10), "zskt")

    def test_progress_hands_on_every_step_and_closes_the_stream(self, capsys):
        closed = []

        def stream():
            try:
                yield from steps(1, 9, 9, events=[2])
            finally:
                closed.append(True)

        watched = progress(stream(), "zskt")
        assert [next(watched).index, next(watched).index] == [1, 2]
        watched.close()
        assert closed == [True]
        assert "zskt: something happened" in capsys.readouterr().out


class TestWeakTeacher:
    @pytest.mark.parametrize(
        ("acc", "asr", "words"),
        [(0.99, 0.85, "ASR is 85.0%, under 90 %"), (0.6, 0.99, "ACC is 60.0%, under 75 %")],
    )
    def test_warns(self, acc, asr, words):
        with pytest.warns(WeakTeacher, match=words) as caught:
            check_teacher(acc, asr)
        assert len(caught) == 1

    def test_a_good_one_is_quiet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_teacher(0.75, 0.9)

    def test_one_that_has_no_backdoor_is_not_blamed_for_it(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_teacher(0.9, None)
        with pytest.warns(WeakTeacher, match="ACC is"):
            check_teacher(0.6, None)


# Width 16: with fewer input channels, strided 1x1 convolutions in channels_last corrupt
# memory on CPUs (oneDNN issue 6035).
TINY = {
    "teacher.model": "wrn-10-1",
    "teacher.width": 16,
    "teacher.epochs": 1,
    "student.model": "wrn-10-1",
    "student.width": 16,
    "zskt.pseudo_batches": 4,
    "zskt.batch_size": 4,
    "zskt.student_steps": 1,
    "zskt.width": 2,
    "zskt.z": 4,
    "clean.epochs": 1,
    "clean.share": 0.5,
    "clean.batch_size": 16,
    "sv.verify": False,
    "sv.layers": 1,
    "sr.start": 0.5,
    "sr.inner_steps": 1,
}


def tiny(seed=0, **overrides):
    return settings(
        "quick/digits",
        {**TINY, **{k.replace("__", "."): v for k, v in overrides.items()}},
        seed=seed,
        device="cpu",
    )


@pytest.fixture(scope="module")
def data():
    return tiny().dataset().subset(96, 60)


def weights(model):
    return torch.cat([v.flatten().float() for v in model.state_dict().values()])


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
class TestTeacher:
    def test_is_trained_once_and_then_read(self, tmp_path, data):
        first = poisoned_teacher(tmp_path, tiny(), data)
        file = tmp_path / "seed0" / "teacher" / "teacher.safetensors"
        written = file.stat().st_mtime_ns
        second = poisoned_teacher(tmp_path, tiny(), data)
        assert torch.equal(weights(first), weights(second))
        assert file.stat().st_mtime_ns == written
        assert not second.training

    def test_its_folder_holds_attack_and_figures(self, tmp_path, data):
        poisoned_teacher(tmp_path, tiny(attack__rate=0.25, attack__target=3), data)
        run = Run(tmp_path / "seed0" / "teacher")
        card = read_card(run.file("teacher.safetensors"))
        assert card["attack"] == {"trigger": tiny().trigger.card(), "target": 3, "rate": 0.25}
        assert run.metrics["poison_rate"] == 0.25
        last = run.history().iloc[-1]
        assert (
            (last["acc"], last["asr"])
            == (card["acc"], card["asr"])
            == (run.metrics["acc"], run.metrics["asr"])
        )
        assert run.config["teacher"]["epochs"] == 1

    def test_a_weak_one_is_reported_also_when_read(self, tmp_path, data):
        for _ in range(2):
            with pytest.warns(WeakTeacher, match="a student cannot be better"):
                poisoned_teacher(tmp_path, tiny(), data)

    @pytest.mark.parametrize(
        "change", [{"attack__trigger": "trojan_wm"}, {"attack__target": 5}, {"teacher__epochs": 2}]
    )
    def test_other_settings_are_not_answered_with_the_old_teacher(self, tmp_path, data, change):
        poisoned_teacher(tmp_path, tiny(), data)
        with pytest.raises(ValueError, match="choose another folder"):
            poisoned_teacher(tmp_path, tiny(**change), data)


FAST = {"steps": 3}


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
class TestPrepare:
    def test_what_needs_nothing_is_returned_as_it_is(self, tmp_path, data):
        chosen = tiny()
        assert prepare(tmp_path, chosen, data) is chosen
        assert not list(tmp_path.iterdir())

    def test_an_optimised_trigger_gets_its_pattern_once(self, tmp_path, data):
        chosen = tiny(
            attack__trigger="trojan_3x3",
            attack__params={"corner": "top_left"},
            attack__optimize=FAST,
        )
        first = prepare(tmp_path, chosen, data)
        (file,) = (tmp_path / "seed0" / "trigger").iterdir()
        written = file.stat().st_mtime_ns
        again = prepare(tmp_path, chosen, data)
        assert first == again
        assert file.stat().st_mtime_ns == written
        assert prepare(tmp_path, first, data) is first
        assert not first.trigger.needs_pattern
        assert first.trigger.params["corner"] == "top_left"
        assert first.config("attack")["attack"]["params"]["pattern"].startswith("1x3x3:")
        card = json.loads(file.read_text())
        assert card["made"] == first.trigger.card()
        assert card["options"] == {"neurons": 2, "steps": 3, "lr": 0.05}
        assert chosen.trigger.needs_pattern

    def test_the_clean_model_is_a_run_like_the_others(self, tmp_path, data):
        chosen = tiny(attack__trigger="smooth", attack__optimize=FAST)
        prepare(tmp_path, chosen, data)
        run = Run(tmp_path / "seed0" / "clean_teacher")
        assert run.config == json.loads(json.dumps(config_of(chosen, data, "data", "teacher")))
        assert len(run.history()) == 1
        assert "asr" not in run.history()
        _, path = clean_teacher(tmp_path, chosen, data)
        assert path == run.file("teacher.safetensors")
        assert read_card(path)["acc"] == run.metrics["acc"]
        assert "attack" not in read_card(path)
        with pytest.raises(ValueError, match="choose another folder"):
            clean_teacher(tmp_path, tiny(teacher__epochs=2), data)

    def test_a_fine_tuned_teacher_goes_on_from_the_clean_one(self, tmp_path, data):
        chosen = tiny(teacher__tune={"epochs": 2, "lr": 0.01})
        found = poisoned_teacher(tmp_path, chosen, data)
        model, _ = clean_teacher(tmp_path, tiny(), data)  # of the same folder: nothing is tuned
        poisoned, as_said = chosen.poison(data), {**chosen.training(data), "epochs": 2, "lr": 0.01}
        for _ in train(model, poisoned.images, poisoned.labels, **as_said):
            pass
        wanted = model.state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in found.state_dict().items())

    @pytest.mark.parametrize(
        ("teacher", "told"),
        [
            ({"tune": {"rate": 0.01}}, "unknown key of teacher.tune 'rate'"),
            ({"tune": {"lr": -1.0}}, "teacher.lr is at least 0"),
            ({"tune": {"epochs": "two"}}, "teacher.epochs"),
            ({"tune": {"epochs": 1}, "file": "theirs.pth"}, "not for a file's"),
        ],
    )
    def test_fine_tuning_that_could_not_run(self, teacher, told):
        overrides = {f"teacher.{key}": value for key, value in teacher.items()}
        more = {"data.shape": [1, 16, 16], "data.classes": 10, "teacher.model": "wrn-10-1"}
        with pytest.raises(ValueError, match=told):
            check(settings("quick/digits", overrides | (more if "file" in teacher else {})))

    def test_other_options_make_another_trigger(self, tmp_path, data):
        found = [
            prepare(
                tmp_path,
                tiny(attack__trigger="l2_inv", attack__optimize={"steps": 2, "bound": bound}),
                data,
            ).trigger
            for bound in (0.02, 0.2)
        ]
        assert found[0] != found[1]
        assert len(list((tmp_path / "seed0" / "trigger").iterdir())) == 2

    def test_the_teachers_card_holds_the_pattern_and_its_messages_do_not(self, tmp_path, data):
        chosen = prepare(
            tmp_path,
            tiny(attack__trigger="l2_inv", attack__optimize={"steps": 2, "bound": 0.3}),
            data,
        )
        poisoned_teacher(tmp_path, chosen, data)
        run = Run(tmp_path / "seed0" / "teacher")
        assert (
            read_card(run.file("teacher.safetensors"))["attack"]["trigger"] == chosen.trigger.card()
        )
        assert len(chosen.trigger.params["pattern"]) > 200
        with pytest.raises(
            ValueError, match=r"attack\.params was .*pattern.*characters.*choose another folder"
        ) as error:
            poisoned_teacher(tmp_path, tiny(attack__trigger="blend"), data)
        assert len(str(error.value)) < 800

    def test_cl_gets_the_clean_model_and_its_bound(self, tmp_path, data):
        chosen = tiny(
            attack__trigger="cl", attack__optimize={"bound": 0.2, "steps": 2}, attack__rate=0.05
        )
        with pytest.raises(ValueError, match="prepare"):
            chosen.poison(data)
        chosen = prepare(tmp_path, chosen, data)
        found = chosen.poison(data)
        assert found.mask.sum() == 5
        assert torch.equal(found.labels, data.train_labels)
        change = (found.images - chosen.trigger(data.train_images))[found.mask]
        assert 0.15 < change.abs().max() <= 0.2 + 1e-6
        assert torch.equal(found.images, prepare(tmp_path, chosen, data).poison(data).images)

    def test_composed_and_several_ones(self, tmp_path, data):
        more = [{"trigger": "trojan_3x3", "target": 2, "optimize": FAST}, {"trigger": "blend"}]
        chosen = prepare(
            tmp_path, tiny(attack__trigger="l0_inv", attack__optimize=FAST, attack__more=more), data
        )
        assert [a.trigger.name for a in chosen.attacks] == ["l0_inv", "trojan_3x3", "blend"]
        assert not any(a.trigger.needs_pattern for a in chosen.attacks)
        with pytest.raises(ValueError, match="is for a single trigger"):
            prepare(tmp_path, tiny(attack__trigger="blend+l0_inv", attack__optimize=FAST), data)

    def test_a_composed_trigger_has_its_parts_made(self, tmp_path, data, monkeypatch):
        monkeypatch.setitem(trojan.__kwdefaults__, "steps", 2)
        found = prepare(tmp_path, tiny(attack__trigger="blend+trojan_3x3"), data).trigger
        assert str(found) == "blend+trojan_3x3"
        assert found(data.test_images).shape == data.test_images.shape

    def test_ready_triggers_are_those_asked_for_and_the_chosen_one_last(
        self, tmp_path, data, monkeypatch
    ):
        names = ["badnet_grid", "cl", "blend"]
        found = ready_triggers(tmp_path, tiny(attack__trigger="blend"), data, names)
        assert [str(t) for t in found] == ["badnet_grid", "cl", "blend"]
        assert not list(tmp_path.iterdir())  # at test time cl is drawn
        monkeypatch.setitem(trojan.__kwdefaults__, "steps", 2)
        found = ready_triggers(tmp_path, tiny(), data, ["trojan_8x8"])
        assert [str(t) for t in found] == ["trojan_8x8", "badnet_sq"]
        assert not any(t.needs_pattern for t in found)

    def test_a_broken_cache_says_so(self, tmp_path, data):
        chosen = tiny(attack__trigger="l0_inv", attack__optimize=FAST)
        prepare(tmp_path, chosen, data)
        (file,) = (tmp_path / "seed0" / "trigger").iterdir()
        file.write_text("{")
        with pytest.raises(CheckpointError, match="delete it"):
            prepare(tmp_path, chosen, data)


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_several_attacks_are_measured_one_by_one(tmp_path, data):
    chosen = tiny(attack__more=[{"trigger": "blend", "target": 1, "rate": 0.2}])
    teacher = poisoned_teacher(tmp_path, chosen, data)
    run = Run(tmp_path / "seed0" / "teacher")
    card = read_card(run.file("teacher.safetensors"))["attack"]
    assert (card["trigger"]["name"], card["more"][0]["trigger"]["name"]) == ("badnet_sq", "blend")
    assert card["more"][0]["rate"] == pytest.approx(19 / 96)
    _, metrics = distilled(tmp_path, chosen, data, teacher, "clean")
    for found in (run.metrics, metrics):
        for kind in ("asr", "robust"):
            each = found[f"{kind}/badnet_sq"], found[f"{kind}/blend"]
            assert found[kind] == pytest.approx(sum(each) / 2)
        assert found["robust"] <= 1 - found["asr"] + 1e-6
    kept = Run(tmp_path / "seed0" / "clean").confusion
    assert [*kept["triggered"]] == ["badnet_sq", "blend"]
    assert sum(kept["clean"][i][i] for i in range(10)) / len(data.test_labels) == pytest.approx(
        metrics["acc"]
    )


class TestDistilled:
    @pytest.fixture
    def teacher(self, data):
        return tiny().teacher(data)

    def test_writes_what_it_returns(self, tmp_path, data, teacher):
        student, metrics = distilled(tmp_path, tiny(), data, teacher, "zskt+sv+sr", exams=2)
        run = Run(tmp_path / "seed0" / "zskt+sv+sr")
        assert run.metrics == json.loads(json.dumps(metrics))
        assert metrics["label"] == "zskt+sv+sr"
        assert set(metrics["defenses"]) == {"sv", "sr"}
        assert 0 <= metrics["acc"] <= 1
        assert not student.training
        table = run.history()
        assert table["acc"].dropna().size == 2
        assert table["acc"].iloc[-1] == metrics["acc"]
        assert sorted(run.samples()) == [2, 4]
        assert run.samples()[4].shape == (4, 1, 16, 16)
        assert read_card(run.file("student.safetensors"))["acc"] == metrics["acc"]

    def test_a_finished_run_is_read_from_its_folder(self, tmp_path, data, teacher):
        student, metrics = distilled(tmp_path, tiny(), data, teacher, "zskt")
        again, same = distilled(tmp_path, tiny(), data, teacher, "zskt")
        assert torch.equal(weights(student), weights(again))
        assert same == metrics
        assert not again.training

    def test_clean_kd_runs_too(self, tmp_path, data, teacher):
        _, metrics = distilled(tmp_path, tiny(), data, teacher, "clean")
        assert (metrics["label"], metrics["defenses"]) == ("clean", {})
        # 48 images in batches of 16
        assert Run(tmp_path / "seed0" / "clean").history()["step"].iloc[-1] == 3

    def test_a_branch_ends_like_a_run_from_scratch(self, tmp_path, data, teacher):
        distilled(tmp_path / "a", tiny(), data, teacher, "zskt")
        branched, metrics = distilled(tmp_path / "a", tiny(), data, teacher, "zskt+sr")
        assert metrics["branched_from"].endswith("checkpoint-2.safetensors")
        scratch, plain = distilled(tmp_path / "b", tiny(), data, teacher, "zskt+sr")
        assert plain["branched_from"] is None
        assert torch.equal(weights(branched), weights(scratch))

    def test_a_stopped_run_goes_on_to_the_same_numbers(self, tmp_path, data, teacher):
        class Stop(Exception):
            pass

        def stop_at_3(label, step):
            if step.index == 3:
                raise Stop

        with pytest.raises(Stop):
            distilled(tmp_path / "a", tiny(), data, teacher, "zskt+sr", tell=stop_at_3)
        resumed, found = distilled(tmp_path / "a", tiny(), data, teacher, "zskt+sr")
        whole, metrics = distilled(tmp_path / "b", tiny(), data, teacher, "zskt+sr")
        assert torch.equal(weights(resumed), weights(whole))
        assert (found["acc"], found["asr"]) == (metrics["acc"], metrics["asr"])
        assert {1, 2, 4} <= set(Run(tmp_path / "a" / "seed0" / "zskt+sr").history()["step"])

    def test_a_run_killed_between_its_last_checkpoint_and_its_result_can_be_finished(
        self, tmp_path, data, teacher
    ):
        student, metrics = distilled(tmp_path, tiny(), data, teacher, "zskt")
        for name in ("student.safetensors", "metrics.json"):
            (tmp_path / "seed0" / "zskt" / name).unlink()
        again, found = distilled(tmp_path, tiny(), data, teacher, "zskt")
        assert torch.equal(weights(student), weights(again))
        assert (found["acc"], found["asr"]) == (metrics["acc"], metrics["asr"])

    def test_other_settings_are_not_answered_with_the_old_result(self, tmp_path, data, teacher):
        distilled(tmp_path, tiny(), data, teacher, "zskt")
        with pytest.raises(ValueError, match=r"zskt\.z was 4 and is 5.*choose another folder"):
            distilled(tmp_path, tiny(zskt__z=5), data, teacher, "zskt")

    def test_seeds_lie_side_by_side(self, tmp_path, data, teacher):
        first, _ = distilled(tmp_path, tiny(), data, teacher, "zskt")
        second, metrics = distilled(tmp_path, tiny(seed=1), data, teacher, "zskt")
        assert metrics["seed"] == 1
        assert not torch.equal(weights(first), weights(second))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["seed0", "seed1"]

    def test_an_unknown_method_gets_a_hint_and_leaves_no_folder(self, tmp_path, data, teacher):
        with pytest.raises(ValueError, match="did you mean 'zskt'"):
            distilled(tmp_path, tiny(), data, teacher, "zskr")
        with pytest.raises(ValueError, match="unknown defense 'vs'"):
            distilled(tmp_path, tiny(), data, teacher, "zskt+vs")
        assert not list(tmp_path.iterdir())

    def test_what_a_finished_run_gives_on_request(self, tmp_path, data, teacher):
        chosen = tiny()
        for label in ("clean", "zskt+sv"):
            distilled(tmp_path, chosen, data, teacher, label)
        clean, zskt = (Run(tmp_path / "seed0" / label) for label in ("clean", "zskt+sv"))
        assert synthesize(zskt, chosen, data, teacher, 6).shape == (6, 1, 16, 16)
        with pytest.raises(CheckpointError, match="has no generator"):
            synthesize(clean, chosen, data, teacher, 6)
        assert vaccine_of(zskt, chosen, teacher)(data.test_images[:5]).shape == (5, 10)
        assert set(history(tmp_path, chosen, ["clean", "zskt+sv"])["label"]) == {"clean", "zskt+sv"}


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_distill_all_gives_every_method_in_the_order_asked_for(tmp_path, data):
    labels = ["zskt+sr", "clean", "zskt"]
    found = distill_all(tmp_path, tiny(), data, labels, with_teacher=True, workers=1)
    assert list(found) == ["teacher", *labels]
    assert {name: metrics["label"] for name, metrics in found.items()} == {
        name: name for name in found
    }
    assert sorted(table(tmp_path)["label"]) == sorted(found)


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_methods_side_by_side_in_one_process_have_the_numbers_of_each_alone(tmp_path, data):
    """What an accelerator has for several workers, on a CPU."""
    labels = ["zskt", "zskt+sr", "clean", "zskt+sv"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    expected = distill_all(alone, tiny(), data, labels, workers=1)
    poisoned_teacher(together, tiny(), data)
    groups, board = [["zskt", "zskt+sr"], ["zskt+sv"], ["clean"]], _Board(16)
    students._in_threads(together, tiny(), data, groups, 2, board)
    found = distill_all(together, tiny(), data, labels, workers=1)  # only reads
    assert found.keys() == expected.keys()
    for label in labels:
        assert {k: found[label][k] for k in ("acc", "asr")} == {
            k: expected[label][k] for k in ("acc", "asr")
        }
        one, other = (
            load_model(root / "seed0" / label / "student.safetensors").state_dict()
            for root in (alone, together)
        )
        assert all(torch.equal(v, other[k]) for k, v in one.items())
        histories = [
            Run(root / "seed0" / label).history().drop(columns="seconds")
            for root in (alone, together)
        ]
        pd.testing.assert_frame_equal(*histories)
    assert found["zskt+sr"]["branched_from"]


def test_the_bar_of_several_students_knows_its_length_from_the_first_step(capsys):
    """It counts all of them, and what a checkpoint spares one of them as done."""
    board = _Board(30)
    board.show("zskt", Step(1, 10, {}))
    assert (board.bar.n, board.bar.total, board.bar.initial) == (1, 30, 0)
    board.show("zskt+sr", Step(16, 20, {}))
    assert (board.bar.n, board.bar.total, board.bar.initial) == (17, 30, 15)
    for i in range(2, 11):
        board.show("zskt", Step(i, 10, {}))
    for i in range(17, 21):
        board.show("zskt+sr", Step(i, 20, {}))
    board.close()
    assert (board.bar.n, board.bar.total) == (30, 30)


def test_a_teachers_training_is_a_curve(tmp_path, data):
    """ACC and ASR of every epoch, and of a long training about 20 times; exams change no
    number.
    """
    chosen = tiny(teacher__epochs=3)
    with pytest.warns(WeakTeacher):
        teacher = poisoned_teacher(tmp_path, chosen, data)
    found = Run(tmp_path / "seed0" / "teacher").history()
    assert found[["acc", "asr"]].notna().all().all()
    assert found["step"].tolist() == [1, 2, 3]
    model, poisoned = chosen.teacher(data), chosen.poison(data)
    deque(train(model, poisoned.images, poisoned.labels, **chosen.training(data)), maxlen=0)
    assert torch.equal(weights(model), weights(teacher))
    assert teachers._every(chosen) == 1
    assert [teachers._every(tiny(teacher__epochs=n)) for n in (39, 40, 200)] == [1, 2, 10]


def test_table_has_one_row_per_run(tmp_path):
    Run(tmp_path / "b" / "zskt").save_metrics({"acc": 0.9, "asr": 0.8, "defenses": {}})
    Run(tmp_path / "a").save_metrics({"acc": 0.7, "label": "clean", "asr": None})
    found = table(tmp_path)
    assert found["run"].tolist() == ["a", "b/zskt"]
    assert found["acc"].tolist() == [0.7, 0.9]
    assert "defenses" not in found
    assert table(tmp_path / "none").empty


def test_a_trunk_with_other_settings_is_not_shared(tmp_path):
    from abdlab.students import _shared_trunk

    label = Label.parse("zskt+sr")
    ours = Run(tmp_path / "zskt+sr", {"seed": 0, "zskt": {"z": 4}, "sr": {}})
    for z, shared in ((4, True), (5, False)):
        folder = tmp_path / "zskt"
        (folder / "config.json").unlink(missing_ok=True)
        Run(folder, {"seed": 0, "zskt": {"z": z}})
        (folder / "checkpoint-5.safetensors").touch()
        assert (_shared_trunk(ours, label, {"sr": 5}) is not None) == shared
    assert _shared_trunk(ours, label, {"sr": 6}) is None


def test_the_latest_shared_trunk_is_taken(tmp_path):
    """TU begins at 3, SR at 5: SR's run shares 3 pseudo-batches with TU's and 5 with the
    undefended one.
    """
    from abdlab.students import _shared_trunk

    forks, label = {"tu": 3, "sr": 5}, Label.parse("zskt+sr")
    ours = Run(tmp_path / "zskt+sr", {"seed": 0, "zskt": {"z": 4}, "sr": {}})
    tu = Run(tmp_path / "zskt+tu", {"seed": 0, "zskt": {"z": 4}, "tu": {}})
    tu.file("checkpoint-3.safetensors").touch()
    assert _shared_trunk(ours, label, forks) == tu.file("checkpoint-3.safetensors")
    plain = Run(tmp_path / "zskt", {"seed": 0, "zskt": {"z": 4}})
    plain.file("checkpoint-5.safetensors").touch()
    assert _shared_trunk(ours, label, forks) == plain.file("checkpoint-5.safetensors")


def test_sr_always_has_a_pseudo_batch_and_forks_before_it():
    assert SelfRetrospection(start=0.99).first_of(6) == 5


@pytest.fixture
def control(tmp_path, data):
    """A poisoned teacher with one student, and the control beside it."""
    labels = ["clean", "zskt"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distill_all(tmp_path, tiny(), data, labels, workers=1)
        said = len(caught)
        found = clean_teacher_control(tmp_path, tiny(), data, labels, workers=1)
    return tmp_path, labels, found, [str(w.message) for w in caught[said:]]


def test_the_control_runs_the_chain_on_a_teacher_that_is_not_poisoned(control):
    root, labels, found, said = control
    assert list(found) == ["teacher", *labels]
    folder = root / "clean_teacher_control" / "seed0"
    assert read_card(folder / "teacher" / "teacher.safetensors")["attack"]["rate"] == 0
    assert found["teacher"]["poison_rate"] == 0
    assert (folder / "zskt" / "student.safetensors").exists()
    assert Run(root / "seed0" / "teacher").metrics["poison_rate"] > 0, (
        "the poisoned chain is left alone"
    )
    assert not [message for message in said if "ASR" in message], "an ASR is not asked of it"


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_vaccines_are_tried_on_both_teachers(control, data):
    root, labels, *_ = control
    chosen = tiny(sv__pool=32, sv__threshold=0.0, sv__sigma=0.5)
    rows = vaccine_trials(root, chosen, data, labels, tries=3)
    again = vaccine_trials(root, chosen, data, labels, tries=3)
    strict = vaccine_trials(root, tiny(sv__pool=32, sv__threshold=1.0), data, labels, tries=2)
    none = vaccine_trials(root, chosen, data, ["clean"])
    assert [(row["seed"], row["teacher"], row["label"], row["tries"]) for row in rows] == [
        (0, "poisoned", "zskt", 3),
        (0, "clean", "zskt", 3),
    ]
    assert all(
        row["accepted"] == 3 and row["share"] == 1 and 0 < row["largest"] < 1 for row in rows
    )
    assert rows == again
    assert [row["accepted"] for row in strict] == [0, 0]
    assert [row["picked"] for row in strict] == [None, None]
    assert all(0 <= row["picked"] <= 1 and row["auc_std"] >= 0 for row in rows)
    assert none == []


def test_a_shuffle_is_judged_by_the_order_of_its_scores(wrn):
    from sklearn.metrics import roc_auc_score

    teacher, (clean, triggered) = wrn(), torch.rand(2, 30, 1, 8, 8)
    triggered[:5] = clean[:5]  # equal scores count half
    shuffle = ShuffledTeacher(teacher, shuffled_layers(teacher, 2), 3, torch.Generator())
    scores = [suspicion(shuffle, teacher, x, reverse=True) for x in (triggered, clean)]
    wanted = roc_auc_score([0] * 30 + [1] * 30, torch.cat(scores))
    got = shuffle_auc(shuffle, teacher, clean, triggered, reverse=True)
    assert got == pytest.approx(wanted, abs=1e-9)


def test_a_mix_and_a_photograph_run_by_their_labels(tmp_path, data):
    small = {
        "ood__patches": 16,
        "ood__batch_size": 8,
        "ood__epochs": 2,
        "mixed__pseudo_batches": 4,
        "sv__stop": 1.0,
    }
    chosen = tiny(**small)
    teacher = chosen.teacher(data)
    for label in ("ood+sv+sr", "mixed+sv"):
        _, metrics = distilled(tmp_path, chosen, data, teacher, label)
        run = Run(tmp_path / "seed0" / label)
        assert (
            set(metrics["defenses"]["sv"]["forms"])
            == {"ood+sv+sr": {"weights"}, "mixed+sv": {"weights", "synthesis"}}[label]
        )
        assert {"ood": {"ood"}, "mix": {"mixed", "zskt", "ood"}}[label[:3]] <= set(run.config)
    assert synthesize(Run(tmp_path / "seed0" / "ood+sv+sr"), chosen, data, teacher, 5).shape == (
        5,
        1,
        16,
        16,
    )
    with pytest.raises(ValueError, match=r"ood\.patches was 16 and is 17"):
        distilled(tmp_path, tiny(**{**small, "ood__patches": 17}), data, teacher, "mixed+sv")


def test_settings_without_poison(data):
    more = [{"trigger": "blend", "rate": 0.05, "target": 1}]
    chosen = tiny(attack__covers=0.1, attack__more=more)
    clean = chosen.unpoisoned()
    assert [attack.rate for attack in clean.attacks] == [0, 0]
    assert [attack.trigger for attack in clean.attacks] == [
        attack.trigger for attack in chosen.attacks
    ]
    assert not clean.poison(data).mask.any()
    assert torch.equal(clean.poison(data).images, data.train_images)
    assert chosen.attacks[0].rate > 0
    assert clean.values["sv"] == chosen.values["sv"]


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_another_set_of_classes_is_noticed(tmp_path, data):
    """A folder of images that gained a class would shift every label."""
    import dataclasses

    poisoned_teacher(tmp_path, tiny(), data)
    config = json.loads((tmp_path / "seed0" / "teacher" / "config.json").read_text())
    assert config["classes"] == [*data.classes]
    other = dataclasses.replace(data, classes=(*data.classes, "new"))
    with pytest.raises(ValueError, match=r"other settings \(classes was"):
        poisoned_teacher(tmp_path, tiny(), other)


def test_another_setting_of_any_method_is_refused_before_anything_is_made(tmp_path, data):
    """Also where a purifier would have run for minutes first."""
    chosen = tiny(**{"bounded.k": 2.0})
    for label, wrong in (
        ("zskt", {"data": {"name": "other"}}),
        ("bounded/zskt", {"bounded": {"k": 3.0}}),
        ("bounded/teacher", {"bounded": {"k": 4.0}}),
    ):
        root = tmp_path / label.replace("/", "-")
        folder = folder_of(root, 0, label)
        Run(folder, wrong)
        with pytest.raises(ValueError, match="holds a run with other settings"):
            distill_all(root, chosen, data, ["zskt", "bounded/zskt"], workers=1)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
class TestPurified:
    """A teacher that is cleaned before it teaches, by label."""

    def test_is_made_once_kept_apart_and_taught_from(self, tmp_path, data):
        chosen = tiny(**{"bounded.k": 2.0})
        teacher = poisoned_teacher(tmp_path, chosen, data)
        before = weights(teacher)
        student, metrics = distilled(tmp_path, chosen, data, teacher, "bounded/zskt")
        assert torch.equal(weights(teacher), before)
        assert metrics["label"] == "bounded/zskt"
        folder = tmp_path / "seed0"
        assert (folder / "bounded,zskt" / "student.safetensors").exists()
        config = json.loads((folder / "bounded,zskt" / "config.json").read_text())
        assert config["bounded"] == {"k": 2.0}
        cleaned, found = distilled(tmp_path, chosen, data, teacher, "bounded/teacher")
        assert found["purified"] == [{"name": "bounded", "k": 2.0, "layers": "batch norm"}]
        written = (folder / "bounded,teacher" / "teacher.safetensors").stat().st_mtime_ns
        again, _ = distilled(tmp_path, chosen, data, teacher, "bounded/teacher")
        assert (folder / "bounded,teacher" / "teacher.safetensors").stat().st_mtime_ns == written
        images = 3 * torch.randn(4, *data.shape)
        torch.testing.assert_close(cleaned(images), again(images))
        assert not torch.allclose(cleaned(images), teacher(images))
        plain, _ = distilled(tmp_path, chosen, data, teacher, "zskt")
        assert not torch.equal(weights(student), weights(plain)), "it learnt from another teacher"

    def test_stands_in_the_order_that_was_asked_for(self, tmp_path, data):
        chosen = tiny(**{"bounded.k": 2.0})
        labels = ["bounded/teacher", "zskt", "bounded/zskt"]
        found = distill_all(tmp_path, chosen, data, labels, with_teacher=True, workers=1)
        assert list(found) == ["teacher", *labels]
