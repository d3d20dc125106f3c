"""What a run settles before its first step: who made its checkpoint, whose random numbers
its modules draw, whether the networks' answers fit together.
"""

import re

import pytest
import torch
from torch import nn

from abdlab import DFQ, ZSKT, CheckpointError, SelfRetrospection, distill
from abdlab.models import seeded

SIZES = {"batch_size": 8, "width": 2, "z": 4}


def source(**more):
    return ZSKT((1, 8, 8), **{"pseudo_batches": 4, "student_steps": 1, **SIZES, **more})


def run(teacher, student, *, source=None, **more):
    return distill(teacher, student, source or globals()["source"](), device="cpu", **more)


def weights(model):
    return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])


# --- a checkpoint knows what made it


def nudged(model):
    with torch.no_grad():
        next(model.buffers()).add_(1e-3)  # a running mean is part of a teacher, too
    return model


@pytest.mark.parametrize("steps", [2, 4], ids=["half-way", "finished"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": 5}, "teacher was '"),
        ({"teacher": nudged}, "teacher was '"),
        ({"source": {"student_lr": 0.01}}, "zskt.student_lr was 0.002 and is 0.01"),
        ({"source": {"batch_size": 9}}, "zskt.batch_size was 8 and is 9"),
        ({"source": {"temperature": 2.0}}, "zskt.temperature was 1.0 and is 2.0"),
        ({"defenses": []}, "sr was there and is absent"),
        ({"defenses": [SelfRetrospection(start=0.5, fraction=0.5)]}, "sr.fraction was 1.0 and is"),
        ({"defenses": [SelfRetrospection(start=0.25)]}, "sr.start was 0.5 and is 0.25"),
        ({"precision": "bf16"}, "precision was 'float32' and is 'bf16'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(wrn, tmp_path, steps, change, told):
    path, sr = tmp_path / "run.safetensors", lambda: SelfRetrospection(start=0.5)
    stream = run(wrn(seed=1), wrn(seed=2), defenses=[sr()], checkpoint=path)
    for _ in range(steps):
        next(stream)
    stream.close()
    teacher = change.get("teacher", 1)
    teacher = nudged(wrn(seed=1)) if teacher is nudged else wrn(seed=teacher)
    more = {"defenses": change.get("defenses", [sr()])}
    more |= {"precision": change.get("precision", "float32")}
    student = wrn(seed=2)
    before = weights(student)
    changed = source(**change.get("source", {}))
    again = run(teacher, student, source=changed, checkpoint=path, **more)
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        next(again)
    assert "branch from this one with resume_from" in str(caught.value)
    assert torch.equal(weights(student), before), "nothing is trained"


def test_a_finished_run_is_handed_back_with_a_word_and_a_branch_is_taken_on_purpose(wrn, tmp_path):
    path = tmp_path / "run.safetensors"
    first = wrn(seed=2)
    list(run(wrn(seed=1), first, checkpoint=path))
    again = wrn(seed=2)
    (step,) = run(wrn(seed=1), again, checkpoint=path)
    assert torch.equal(weights(again), weights(first))
    assert "is finished: the student is handed back, and nothing is trained" in step.events[0]
    stream = run(wrn(seed=1), wrn(seed=2), checkpoint=tmp_path / "trunk.safetensors")
    next(stream), stream.close()
    more = {"checkpoint": tmp_path / "branch.safetensors"}
    branch = run(wrn(seed=5), wrn(seed=2), resume_from=tmp_path / "trunk.safetensors", **more)
    assert [step.index for step in branch] == [2, 3, 4]


# --- random numbers of the networks' own modules


class Noisy(nn.Module):
    """Adds noise to what it sees in training, by torch's global generator."""

    def forward(self, x):
        return x + 0.3 * torch.randn_like(x) if self.training else x


def drawing(kind):
    """A student whose modules draw random numbers."""
    made = {
        "dropout": lambda: nn.Dropout(0.3),
        "rrelu": nn.RReLU,
        "noise": Noisy,
        "alpha": lambda: nn.AlphaDropout(0.2),
    }
    with seeded(2):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), made[kind](), nn.Flatten(), nn.Linear(144, 10)
        )


@pytest.mark.parametrize("kind", ["dropout", "rrelu", "noise", "alpha"])
def test_what_modules_draw_comes_from_the_runs_own_state(wrn, tmp_path, kind):
    """Neither where the global generator stands nor a stop changes a number; and the
    global one is where it was.
    """

    def trained(seed=0, stop=None, name=None):
        student, more = drawing(kind), {"seed": seed, "source": source(attention=0)}
        more |= {"checkpoint": tmp_path / name} if name else {}
        for step in (stream := run(wrn(seed=1), student, **more)):
            torch.rand(3)  # the user's own numbers, between two steps
            if step.index == stop:
                break
        stream.close()
        return weights(student)

    torch.manual_seed(11)
    whole = trained()
    torch.manual_seed(12)
    before = torch.get_rng_state()
    stream = run(wrn(seed=1), drawing(kind), source=source(attention=0))
    next(stream), stream.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trained(), whole)
    for stop in (1, 3):
        trained(stop=stop, name=f"{stop}.safetensors")
        torch.manual_seed(stop)
        assert torch.equal(trained(name=f"{stop}.safetensors"), whole)
    assert not torch.equal(trained(seed=1), whole)


# --- answers that would broadcast


class Answers(nn.Module):
    """A network whose answer has another shape than (N, classes)."""

    def __init__(self, classes=10, shape=lambda x: x):
        super().__init__()
        self.layer, self.shape = nn.Linear(64, classes), shape

    def forward(self, x):
        return self.shape(self.layer(x.flatten(1)))


SPATIAL = {"shape": lambda x: x[:, :, None, None]}
COLUMN = {"shape": lambda x: x[:, :1].squeeze(1)}
BATCHLESS = {"shape": lambda x: x[:1]}
FEATURES = {"shape": lambda x: (x, x)}
NAMED = {"shape": lambda x: {"logits": x, "aux": x}}


@pytest.mark.parametrize(
    ("teacher", "student", "told"),
    [
        ({"classes": 1}, {}, r"the teacher answers 2 images with a tensor (2, 1)"),
        ({}, {"classes": 1}, r"the student answers 2 images with a tensor (2, 1)"),
        ({"classes": 1}, {"classes": 1}, "with 2 classes or more"),
        ({}, SPATIAL, "the student answers 2 images with a tensor (2, 10, 1, 1)"),
        (SPATIAL, SPATIAL, "the teacher answers 2 images with a tensor (2, 10, 1, 1)"),
        (COLUMN, {}, "the teacher answers 2 images with a tensor (2,)"),
        (BATCHLESS, {}, "the teacher answers 2 images with a tensor (1, 10)"),
        (FEATURES, {}, "the teacher answers 2 images with a tuple"),
        ({}, NAMED, "the student answers 2 images with a dict"),
        ({"classes": 7}, {}, "the teacher tells 7 classes apart and the student 10"),
        ({"classes": 11}, {}, "the teacher tells 11 classes apart and the student 10"),
    ],
)
@pytest.mark.parametrize("made", [source, lambda **more: DFQ((1, 8, 8), **SIZES, **more)])
def test_answers_that_do_not_fit_together_stop_a_run_before_it(made, teacher, student, told):
    teacher, student = Answers(**teacher), Answers(**student)
    before = weights(student)
    more = {"attention": 0} if made is source else {}
    with pytest.raises(ValueError, match=re.escape(told)):
        next(run(teacher, student, source=made(**more)))
    assert torch.equal(weights(student), before)
