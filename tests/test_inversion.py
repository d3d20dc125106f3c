"""Inverted triggers: each family by hand, the batch against one at a time, suspects."""

import math

import pytest
import torch
from torch import nn

from abdlab.inversion import (
    FAMILIES,
    Bank,
    Inverted,
    costs,
    invert,
    leads,
    low_cosines,
    outlier_index,
)
from abdlab.suspects import gamma_scores, suspects, suspicion


class Corner(nn.Module):
    """Three classes; a bright top left pixel means class 2, however the rest looks."""

    def forward(self, x):
        bright = 40 * (x[:, 0, 0, 0] - 0.75)
        return torch.stack([x[:, 0, 2:].mean((1, 2)), x[:, 0, :, 2:].mean((1, 2)), bright], 1)


@pytest.fixture
def images():
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, 0] *= 0.5
    return images


def test_families_by_hand():
    x = torch.full((1, 1, 1, 4, 4), 0.5)
    half = torch.zeros(1, 1, 4, 4)  # a logit of 0 is one half
    bright = torch.full((1, 1, 4, 4), 100.0)
    assert torch.allclose(FAMILIES["stamp"].put(x, [half, bright]), torch.tensor(0.75))
    assert FAMILIES["stamp"].size([half, bright]).tolist() == [0.5]
    assert torch.allclose(
        FAMILIES["blend"].put(x, [half[:, :, :1, :1], bright]), torch.tensor(0.75)
    )
    assert FAMILIES["blend"].size([half[:, :, :1, :1], bright]).tolist() == [0.5]
    delta = torch.full((1, 1, 4, 4), 0.7)
    assert torch.equal(FAMILIES["additive"].put(x, [delta]), torch.ones_like(x))  # clamped
    assert FAMILIES["additive"].size([delta]).item() == pytest.approx(0.7)
    # the first cosine is constant: 1 / sqrt(4 x 4) in each pixel
    waves = torch.zeros(1, 1, len(low_cosines(4, 4)))
    waves[..., 0] = 1.0
    values = [waves, torch.empty(1, 0, 4, 4)]
    assert torch.allclose(FAMILIES["frequency"].put(x, values), torch.tensor(0.75))
    assert FAMILIES["frequency"].size(values).item() == pytest.approx(0.25)


def test_cosines_are_orthonormal_and_low():
    basis = low_cosines(16, 16).flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-5)
    assert len(basis) == 28  # u + v <= 6
    assert len(low_cosines(32, 32)) == 91  # u + v <= 12


def test_invert_finds_the_corner_and_costs_mark_its_class(images):
    table, bank = costs(Corner(), images, families=["stamp", "additive"], steps=60)
    assert table.shape == (3, 2)
    assert len(bank) == 6
    assert [(t.target, t.family) for t in bank][:3] == [(0, "stamp"), (0, "additive"), (1, "stamp")]
    trigger = bank.of(2).triggers[0]
    assert (Corner()(trigger(images)).argmax(1) == 2).float().mean() > 0.9
    mask = trigger.values[0].sigmoid()[0, 0]
    assert mask.argmax() == 0
    assert mask[0, 0] > 0.8


def test_cost_is_cross_entropy_plus_penalty(images):
    (found,) = invert(Corner(), images, [2], families=["stamp"], steps=1, batch=5, seed=3)
    # one step: the cost is that of the start, of which the update is known, not the value
    again = invert(Corner(), images, [2], families=["stamp"], steps=1, batch=5, seed=3)
    assert found.cost == again.triggers[0].cost
    rng = torch.Generator().manual_seed(3)
    mask = torch.randn(1, 1, 4, 4, generator=rng) * 0.5 - 1
    pattern = torch.randn(1, 1, 4, 4, generator=rng) * 0.5
    chosen = images[torch.randint(40, (5,), generator=rng)]
    m = mask.sigmoid()
    logits = Corner()((1 - m) * chosen + m * pattern.sigmoid())
    literal = sum(-torch.log(row.softmax(0)[2]) for row in logits) / 5 + 12 * m.mean()
    assert found.cost == pytest.approx(literal.item(), rel=1e-5)


def test_images_of_the_target_are_not_used(images):
    images[:20, :, 0, 0] = 1.0
    seen = []

    class Watched(Corner):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    invert(Watched(), images, [2], families=["additive"], steps=2, batch=8)
    assert seen[-1].shape[0] == 8
    assert (seen[-1][:, 0, 0, 0] < 0.75).all()
    with pytest.raises(ValueError, match="class 2 already"):
        invert(Corner(), images[:20], [2])


