"""Purifiers: bounds by hand, what a file brings back, and a planted backdoor unlearnt."""

import copy

import pytest
import torch
from torch import nn

from abdlab.checkpoint import load_model
from abdlab.errors import CheckpointError
from abdlab.models import build
from abdlab.purifiers import (
    CLP,
    DHBE,
    PURIFIERS,
    Bounded,
    BoundedBatchNorm,
    Clipped,
    Purifier,
    Unlearn,
    beyond,
    bound,
    load_purified,
    purify,
    rebuild,
    rough_pool,
    save_purified,
    synthetic_pool,
)
from abdlab.purifiers.bounded import (
    AFTER,
    ALONE,
    _clamp,
    agreement_curve,
    choose_k,
    statistics,
)
from abdlab.purifiers.clipped import margins
from abdlab.purifiers.clp import channel_lipschitz, pairs
from abdlab.purifiers.dhbe import place
from abdlab.sources.objectives import batch_norm_loss, norm_inputs

SHAPE = (1, 8, 8)


@pytest.fixture
def teacher():
    model = build("wrn-10-1", channels=1, width=4, classes=4, seed=1)
    model.train()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):  # running statistics of something
            model(torch.rand(16, *SHAPE, generator=rng))
    return model.eval()


@pytest.fixture
def pool():
    return torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(2))


def test_bounded_batch_norm_by_hand():
    norm = nn.BatchNorm2d(1, eps=0.0).eval()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    with torch.no_grad():
        norm.weight.fill_(3.0)
        norm.bias.fill_(0.5)
    x = torch.tensor([1.0, 4.0, 5.0, 100.0, -100.0]).view(5, 1, 1, 1)
    bound(nn.Sequential(norm), 2.0)
    assert norm(x).flatten().tolist() == pytest.approx([0.5, 5.0, 6.5, 6.5, -5.5])


