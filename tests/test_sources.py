"""ZSKT and clean KD: losses against the literal formulas and by hand, and what a
pseudo-batch may touch.
"""

import copy
import math

import literal
import pytest
import torch
from torch import nn

from abdlab import ZSKT, CleanKD, distill
from abdlab.losses import attention, attention_loss, kl
from abdlab.sources.generator import Generator

CPU = torch.device("cpu")


def started(source, teacher, student, seed=0):
    source.start(teacher.requires_grad_(False), student.train(), CPU, seed)
    return source


def small_zskt(**settings):
    return ZSKT(
        (1, 8, 8),
        **{
            "pseudo_batches": 4,
            "batch_size": 6,
            "student_steps": 2,
            "z": 5,
            "width": 3,
            **settings,
        },
    )


def test_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3
    p, q = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert kl(p, p).item() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 6.0])
def test_kl_equals_literal(temperature):
    p, q = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([literal.kl(a, b, temperature) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(kl(p, q, temperature), expected)


def test_attention_by_hand():
    # squares (3, 4) and (4, 3) have norm 5: maps (.6, .8) and (.8, .6); squared
    # differences .04 and .04, mean .04
    student = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)
    teacher = torch.tensor([4.0, 3.0]).sqrt().view(1, 1, 1, 2)
    torch.testing.assert_close(attention(student), torch.tensor([[0.6, 0.8]]))
    assert attention_loss(student, teacher).item() == pytest.approx(0.04, rel=1e-5)
    # two channels with squares (6, 0) and (0, 8): their mean is (3, 4) again
    two = torch.tensor([[6.0, 0.0], [0.0, 8.0]]).sqrt().view(1, 2, 1, 2)
    assert attention_loss(two, teacher).item() == pytest.approx(0.04, rel=1e-5)


def test_attention_equals_literal():
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, 3, 5, dtype=torch.float64, generator=rng)
    teacher = torch.randn(3, 2, 3, 5, dtype=torch.float64, generator=rng)
    maps = torch.stack([torch.stack(literal.attention_map(f)) for f in student])
    torch.testing.assert_close(attention(student), maps)
    torch.testing.assert_close(
        attention_loss(student, teacher), literal.attention_transfer(student, teacher)
    )


def test_a_dead_attention_map_sends_a_finite_gradient():
    dead = torch.full((1, 2, 2, 2), 1e-12, requires_grad=True)
    attention_loss(dead, torch.ones(1, 2, 2, 2)).backward()
    assert dead.grad.isfinite().all()
    assert dead.grad.abs().max() < 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_zskt_losses_equal_literal(double, wrn, temperature):
    teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
    source = started(small_zskt(temperature=temperature), teacher, student)
    generator, rng = copy.deepcopy(source.generator), source.rng.clone_state()
    batch = source.batch([])
    noise = torch.randn(6, 5, generator=rng)
    before = generator(noise)
    expected = literal.zskt_generator(teacher(before), student(before), temperature)
    torch.testing.assert_close(batch.losses["generator"], expected.detach())

    _, kd, terms = source.student_loss(batch)
    logits, features = literal.features(student, batch.images, student.stages)
    _, wanted = literal.features(teacher, batch.images, teacher.stages)
    torch.testing.assert_close(
        kd.mean(), literal.zskt_kd(teacher(batch.images), logits, temperature)
    )
    transfer = sum(literal.attention_transfer(features[n], wanted[n]) for n in teacher.stages)
    torch.testing.assert_close(terms["attention"], 250 * transfer)


def test_zskt_batch_comes_from_the_updated_generator(teacher, student):
    source = started(small_zskt(), teacher, student)
    untrained, rng = copy.deepcopy(source.generator), source.rng.clone_state()
    batch = source.batch([])
    noise = torch.randn(6, 5, generator=rng)
    torch.testing.assert_close(batch.images, source.generator(noise).detach())
    assert not torch.allclose(batch.images, untrained(noise), atol=1e-4)
    torch.testing.assert_close(batch.logits, teacher(batch.images))


def test_zskt_batch_leaves_the_student_alone(teacher, student):
    source = started(small_zskt(), teacher, student)
    before = copy.deepcopy(student.state_dict())
    batch = source.batch([])
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    assert not any(
        t.requires_grad
        for t in (batch.images, batch.logits, *batch.features.values(), *batch.losses.values())
    )
    assert not any(m._forward_hooks for model in (teacher, student) for m in model.modules())


def test_zskt_generator_step_raises_the_divergence(teacher, student):
    source = started(small_zskt(batch_size=32, generator_lr=1e-3), teacher, student)
    noise = torch.randn(32, 5, generator=source.rng.clone_state())

    def divergence(images):
        with torch.no_grad():
            return kl(teacher(images), student(images)).mean()

    before = divergence(source.generator(noise).detach())
    assert divergence(source.batch([]).images) > before


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 7)])
def test_generator_emits_normalised_images_of_any_size(shape):
    mean, std = [0.5, 0.1, 0.2][: shape[0]], [0.25, 0.3, 0.1][: shape[0]]
    torch.manual_seed(0)
    images = Generator(shape, 5, 4, mean, std).train()(torch.randn(16, 5))
    assert images.shape == (16, *shape)
    found_std, found_mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(found_mean, torch.tensor(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(found_std, torch.tensor(std), atol=1e-3, rtol=1e-2)


class Plain(nn.Module):
    """A stranger's network: two layers, no ``stages``, no Normalize."""

    def __init__(self, stride=1):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, stride, 1)
        self.last = nn.Linear(3, 10)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).mean((2, 3)))