def test_same_seed_same_triggers_and_the_model_is_left_alone(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).train()
    nn.init.normal_(model[1].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    banks = [invert(model, images, [0, 1], steps=5, seed=1) for _ in range(2)]
    for a, b in zip(*banks, strict=True):
        assert a.cost == b.cost
        assert all(map(torch.equal, a.values, b.values))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_warm_triggers_come_last_and_go_on(images):
    bank = invert(Corner(), images, [2], families=["stamp"], steps=40)
    more = invert(Corner(), images, [1], families=["additive"], steps=1, warm=bank)
    assert [(t.family, t.target) for t in more] == [("additive", 1), ("stamp", 2)]
    assert (more.triggers[1].values[0] - bank.triggers[0].values[0]).abs().max() < 0.31


def test_bank_round_trip_and_mixing(images):
    bank = invert(Corner(), images, [0, 2], families=["stamp", "frequency"], steps=2)
    again = Bank.from_state(bank.state())
    rng = torch.Generator().manual_seed(0)
    one, two = bank.on(images, rng), again.on(images, torch.Generator().manual_seed(0))
    assert torch.equal(one, two)
    assert bank.targets == [0, 2]
    each = torch.stack([t(images) for t in bank])
    assert ((each - one).abs().amax((2, 3, 4)).amin(0) == 0).all()  # each image has one of them
    assert len(bank.of(2)) == 2
    assert len(bank.latest(3)) == 3
    assert len(bank + again) == 8
    with pytest.raises(ValueError, match="empty bank"):
        Bank().on(images, rng)


def test_leads_and_the_outlier_index_by_hand():
    rows = [[1.0, 4.0, 1.0, 9.0], [2.0, 1.0, 1.0, 9.0], [2.0, 2.0, 2.0, 1.0], [4.0, 8.0, 8.0, 1.0]]
    table = torch.tensor(rows)
    own = leads(table) / math.log(2)
    assert torch.allclose(own[:, 0], torch.tensor([4 / 3, 0.0, 0.0, -4 / 3]))
    assert torch.allclose(own[:, 1], torch.tensor([-2 / 3, 2.0, 2 / 3, -2.0]))
    assert torch.allclose(leads(table, rivals=1)[:, 0], torch.tensor([1, -1, -1, -2]) * math.log(2))
    # of class 0: the two largest leads of stamp, additive and blend, each in its scale
    by_hand = math.log(2) * (4 / 3 / 0.52 + float(own[0, 2]) / 0.43) / 2
    assert outlier_index(table)[0] == pytest.approx(by_hand)
    assert torch.allclose(outlier_index(table * 7), outlier_index(table), atol=1e-5)


@pytest.fixture
def clean():
    return torch.tensor([3.0, 3.3, 3.6, 4.0])[:, None].repeat(1, 4), torch.ones(4)


def test_a_class_that_is_cheap_in_one_family_alone_is_no_suspect(clean):
    table, margins = clean
    table[2, 0] = 1.4
    assert suspects(table, margins) == []
    table[2, 1] = 1.4
    assert suspects(table, margins) == [2]


def test_a_margin_that_wins_by_far_adds_to_the_costs(clean):
    table, margins = clean
    table[2] = 2.2
    assert suspects(table, margins) == []
    margins[2] = 40.0
    assert suspects(table, margins) == [2]
    both = outlier_index(table) + 0.5 * gamma_scores(margins).clamp_min(0.1).log10()
    assert torch.allclose(suspicion(table, margins), both)


def test_suspects_none_one_and_two(clean):
    table, margins = clean
    assert suspects(table, margins) == []
    table[2] = 0.5
    assert suspects(table, margins) == [2]
    table[3] = 0.6  # two targets: neither is far below the other
    assert suspects(table, margins) == [2, 3]


def test_stamps_are_put_on_stronger_and_nothing_else_is(images):
    bank = invert(Corner(), images, [0], families=["stamp", "additive"], starts=1, steps=2)
    rng = torch.Generator().manual_seed(3)
    strong = bank.on(images, rng, strength=3.0)
    rng.manual_seed(3)
    which = torch.randint(2, (len(images),), generator=rng)
    factors = 1 + 2 * torch.rand(len(images), 1, 1, 1, generator=rng)
    stamp, additive = bank
    by_hand = (images + factors * (stamp(images) - images)).clamp(0, 1)
    by_hand = torch.where(which.view(-1, 1, 1, 1) == 0, by_hand, additive(images))
    assert torch.allclose(strong, by_hand, atol=1e-6)
    assert 0 <= strong.min() <= strong.max() <= 1


def test_unknown_family(images):
    with pytest.raises(ValueError, match="did you mean 'stamp'"):
        invert(Corner(), images, [0], families=["stamps"])


def test_a_trigger_is_a_function_of_any_batch(images):
    values = (torch.full((1, 1, 4, 4), 0.25),)
    trigger = Inverted("additive", 0, values, 1.0, 0.25)
    assert torch.allclose(trigger(torch.zeros(3, 1, 4, 4)), torch.full((3, 1, 4, 4), 0.25))