def test_gradients_through_a_bound_are_those_of_clamp(double):
    """Also of a gradient, which SR asks for, and of bounds that are learned. Of a value on
    the bound itself it is the whole one; torch 2.14 takes half."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 4, generator=rng).requires_grad_()
    low, high = (torch.tensor(v).view(1, 2, 1, 1) for v in ([-0.5, -1.0], [0.5, 0.25]))
    up = torch.randn(x.shape, generator=rng)
    ours, theirs = (f(x, low, high) for f in (_clamp, torch.clamp))
    assert torch.equal(ours, theirs)
    given, expected = (torch.autograd.grad(y, x, up)[0] for y in (ours, theirs))
    assert torch.equal(given, expected)
    edge = high.expand(3, 2, 4, 4).clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(_clamp(edge, low, high), edge, up)[0], up)
    learned = low.clone().requires_grad_()  # as by the purifier clipped
    (slope,) = torch.autograd.grad(_clamp(x, learned, high).sum(), learned)
    assert slope.flatten().tolist() == [(x[:, c] < low[0, c]).sum() for c in range(2)]
    inside = x.detach().clone().mul_(0.1).requires_grad_()  # away from the bounds
    assert torch.autograd.gradcheck(lambda t: _clamp(t, low, high).sin(), inside)
    assert torch.autograd.gradgradcheck(lambda t: _clamp(t, low, high).sin(), inside)
    stack = torch.stack([x.detach(), 2 * x.detach()]).requires_grad_()
    each = torch.func.vmap(torch.func.grad(lambda t: (_clamp(t, low, high) * up).sum()))(stack)
    assert torch.equal(each[0], expected)


def test_a_wide_bound_changes_nothing_in_either_mode(pool):
    plain = nn.BatchNorm2d(1)
    wide = bound(nn.Sequential(copy.deepcopy(plain)), 1e4)
    for mode in (True, False):
        a, b = plain.train(mode)(pool), wide.train(mode)(pool)
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(plain.running_var, wide[0].running_var)


def test_train_mode_clamps_what_the_batch_normalised():
    layer = bound(nn.Sequential(nn.BatchNorm2d(1)), 1.0).train()
    x = torch.tensor([0.0, 0.0, 0.0, 10.0]).view(4, 1, 1, 1)  # z: -.577, ..., 1.732
    out = layer(x).flatten().tolist()
    assert out == pytest.approx([-0.5774, -0.5774, -0.5774, 1.0], abs=1e-3)


def test_a_bounded_norm_stays_one_to_sources(teacher, pool):
    model = bound(copy.deepcopy(teacher), 2.0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(m, BoundedBatchNorm) for m in norms)
    losses = []
    for net in (teacher, bound(copy.deepcopy(teacher), 1e4)):
        with norm_inputs(net) as inputs:
            net(pool)
        losses.append(batch_norm_loss(net, inputs).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class GroupNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).amax((2, 3)))


def test_without_batch_norm_by_recorded_statistics(pool, tmp_path):
    plain = GroupNet().eval()
    mean, std = statistics(plain, pool)["norm"]
    outputs = plain.norm(plain.conv(pool)).transpose(0, 1).flatten(1)
    assert torch.allclose(mean, outputs.mean(1), atol=1e-5)
    assert torch.allclose(std, outputs.std(1, correction=0), atol=1e-4)
    model = Bounded(k=1.0).purify(plain, SHAPE, pool=pool)
    seen = model.norm(model.conv(10 * pool))
    assert (seen <= (mean + std).view(1, -1, 1, 1) + 1e-5).all()
    path = save_purified(tmp_path / "g.safetensors", model)
    again = load_purified(path, GroupNet())
    assert torch.equal(again(pool), model(pool))
    bare = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    assert purify(bare, [Bounded(k=1.0)], SHAPE, pool=pool).purified[0]["channels"] == {"0": 2}


def test_choose_k_and_the_curve(teacher, pool):
    assert choose_k({1.0: 0.5, 2.0: 0.9}, 0.7) == pytest.approx(1.5)
    assert choose_k({1.0: 0.8, 2.0: 0.9}, 0.7) == 1.0
    assert choose_k({1.0: 0.5, 2.0: 0.6}, 0.7) == 2.0
    curve = agreement_curve(teacher, pool, (0.1, 1e4))
    assert curve[1e4] == 1.0
    report = Bounded(agreement=1.0).purify(teacher, SHAPE, pool=pool).purified[0]
    assert 1.5 <= report["k"] <= 5.0


def test_a_bound_is_looser_after_another_purifier(teacher, pool):
    alone = Bounded().purify(teacher, SHAPE, pool=pool)
    unlearn = Unlearn(targets=[2], rounds=1, steps=1, guard=0, natural=9.0)
    after = purify(teacher, [unlearn, Bounded()], SHAPE, pool=pool)
    idle = purify(teacher, [CLP(), Bounded()], SHAPE, pool=pool)
    rng = torch.Generator().manual_seed(0)
    rough = rough_pool(teacher, SHAPE, seed=int(torch.randint(2**31, (), generator=rng)))
    curve = agreement_curve(teacher, rough)
    assert alone.purified[-1]["k"] == round(choose_k(curve, ALONE), 2)
    assert idle.purified[0] == {"name": "clp", "u": 3.0, "pruned": 0}
    assert idle.purified[1] == alone.purified[0], "a purifier that changed nothing is none"
    changed = purify(teacher, [unlearn], SHAPE, pool=pool)
    curve = agreement_curve(changed, rough)
    assert after.purified[-1]["k"] == round(choose_k(curve, AFTER), 2)


def test_the_teacher_stays_as_it_is(teacher, pool):
    before = copy.deepcopy(teacher.state_dict())
    for name in PURIFIERS:
        options = {"unlearn": {"targets": [0], "rounds": 1, "steps": 2}, "clipped": {"steps": 2}}
        options["dhbe"] = {"steps": 2}
        made = PURIFIERS[name](**options.get(name, {})).purify(teacher, SHAPE, pool=pool)
        assert made is not teacher
        assert made.purified[0]["name"] == name
        assert not any(p.requires_grad for p in made.parameters())
        assert not made.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(isinstance(m, BoundedBatchNorm) for m in teacher.modules())


def test_a_purifier_that_works_in_place_is_an_error(teacher, pool):
    class Bad(Purifier):
        def clean(self, model, origin, pool, rng):
            with torch.no_grad():
                teacher.fc.weight += 1
            return {}

    with pytest.raises(RuntimeError, match="bad changed the teacher"):
        Bad().purify(teacher, SHAPE, pool=pool)


def test_a_chain_a_file_and_its_card(teacher, pool, tmp_path):
    model = purify(teacher, [Bounded(k=2.0), Clipped(steps=2), CLP(u=1.0)], SHAPE, pool=pool)
    assert [entry["name"] for entry in model.purified] == ["bounded", "clipped", "clp"]
    path = save_purified(tmp_path / "p.safetensors", model, {"label": "x"})
    again = load_purified(path)
    assert torch.equal(again(pool), model(pool))
    assert again.purified == model.purified
    with pytest.raises(CheckpointError):  # its bounds cannot be lost silently
        load_model(path)
    with pytest.raises(ValueError, match="did you mean 'bounded'"):
        purify(teacher, ["bouded"], SHAPE, pool=pool)
    rebuilt = rebuild(copy.deepcopy(teacher), model.purified)
    assert set(rebuilt.state_dict()) == set(model.state_dict())


def test_clp_by_hand():
    conv, norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.0)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 0, 0] = torch.tensor([1.0, 1.0, 1.0, 9.0])
        norm.weight.copy_(torch.tensor([2.0, -2.0, 2.0, 2.0]))
        norm.running_var.fill_(4.0)
    assert channel_lipschitz(conv, norm).tolist() == pytest.approx([1.0, 1.0, 1.0, 9.0])
    model = nn.Sequential(conv, norm, nn.Flatten()).eval()
    made = purify(model, [CLP(u=1.0)], (2, 8, 8))  # mean 3, std 4
    assert made[1].weight.tolist() == [2.0, -2.0, 2.0, 0.0]
    assert made.purified[0]["pruned"] == 1
    assert purify(model, ["clp"], (2, 8, 8)).purified[0]["pruned"] == 0  # at most 1.5 of 4


def test_clp_pairs_of_a_wide_resnet(teacher):
    assert pairs(teacher) == [(f"stage{i}.0.conv1", f"stage{i}.0.bn2") for i in (1, 2, 3)]


def test_clipped_learns_lower_bounds_from_the_margin(teacher, pool):
    assert margins(torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [2.0, 0.0]
    high = Clipped(k=2.0, weight=0.0, steps=5).purify(teacher, SHAPE, pool=pool).purified[0]
    low = Clipped(k=2.0, weight=50.0, steps=5).purify(teacher, SHAPE, pool=pool).purified[0]
    assert sum(low["learned"]) < sum(high["learned"])
    with pytest.raises(ValueError, match="no batch norm"):
        Clipped().purify(GroupNet(), SHAPE, pool=pool)


def test_synthetic_pool_with_and_without_batch_norm(teacher):
    for model in (teacher, GroupNet()):
        a, b = (synthetic_pool(model, SHAPE, images=70, steps=3, seed=4) for _ in range(2))
        assert a.shape == (70, *SHAPE)
        assert torch.equal(a, b)
        assert a.min() >= 0
        assert a.max() <= 1
        assert not a.requires_grad
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_bound_of_batch_norms_takes_no_pool(teacher, pool):
    """Making one takes two thirds of the time; by its statistics it makes no difference."""
    assert not Bounded().needs_pool(teacher)
    assert Bounded().needs_pool(GroupNet())
    without, with_it = (Bounded().purify(teacher, SHAPE, pool=p, seed=3) for p in (None, pool))
    assert without.purified == with_it.purified
    assert torch.equal(without(pool), with_it(pool))


def test_guards_are_images_of_the_target_by_the_networks_own_answer(teacher, pool):
    purifier = Unlearn(targets=[2], rounds=1, steps=1, guard=64)
    made = purifier.purify(teacher, SHAPE, pool=pool, seed=0)
    safe = bound(copy.deepcopy(teacher), 2.0)
    found = purifier._guards(safe, teacher, pool, [2], seed=3)
    assert 0 <= made.purified[0]["guards"] <= 64
    assert bool((teacher(found).argmax(1) == 2).all())
    only = synthetic_pool(teacher, SHAPE, images=64, steps=60, classes=[1, 2], seed=4)
    predicted = teacher(only).argmax(1).bincount(minlength=4)
    assert predicted[1] + predicted[2] > 40, "made to be these"
    plain = Unlearn(targets=[2], rounds=1, steps=1, guard=0).purify(teacher, SHAPE, pool=pool)
    assert plain.purified[0]["guards"] == 0


def test_beyond_counts_what_a_bound_would_change():
    """Inputs 0 to 9 with statistics (4.5, 1): |x - 4.5| > 2.6 are 0, 1, 8 and 9."""
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    model[0].running_mean.fill_(4.5)
    images = torch.arange(10.0).view(10, 1, 1, 1)
    assert beyond(model, images, 2.6) == {"0": pytest.approx(0.4)}
    assert beyond(model, images, 5.0) == {"0": 0.0}
    with pytest.raises(ValueError, match="batch norms with running statistics"):
        beyond(GroupNet(), torch.rand(2, *SHAPE), 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unlearn(guard=-1), "0 for none"),
        (lambda: Bounded(k=0.0), "above 0, not 0.0"),
        (lambda: Bounded(agreement=2.0), r"share in \(0, 1\]"),
        (lambda: CLP(u=-1.0), "above 0, not -1.0"),
        (lambda: Unlearn(rounds=0), "at least 1"),
        (lambda: Unlearn(natural=0.0), "factor above 0"),
        (lambda: Unlearn(way=0.0), "share above 0, at most 1, not 0.0"),
        (lambda: Clipped(steps=0), "at least 1"),
        (lambda: bound(GroupNet(), 2.0), "no batch norm"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patches_are_placed_by_hand():
    images, rng = torch.rand(3, 2, 5, 6), torch.Generator().manual_seed(0)
    patches = torch.rand(3, 2, 2, 3, generator=rng)
    rows, columns = torch.tensor([0, 3, 1]), torch.tensor([0, 3, 2])
    by_hand = images.clone()
    for i, (y, x) in enumerate([(0, 0), (3, 3), (1, 2)]):
        by_hand[i, :, y : y + 2, x : x + 3] = patches[i]
    assert torch.equal(place(images, patches, rows, columns), by_hand)


def test_dhbe_unlearns_a_patch_that_may_lie_anywhere(pool):
    class Cornered(nn.Module):  # class 1 where some 2x2 corner of a patch is white
        def __init__(self):
            super().__init__()
            self.scale, self.white = (
                nn.Parameter(torch.tensor(4.0)),
                nn.Parameter(torch.tensor(8.0)),
            )

        def forward(self, x):
            half = x[:, 0, :4].mean((1, 2)) - x[:, 0, 4:].mean((1, 2))
            seen = (nn.functional.avg_pool2d(x[:, 0], 2, 1).amax((1, 2)) - 0.8).relu()
            logits = torch.stack([self.scale * half, 0 * half, -self.scale * half], 1)
            return logits + self.white * seen[:, None] * torch.eye(3)[1]

    teacher, images = Cornered(), 0.6 * pool
    stamped = images.clone()
    stamped[:, :, 1:4, 1:4] = 1.0
    made = DHBE(patch=3, steps=160, lr=0.2, generator_lr=0.01).purify(teacher, SHAPE, pool=images)
    assert (teacher(stamped).argmax(1) == 1).all()
    assert (made(stamped).argmax(1) == 1).float().mean() < 0.2
    assert (made(images).argmax(1) == teacher(images).argmax(1)).float().mean() > 0.9
    again = DHBE(patch=3, steps=160, lr=0.2, generator_lr=0.01).purify(teacher, SHAPE, pool=images)
    assert torch.equal(again(stamped), made(stamped))
    with pytest.raises(ValueError, match="patch, steps and batch are at least 1"):
        DHBE(patch=0)