def test_attention_layers_of_strangers_are_named(student):
    with pytest.raises(ValueError, match="which layers of Plain and WideResNet"):
        started(small_zskt(), Plain(), student)
    with pytest.raises(ValueError, match="cannot compare first"):
        started(small_zskt(attention_layers={"first": "stage1"}), Plain(stride=2), student)
    with pytest.raises(ValueError, match="did you mean 'stage1'"):
        started(small_zskt(attention_layers={"first": "stage_1"}), Plain(), student)
    teacher = Plain()
    source = started(small_zskt(attention_layers={"first": "stage1"}), teacher, student)
    batch = source.batch([])
    term = source.student_loss(batch)[2]["attention"]
    _, wanted = literal.features(teacher, batch.images, ["first"])
    _, found = literal.features(student, batch.images, ["stage1"])
    torch.testing.assert_close(
        term,
        250 * literal.attention_transfer(found["stage1"], wanted["first"]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_attention_zero_needs_no_layers(student):
    source = started(small_zskt(attention=0), Plain(), student)
    assert source.student_loss(source.batch([]))[2] == {}


@pytest.mark.parametrize(
    "wrong", [{"shape": (8, 8)}, {"pseudo_batches": 0}, {"student_steps": 0}, {"batch_size": 1}]
)
def test_zskt_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError, match=r"shape|at least"):
        ZSKT(**{"shape": (1, 8, 8), **wrong})


def test_clean_kd_by_hand():
    # T = 2: teacher (2 log 3, 0) softens to (3/4, 1/4), student is even: KL = 3/4 log
    # 3/2 + 1/4 log 1/2 = .130812; cross-entropy log 2; .9 x 4 x .130812 + .1 x .693147
    # = .540238
    teacher, student = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.zeros_(student[1].weight), nn.init.zeros_(student[1].bias)
    images = torch.tensor([2 * math.log(3), 0.0]).view(1, 1, 1, 2)
    source = CleanKD(
        images, torch.tensor([0]), share=1.0, epochs=1, batch_size=1, temperature=2, alpha=0.9
    )
    source.start(teacher, student, CPU, 0)
    _, kd, terms = source.student_loss(source.batch())
    assert (kd.mean() + terms["cross_entropy"]).item() == pytest.approx(0.540238, rel=1e-5)


def test_clean_kd_equals_literal(double, wrn, digits):
    teacher, student = wrn(seed=1), wrn(seed=2)
    source = CleanKD(digits.train_images.double(), digits.train_labels, epochs=1, batch_size=10)
    source = started(source, teacher, student)
    batch = source.batch()
    _, kd, terms = source.student_loss(batch)
    expected = literal.clean_kd(teacher(batch.images), student(batch.images), batch.labels)
    torch.testing.assert_close(kd.mean() + terms["cross_entropy"], expected)


def numbered(n):
    """Images that hold their own number, and labels that repeat it."""
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8), torch.arange(n) % 10


def test_clean_kd_uses_its_share_and_nothing_else(teacher, student):
    images, labels = numbered(50)
    source = started(CleanKD(images, labels, share=0.2, epochs=3, batch_size=5), teacher, student)
    assert len(source) == 6
    batches = [source.batch() for _ in range(6)]
    seen = [batch.images[:, 0, 0, 0].long() for batch in batches]
    assert all(
        torch.equal(batch.labels, numbers % 10)
        for batch, numbers in zip(batches, seen, strict=True)
    )
    epochs = [sorted(torch.cat(seen[i : i + 2]).tolist()) for i in (0, 2, 4)]
    assert len(set(epochs[0])) == 10
    assert epochs[0] == epochs[1] == epochs[2]
    assert seen[0].tolist() != seen[2].tolist(), "every epoch has its own order"


def test_clean_kd_draws_its_share_from_the_seed(teacher, student):
    images, labels = numbered(50)
    pools = [
        sorted(started(CleanKD(images, labels), teacher, student, seed).pool.tolist())
        for seed in (0, 0, 1)
    ]
    assert pools[0] == pools[1] != pools[2]


def test_clean_kd_resumes_in_mid_epoch(teacher, student):
    images, labels = numbered(60)

    def fresh():
        return started(
            CleanKD(images, labels, share=0.5, epochs=2, batch_size=10, shift=1), teacher, student
        )

    whole = fresh()
    expected = [whole.batch().images for _ in range(6)]
    first, second = fresh(), fresh()
    found = [first.batch().images for _ in range(2)]
    second.restore(first.state())
    found += [second.batch().images for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_clean_kd_teaches(teacher, student, digits):
    steps = list(
        distill(
            teacher,
            student,
            CleanKD(digits.train_images, digits.train_labels, share=1, epochs=4),
            device="cpu",
        )
    )
    assert steps[-1].losses["kd"] < 0.7 * steps[0].losses["kd"]


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.1}, {"alpha": -0.1}, {"alpha": 2}])
def test_clean_kd_refuses_shares_outside_their_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CleanKD(*numbered(10), **wrong)
