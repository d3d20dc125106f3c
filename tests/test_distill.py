"""The distillation loop: against the naive loop, its stream, its checkpoints, and what
stops it.
"""

import copy
import random
import re

import literal
import pytest
import torch
from torch import nn

from abdlab import (
    ZSKT,
    CheckpointError,
    CleanKD,
    Diverged,
    SelfRetrospection,
    ShufflingVaccine,
    distill,
    save_model,
)
from abdlab.checkpoint import load_state
from abdlab.defenses import Defense
from abdlab.distill import seed_of

CPU = torch.device("cpu")


def zskt(**settings):
    return ZSKT(
        (1, 8, 8),
        **{
            "pseudo_batches": 10,
            "batch_size": 8,
            "student_steps": 2,
            "z": 5,
            "width": 4,
            **settings,
        },
    )


def abd():
    """Both defenses: the vaccine verifies (half of any pool is below its mean) before
    the fourth step, SR begins at the seventh.
    """
    return [
        ShufflingVaccine(layers=3, warmup=0.3, sigma=0),
        SelfRetrospection(start=0.6, inner_steps=2),
    ]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture
def fresh(wrn):
    """Runs as a new process would: new networks each time; ``fresh(source, ...)`` is
    (student, stream).
    """

    def start(source=None, student="wrn-10-1", **settings):
        student = wrn(student, seed=2)
        return student, distill(wrn(seed=1), student, source or zskt(), device="cpu", **settings)

    return start


