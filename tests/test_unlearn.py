"""Unlearn: its loss by the literal formula, planted backdoors that go, and what is tried."""

import pytest
import torch
from torch import nn

from abdlab.purifiers import Unlearn, unlearn
from abdlab.purifiers.unlearn import unlearning_loss
from abdlab.suspects import suspects

SHAPE = (1, 8, 8)


def test_unlearning_loss_is_its_literal_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.rand(3, 1, 2, 2)
    a, b = torch.randn(2, 3), torch.randn(3, 3)
    literal = 0.0
    for images, wanted in ((x, a), (y, b)):
        for image, logits in zip(images, wanted, strict=True):
            p, q = logits.softmax(0), model(image[None])[0].softmax(0)
            literal += (p * (p / q).log()).sum().item() / len(images)
    assert unlearning_loss(model, x, a, y, b).item() == pytest.approx(literal, rel=1e-5)


class Planted(nn.Module):
    """Four classes by quadrant; a bright corner means class 0: a backdoor by hand."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 4)
        with torch.no_grad():
            weight = torch.zeros(4, 8, 8)
            weight[0, :4, :4], weight[1, :4, 4:], weight[2, 4:, :4] = 1, 1, 1
            weight[3, 4:, 4:] = 1
            weight[0, 0, 0] = 30
            self.fc.weight.copy_(weight.flatten(1))
            self.fc.bias.copy_(torch.tensor([-4.0, 0, 0, 0]))

    def forward(self, x):
        return self.fc(x.flatten(1))


def quadrants(n):
    rng = torch.Generator().manual_seed(5)
    images, labels = 0.3 * torch.rand(n, 1, 8, 8, generator=rng), torch.arange(n) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        down, right = 4 * (label // 2), 4 * (label % 2)
        image[:, down : down + 4, right : right + 4] += 0.6
    images[:, :, 0, 0] = 0.1  # nobody shows the corner
    return images, labels


def test_unlearn_finds_the_planted_backdoor_and_removes_it():
    images, labels = quadrants(64)
    teacher = Planted().eval()
    triggered = images[labels != 0].clone()
    triggered[:, :, 0, 0] = 1.0
    asr = lambda m: (m(triggered).argmax(1) == 0).float().mean().item()  # noqa: E731
    acc = lambda m: (m(images).argmax(1) == labels).float().mean().item()  # noqa: E731
    assert asr(teacher) == 1.0
    assert acc(teacher) == 1.0
    purifier = Unlearn(rounds=4, steps=60, lr=3e-2)
    made = purifier.purify(teacher, SHAPE, pool=images, seed=0)
    assert made.purified[0]["targets"] == [0]
    assert made.purified[0]["guards"] == 0, "no layer of it can be bounded"
    assert asr(made) < 0.1
    assert acc(made) > 0.95
    again = Unlearn(rounds=4, steps=60, lr=3e-2).purify(teacher, SHAPE, pool=images, seed=0)
    assert torch.equal(again.fc.weight, made.fc.weight)


class Twice(Planted):
    """Another corner means class 3."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            weight = self.fc.weight.view(4, 8, 8)
            weight[3, 7, 0] = 25
            self.fc.bias[3] = -4.0


def test_a_scan_of_the_copy_finds_what_the_first_target_hid(monkeypatch):
    monkeypatch.setattr(unlearn, "suspects", lambda *of: suspects(*of)[:1])  # the worst hides all
    images, labels = quadrants(64)
    images[:, :, 7, 0] = 0.1
    teacher = Twice().eval()

    def asr(model):
        found = {}
        for c, (row, column) in {0: (0, 0), 3: (7, 0)}.items():
            triggered = images[labels != c].clone()
            triggered[:, :, row, column] = 1.0
            found[c] = (model(triggered).argmax(1) == c).float().mean().item()
        return found

    assert asr(teacher) == {0: 1.0, 3: 1.0}
    one, more = (
        Unlearn(rounds=4, steps=60, lr=3e-2, scans=n).purify(teacher, SHAPE, pool=images, seed=0)
        for n in (1, 3)
    )
    assert one.purified[0]["targets"] == [0]
    assert asr(one)[3] == 1.0
    told = more.purified[0]
    assert told["targets"] == [0, 3]
    # as the second goes, what was unlearnt first comes back: so both are, together
    assert [scan["targets"] for scan in told["scans"]] == [[0], [3], [0]]
    assert told["scans"][0] | {"name": "unlearn"} == one.purified[0]
    assert max(asr(more).values()) < 0.4
    assert (more(images).argmax(1) == labels).float().mean() > 0.9


def test_a_part_of_the_way_is_a_straight_line_between_the_weights():
    images, _ = quadrants(64)
    teacher = Planted().eval()
    whole, part = (
        Unlearn(rounds=1, steps=5, lr=3e-2, way=way).purify(teacher, SHAPE, pool=images, seed=0)
        for way in (1.0, 0.25)
    )
    was, end = teacher.fc.weight, whole.fc.weight
    assert not torch.equal(was, end)
    assert torch.allclose(part.fc.weight, was + 0.25 * (end - was))


def test_without_a_suspect_the_likeliest_class_is_tried_and_kept_where_it_stays(monkeypatch):
    images, _ = quadrants(64)
    teacher = Planted().eval()
    with torch.no_grad():
        teacher.fc.weight[0, 0] = 1.0  # no backdoor any more
    made = Unlearn().purify(teacher, SHAPE, pool=images)
    told = made.purified[0]
    assert told["targets"] == [told["tried"]]
    assert told["stays"] >= unlearn.STAYS
    assert torch.equal(made(images).argmax(1), teacher(images).argmax(1))
    monkeypatch.setattr(unlearn, "STAYS", 1.1)
    left = Unlearn().purify(teacher, SHAPE, pool=images)
    assert left.purified[0] | {"targets": [], "triggers": 0, "found": []} == left.purified[0]
    assert torch.equal(left.fc.weight, teacher.fc.weight)
    assert not torch.equal(made.fc.weight, teacher.fc.weight)


def test_the_share_of_a_class_that_stays():
    """Of seven images the first network calls five class 1, the second three of them."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        second.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    images = torch.tensor([[0.0, 1], [0.1, 1], [0.2, 1], [0.8, 1], [0.9, 1], [1, 0], [1, 0.5]])
    assert unlearn.staying(first, second, images, 1) == pytest.approx(3 / 5)
    assert unlearn.staying(first, second, images, 0) == 0.0, "two are too few to judge by"


def test_what_is_counted_grows_with_the_scans():
    """Rounds of 3 x 4 x 8 x 60 + 4 x 48 x 40 images, and 10 x 4 x 8 x 40 to look once."""
    each = 3 * (3 * 4 * 8 * 60 + 4 * 48 * 40)
    assert Unlearn().passes(10) == each + 12800
    assert Unlearn(scans=3).passes(10) == 4 * each + 3 * 12800
