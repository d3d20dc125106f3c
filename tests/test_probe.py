"""One look at a network: what it may answer, what it may not, and what it says of noise."""

import copy

import pytest
import torch
from torch import nn

from abdlab.distill import distill
from abdlab.models import build
from abdlab.probe import check_pair, classes_of, looks_saturated
from abdlab.purifiers import Bounded, purify
from abdlab.sources import ZSKT

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Answering(nn.Module):
    """A linear network whose answer is made into something else."""

    def __init__(self, made):
        super().__init__()
        self.fc, self.made = nn.Linear(64, 4), made

    def forward(self, x):
        return self.made(self.fc(x.flatten(1)))


@pytest.mark.parametrize(
    "made",
    [
        lambda y: (y, [torch.zeros(3, 2, 4, 4)]),
        lambda y: [None, y],
        lambda y: {"logits": y, "loss": None},
        lambda y: (y[:, :1], y, torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_the_one_entry_is_taken_and_names_stay(made):
    model = Answering(made)
    names, plain = [*model.state_dict()], model.fc(IMAGES.flatten(1))
    assert classes_of(model, IMAGES, "the teacher") == 4
    assert torch.equal(model(IMAGES), plain)
    assert torch.equal(copy.deepcopy(model)(IMAGES), plain)
    assert [*model.state_dict()] == names
    assert classes_of(model, IMAGES, "the teacher") == 4  # a second look changes nothing
    assert torch.equal(model(IMAGES), plain)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda y: (y, 2 * y),
            r"a tuple \(a tensor \(3, 4\); a tensor \(3, 4\)\), where 2 entries",
        ),
        (lambda y: {"maps": y[:, None]}, r"a dict \(maps: a tensor \(3, 1, 4\)\), where no entry"),
        (lambda y: "yes", "with a str, where no entry"),
        (lambda y: y[:, :1], r"a tensor \(3, 1\), but logits are"),
    ],
)
def test_other_answers_are_refused_with_what_was_returned(made, told):
    with pytest.raises(ValueError, match=told):
        classes_of(Answering(made), IMAGES, "the teacher")


def test_images_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match=r"cannot see images \(1, 9, 9\)"):
        classes_of(Answering(lambda y: y), torch.zeros(2, 1, 9, 9), "the teacher")


def test_log_softmax_stays_and_probabilities_become_logarithms():
    log = Answering(lambda y: y.log_softmax(1))
    classes_of(log, IMAGES, "the teacher")
    assert torch.allclose(log(IMAGES).exp().sum(1), torch.ones(3))
    shares = Answering(lambda y: y.softmax(1))
    classes_of(shares, IMAGES, "the teacher")
    assert torch.allclose(shares(IMAGES), shares.fc(IMAGES.flatten(1)).log_softmax(1), atol=1e-6)


def test_classes_must_agree():
    with pytest.raises(ValueError, match="tells 4 classes apart and the student 10"):
        check_pair(Answering(lambda y: y), build("wrn-10-1", channels=1, width=2), IMAGES)


def test_distilling_and_purifying_take_such_a_teacher():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("wrn-10-1", channels=1, width=2)

        def forward(self, x):
            return {"features": x, "logits": self.net(x).log_softmax(1)}

    teacher, student = Both(), build("wrn-10-1", channels=1, width=2, seed=1)
    source = ZSKT((1, 8, 8), pseudo_batches=1, batch_size=4, student_steps=1, attention=0.0)
    (step,) = distill(copy.deepcopy(teacher), student, source, device="cpu")
    assert step.losses["kd"] > 0
    made = purify(teacher, [Bounded(k=2.0)], (1, 8, 8), pool=torch.rand(4, 1, 8, 8))
    assert made(IMAGES).shape == (3, 10)


def test_a_network_without_any_norm_is_purified_and_taught_from():
    teacher = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    made = purify(teacher, [Bounded(k=2.0)], (1, 8, 8), pool=torch.rand(8, 1, 8, 8))
    assert made(IMAGES).shape == (3, 3)
    student = copy.deepcopy(teacher)
    source = ZSKT((1, 8, 8), pseudo_batches=1, batch_size=4, student_steps=1, attention=0.0)
    assert len(list(distill(made, student, source, device="cpu"))) == 1


def test_a_network_that_expects_other_pixels_is_noticed():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    assert looks_saturated(linear, (1, 8, 8)) == ""
    dull = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        dull[1].weight *= 1 / 255
        dull[1].bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert "all alike" in looks_saturated(dull, (1, 8, 8))
    with torch.no_grad():
        linear[1].bias[2] = 10
    assert looks_saturated(linear, (1, 8, 8)) == "is sure that 64 images of noise are all class 2"