def until(stream, stop):
    """The steps up to number ``stop``; then the stream is closed."""
    steps = []
    for step in stream:
        steps.append(step)
        if step.index == stop:
            break
    stream.close()
    return steps


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("defended", [False, True])
def test_a_pseudo_batch_equals_the_naive_loop(double, wrn, defended, temperature):
    """Weights of student and generator, and the losses; buffers aside, for the student
    does not record the generator's step.
    """
    teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
    settings = {
        "pseudo_batches": 2,
        "batch_size": 6,
        "student_steps": 3,
        "temperature": temperature,
    }
    sv, sr = (
        ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=0.5),
        SelfRetrospection(start=0, inner_steps=3, weight=2.0),
    )
    twin, source = zskt(**settings), zskt(**settings)
    twin.clip = source.clip = 1.0
    twin.start(teacher.requires_grad_(False), student, CPU, seed_of(0, "source", "zskt"))
    generator, other, noise = (
        twin.generator,
        copy.deepcopy(student).train(),
        torch.randn(6, 5, generator=twin.rng),
    )

    step = next(
        distill(teacher, student, source, defenses=[sv, sr] if defended else [], device="cpu")
    )

    extra = {}
    if defended:
        rng = torch.Generator().manual_seed(seed_of(0, "defense", "sr"))
        extra["starts"] = [0.1 * torch.randn(1, 1, 8, 8, generator=rng) for _ in range(3)]
        extra |= {
            "copies": literal.shuffled_teachers(teacher, sv.vaccine.permutations),
            "alpha": 0.5,
            "scale": 0.25,
        }
        extra |= {"inner_steps": 3, "weight": 2.0}
    expected = literal.pseudo_batch(
        generator,
        teacher,
        other,
        noise,
        student_steps=3,
        total_student_steps=6,
        generator_lr=1e-3,
        student_lr=5e-4 if defended else 2e-3,
        clip=1.0,
        temperature=temperature,
        stages=student.stages,
        **extra,
    )
    assert step.losses == pytest.approx(expected, rel=1e-6)
    for found, naive in ((student, other), (source.generator, generator)):
        for (name, p), q in zip(found.named_parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(
                p, q, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not torch.allclose(student.fc.weight, wrn(seed=2, classes=3).fc.weight, atol=1e-4)


def test_the_stream(fresh):
    _, stream = fresh(zskt(pseudo_batches=5), images_every=2)
    steps = list(stream)
    assert [s.index for s in steps] == [1, 2, 3, 4, 5]
    assert {s.total for s in steps} == {5}
    assert all(s.losses.keys() == {"generator", "kd", "attention"} for s in steps)
    assert all(type(v) is float for s in steps for v in s.losses.values())
    assert [None if s.images is None else tuple(s.images.shape) for s in steps] == [
        None,
        (8, 1, 8, 8),
        None,
        *[(8, 1, 8, 8)] * 2,
    ]
    assert all(s.acc is None and s.asr is None and s.events == () for s in steps)
    assert sorted(s.seconds for s in steps) == [s.seconds for s in steps]
    assert steps[0].seconds > 0


def test_defenses_report_their_terms_and_events(fresh):
    steps = list(fresh(defenses=abd())[1])
    assert ["sv_synthesis" in s.losses for s in steps] == [False] * 3 + [True] * 7
    assert ["sr" in s.losses for s in steps] == [False] * 6 + [True] * 4
    assert {s.index: s.events[0].split(":")[0] for s in steps if s.events} == {
        4: "shuffling vaccine",
        7: "self-retrospection",
    }


@pytest.mark.parametrize(("every", "expected"), [(None, [7]), (3, [3, 6, 7]), (7, [7])])
def test_exams_are_held_now_and_then_and_at_the_end(fresh, every, expected):
    held = []

    def exam(model):
        held.append(model)
        model.eval()
        return {"acc": 0.5, "asr": 0.25}

    student, stream = fresh(zskt(pseudo_batches=7), exam=exam, exam_every=every)
    steps, training = [], []
    for step in stream:
        steps.append(step)
        training.append(student.training)
    assert [s.index for s in steps if s.acc == 0.5 and s.asr == 0.25] == expected
    assert all(s.acc is None and s.asr is None for s in steps if s.index not in expected)
    assert all(model is student for model in held)
    assert all(training)
    assert not student.training


def test_an_exam_without_asr(fresh):
    steps = list(fresh(zskt(pseudo_batches=2), exam=lambda model: {"acc": 0.5})[1])
    assert [(s.acc, s.asr) for s in steps] == [(None, None), (0.5, None)]


def test_an_abdlab_exam_changes_no_number(fresh, digits):
    from abdlab import Exam

    student, stream = fresh()
    list(stream)
    examined, stream = fresh(exam=Exam.of(digits.test_images, digits.test_labels), exam_every=1)
    assert all(0 <= s.acc <= 1 for s in stream)
    assert same(weights(student), weights(examined))


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(fresh):
    runs = []
    for seed in (0, 0, 1):
        student, stream = fresh(zskt(pseudo_batches=3), defenses=abd(), seed=seed)
        runs.append(([s.losses for s in stream], weights(student)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert same(runs[0][1], runs[1][1])


def test_global_random_numbers_are_untouched(fresh):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _, stream = fresh(defenses=abd())
    found = [torch.rand(1)]
    for step in stream:
        if step.index in (4, 10):
            found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)


def test_the_teacher_is_never_changed(wrn):
    teacher, student = wrn(seed=1), wrn(seed=2)
    before = weights(teacher)
    list(distill(teacher, student, zskt(), defenses=abd(), device="cpu"))
    assert same(weights(teacher), before)
    for model in (teacher, student):
        assert not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
        )
        assert not any(m.training for m in model.modules())
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


class Weighs(Defense):
    def __init__(self, factor):
        self.factor = factor

    @property
    def name(self):
        return f"weighs{self.factor}"

    def sample_weights(self, batch):
        return torch.full((len(batch.images),), self.factor)


def test_sample_weights_multiply(fresh):
    plain, stream = fresh(zskt(pseudo_batches=2))
    expected = [s.losses for s in stream]
    found, stream = fresh(zskt(pseudo_batches=2), defenses=[Weighs(4.0), Weighs(0.25)])
    assert [s.losses for s in stream] == expected
    assert same(weights(plain), weights(found))
    step = next(fresh(zskt(pseudo_batches=2, student_steps=1), defenses=[Weighs(0.25)])[1])
    assert step.losses["kd"] == pytest.approx(
        next(fresh(zskt(pseudo_batches=2, student_steps=1))[1]).losses["kd"] / 4
    )


def test_closing_leaves_a_checkpoint(fresh, tmp_path):
    path = tmp_path / "run.safetensors"
    student, stream = fresh(checkpoint=path, card={"note": "mine"})
    assert len(until(stream, 3)) == 3
    state, card = load_state(path)
    assert card["index"] == 3
    assert card["note"] == "mine"
    assert same(state["student"], weights(student))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_checkpoints_are_written_as_often_as_asked_and_at_the_end(fresh, tmp_path):
    path, found = tmp_path / "run.safetensors", []
    for _ in fresh(zskt(pseudo_batches=5), checkpoint=path, checkpoint_every=2)[1]:
        found.append(load_state(path)[1]["index"] if path.exists() else 0)
    assert found == [0, 2, 2, 4, 5]


def test_checkpoints_to_branch_from_are_kept(fresh, tmp_path):
    path = tmp_path / "run.safetensors"
    list(fresh(zskt(pseudo_batches=5), checkpoint=path, keep=(2, 5))[1])
    assert {p.name: load_state(p)[1]["index"] for p in tmp_path.iterdir()} == {
        "run.safetensors": 5,
        "run-2.safetensors": 2,
        "run-5.safetensors": 5,
    }


@pytest.fixture(scope="module")
def uninterrupted():
    """Makes the final (losses by step, weights) of a run that is never closed, once per
    kind.
    """
    return {}


@pytest.mark.parametrize(
    "stops",
    [
        (1,),
        (3,),
        (4,),
        (6,),
        (7,),
        (2, 5, 9),
        tuple(sorted(random.Random(0).sample(range(1, 10), 3))),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(fresh, tmp_path, uninterrupted, stops):
    if not uninterrupted:
        student, stream = fresh(defenses=abd())
        uninterrupted.update({s.index: s.losses for s in stream}, weights=weights(student))
    path, found = tmp_path / "run.safetensors", {}
    for stop in (*stops, 10):
        student, stream = fresh(defenses=abd(), checkpoint=path)
        found.update({s.index: s.losses for s in until(stream, stop)})
    found["weights"] = weights(student)
    assert found.keys() == uninterrupted.keys()
    assert {k: v for k, v in found.items() if k != "weights"} == {
        k: v for k, v in uninterrupted.items() if k != "weights"
    }
    assert same(found["weights"], uninterrupted["weights"])


def test_clean_kd_resumes_in_mid_epoch_to_the_same_weights(fresh, digits, tmp_path):
    def source():
        return CleanKD(digits.train_images, digits.train_labels, epochs=3, batch_size=10, shift=1)

    student, stream = fresh(source())
    assert len(list(stream)) == 12
    for stop in (1, 6, 12):
        resumed, stream = fresh(source(), checkpoint=tmp_path / "run.safetensors")
        until(stream, stop)
    assert same(weights(student), weights(resumed))


def test_a_finished_run_is_examined_again_and_not_trained(fresh, tmp_path):
    student, stream = fresh(checkpoint=tmp_path / "run.safetensors")
    list(stream)
    again, stream = fresh(checkpoint=tmp_path / "run.safetensors", exam=lambda model: {"acc": 0.5})
    (step,) = stream
    assert (step.index, step.total, step.losses, step.acc) == (10, 10, {}, 0.5)
    assert same(weights(student), weights(again))


def test_a_defended_branch_equals_the_same_run_from_scratch(fresh, tmp_path):
    sr = lambda: [SelfRetrospection(start=0.6, inner_steps=2)]  # noqa: E731
    until(fresh(checkpoint=tmp_path / "undefended.safetensors")[1], 6)
    scratch, stream = fresh(defenses=sr())
    list(stream)
    branch, stream = fresh(
        defenses=sr(),
        resume_from=tmp_path / "undefended.safetensors",
        checkpoint=tmp_path / "sr.safetensors",
    )
    assert [s.index for s in until(stream, 8)] == [7, 8]
    # the branch's own checkpoint wins when it goes on
    branch, stream = fresh(
        defenses=sr(),
        resume_from=tmp_path / "undefended.safetensors",
        checkpoint=tmp_path / "sr.safetensors",
    )
    assert [s.index for s in stream] == [9, 10]
    assert same(weights(scratch), weights(branch))
    assert load_state(tmp_path / "undefended.safetensors")[1]["index"] == 6


@pytest.mark.parametrize("other", ["seed", "length", "source"])
def test_another_runs_checkpoint_is_refused(fresh, tmp_path, digits, other):
    path = tmp_path / "run.safetensors"
    until(fresh(checkpoint=path)[1], 2)
    settings = {"seed": {"seed": 1}, "length": {"source": zskt(pseudo_batches=11)}}
    settings["source"] = {"source": CleanKD(digits.train_images, digits.train_labels)}
    with pytest.raises(
        CheckpointError,
        match=r"run\.safetensors belongs to another run .* choose another checkpoint file",
    ):
        next(fresh(checkpoint=path, **settings[other])[1])


@pytest.mark.parametrize("wrong", ["wrn-16-1", "wrn-10-2"])
def test_another_networks_checkpoint_is_refused(fresh, tmp_path, wrong):
    path = tmp_path / "run.safetensors"
    until(fresh(checkpoint=path)[1], 2)
    with pytest.raises(
        CheckpointError, match=r"run\.safetensors does not fit these networks"
    ) as caught:
        next(fresh(checkpoint=path, student=wrong)[1])
    assert "\n" not in str(caught.value)
    assert re.search(r"stage\d", str(caught.value)), "the sentence must name what does not fit"


def test_a_checkpoint_that_is_none_is_refused(fresh, tmp_path, teacher):
    save_model(tmp_path / "model.safetensors", teacher)
    with pytest.raises(CheckpointError, match="is not a run's checkpoint"):
        next(fresh(checkpoint=tmp_path / "model.safetensors")[1])
    with pytest.raises(CheckpointError, match="there is no file"):
        next(fresh(resume_from=tmp_path / "missing.safetensors")[1])
    path = tmp_path / "run.safetensors"
    until(fresh(checkpoint=path)[1], 1)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        next(fresh(checkpoint=path)[1])


class Breakable(nn.Module):
    """A teacher that answers NaN once it is ``broken``."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.broken = inner, False

    def forward(self, x):
        return self.inner(x) * (float("nan") if self.broken else 1.0)


@pytest.mark.parametrize(("kind", "loss"), [("clean", "kd"), ("zskt", "generator")])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(wrn, digits, tmp_path, kind, loss):
    path = tmp_path / "run.safetensors"

    def source():
        if kind == "clean":
            return CleanKD(digits.train_images, digits.train_labels, epochs=2, batch_size=10)
        return zskt(pseudo_batches=8, attention=0)

    teacher, student = Breakable(wrn(seed=1)), wrn(seed=2)
    stream = distill(teacher, student, source(), checkpoint=path, checkpoint_every=2, device="cpu")
    for _ in range(5):
        next(stream)
    teacher.broken = True
    with pytest.raises(
        Diverged, match=rf"step 6\b.*the last good checkpoint is {re.escape(str(path))}"
    ) as caught:
        next(stream)
    state, card = load_state(path)
    assert card["index"] == 4
    assert all(v.isfinite().all() for v in state["student"].values())
    teacher.broken, again = False, wrn(seed=2)
    assert len(list(distill(teacher, again, source(), checkpoint=path, device="cpu"))) == 4
    assert all(v.isfinite().all() for v in again.state_dict().values())
    assert f"'{loss}'" in str(caught.value), "the sentence must name the loss"


@pytest.mark.parametrize("checkpoint", [None, "run.safetensors"])
def test_weights_that_are_not_finite_are_never_handed_on(fresh, digits, tmp_path, checkpoint):
    # the loss of the only step is finite; its update is not
    source = CleanKD(
        digits.train_images, digits.train_labels, epochs=1, batch_size=40, lr=float("inf")
    )
    path = tmp_path / checkpoint if checkpoint else None
    with pytest.raises(Diverged, match=r"step 1\b.*not finite; there is no checkpoint"):
        list(fresh(source, checkpoint=path)[1])
    assert list(tmp_path.iterdir()) == []
