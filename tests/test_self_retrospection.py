"""Self-Retrospection: delta and both gradients against the literal formulas and by
hand, and what it must leave alone.
"""

import copy
import math

import literal
import pytest
import torch
from torch import nn

from abdlab import ZSKT, SelfRetrospection, distill
from abdlab.defenses.self_retrospection import implicit_gradient, universal_delta
from abdlab.models import Normalize
from abdlab.sources import Batch

CPU = torch.device("cpu")


def small(seed, norm=True):
    """A smooth network of about 60 weights on 1x4x4 images, in train mode."""
    torch.manual_seed(seed)
    layers = [
        Normalize([0.5], [0.25]),
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        *([nn.BatchNorm2d(2)] if norm else []),
    ]
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).train()


class Slope(nn.Module):
    """Logits (w x, -w x) of one pixel x."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        z = self.w * x.flatten(1)
        return torch.cat([z, -z], 1)


def pixel(value):
    return torch.full((1, 1, 1, 1), value)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_delta_by_hand():
    # x = 0, w = 1: p is even, q = (s, 1 - s) with s = sigmoid(2 delta), and d KL / d
    # delta = 2 s - 1. Step 1 from .1: g = .0002 - .099668 < 0, and Adam's first step is
    # lr exactly: delta = .2. Step 2: g = .0004 - .197375; m^ = -.150788, v^ = .0243537:
    # delta = .2 + .1 x .150788 / .156057 = .2966236
    one, zero = torch.ones(1, 1, 1, 1), pixel(0.0)
    for steps, expected in ((1, 0.2), (2, 0.2966236)):
        found = universal_delta(
            Slope(), zero, Slope()(zero).detach(), pixel(0.1), one, steps, 0.1, 1e-3
        )
        assert found.item() == pytest.approx(expected, abs=1e-6)
    # in units of std 1/2 the same start is .05 in pixels and the slope is halved;
    # Adam's first step is lr all the same
    found = universal_delta(
        Slope(), zero, Slope()(zero).detach(), pixel(0.1), 0.5 * one, 1, 0.1, 1e-3
    )
    assert found.item() == pytest.approx(0.2, abs=1e-6)


def test_gradients_by_hand(double):
    # x = 0, w = 1, delta = .5: s = sigmoid(1). Direct: 2 delta (s - 1/2) = .2310586.
    # Outer slope g = 2 w (s - 1/2) = .4621172. Inner slope: .002 delta - 2 w (s - 1/2),
    # so that with step .1 dPhi/dw = .1 x (2 (s - 1/2) + 4 w delta s (1 - s)) =
    # .0855341, and dPhi/ddelta = 1 - .1 (.002 - 4 w^2 s (1 - s)) = 1.0784448. One
    # iteration leaves v = g, two leave v = 1.0784448 g + g.
    student, zero, delta = Slope(), pixel(0.0), pixel(0.5)
    term = literal.self_retrospection(student, zero, delta, 1.0)
    assert torch.autograd.grad(term, student.w)[0].item() == pytest.approx(
        2 * 0.5 * (sigmoid(1) - 0.5)
    )
    for iterations, expected in (
        (1, 0.0855341 * 0.4621172),
        (2, 0.0855341 * 0.4621172 * 2.0784448),
    ):
        (found,) = implicit_gradient(
            student, zero, delta, torch.ones(1, 1, 1, 1), 1e-3, 0.1, iterations
        )
        assert found.item() == pytest.approx(expected, rel=1e-5)
        oracle = literal.implicit_gradient(student, zero, delta, 1.0, 1e-3, 0.1, iterations)
        assert oracle.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 10])
def test_delta_equals_literal(double, steps):
    student, images = small(0).requires_grad_(False), torch.rand(5, 1, 4, 4)
    start, scale = 0.1 * torch.randn(1, 1, 4, 4), torch.full((1, 1, 1, 1), 0.25)
    found = universal_delta(student, images, student(images), start, scale, steps, 0.1, 1e-3)
    torch.testing.assert_close(
        found, literal.universal_delta(student, images, start, scale, steps, 0.1, 1e-3)
    )
    assert not found.requires_grad


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_implicit_gradient_equals_explicit_matrices(double, norm, iterations):
    student, images = small(0, norm), torch.rand(5, 1, 4, 4)
    delta, scale = torch.randn(1, 1, 4, 4), torch.full((1, 1, 1, 1), 0.25)
    found = implicit_gradient(student, images, delta, scale, 1e-2, 0.1, iterations)
    expected = literal.implicit_gradient(student, images, delta, scale, 1e-2, 0.1, iterations)
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in found]), expected, rtol=1e-6, atol=1e-10
    )
    assert expected.abs().max() > 1e-5, "the term must not vanish for this test to mean anything"


def begun(student, teacher, seed=0, **settings):
    """(an SR that is on, the start that it will draw first)."""
    sr = SelfRetrospection(**{"start": 0.0, "inner_steps": 4, "weight": 3.0, **settings})
    sr.start(teacher.requires_grad_(False), student, CPU, seed, 10)
    sr.before(0)
    return sr, 0.1 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def term_and_gradient(sr, student, batch):
    sr.observe(batch)
    term = sr.student_term(batch, student(batch.images))
    return term, torch.cat(
        [g.flatten() for g in torch.autograd.grad(term, list(student.parameters()))]
    )


def pair(n=5):
    """(student, teacher, a batch of n images), the same ones each time."""
    torch.manual_seed(0)
    images = torch.rand(n, 1, 4, 4)
    student, teacher = small(0), small(1).eval()
    return student, teacher, Batch(images, teacher(images).detach())


SCALE = 0.25


@pytest.mark.parametrize("perturb", ["student", "teacher"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_term_and_first_order_gradient_equal_literal(double, perturb, fraction):
    student, teacher, batch = pair()
    sr, start = begun(student, teacher, perturb=perturb, fraction=fraction)
    term, gradient = term_and_gradient(sr, student, batch)
    images = batch.images[: round(5 * fraction)]
    victim = student if perturb == "student" else teacher
    delta = literal.universal_delta(victim, images, start, SCALE, 4, 0.1, 1e-3)
    expected = 3 * literal.self_retrospection(student, images, delta, SCALE)
    torch.testing.assert_close(term, expected)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in slopes]))


def test_second_order_adds_the_implicit_term_and_no_value(double):
    student, teacher, batch = pair()
    first, gradient_1 = term_and_gradient(begun(student, teacher)[0], student, batch)
    sr, start = begun(student, teacher, order=2, implicit_steps=3)
    second, gradient_2 = term_and_gradient(sr, student, batch)
    torch.testing.assert_close(first, second)
    delta = literal.universal_delta(student, batch.images, start, SCALE, 4, 0.1, 1e-3)
    expected = literal.implicit_gradient(student, batch.images, delta, SCALE, 1e-3, 0.1, 3)
    torch.testing.assert_close(gradient_2 - gradient_1, 3 * expected, rtol=1e-6, atol=1e-10)
    assert expected.abs().max() > 1e-6


def test_running_statistics_are_used_when_asked_for(double):
    student, teacher, batch = pair()
    sr, start = begun(student, teacher, statistics="running")
    term, _ = term_and_gradient(sr, student, batch)
    assert student.training
    student.eval()
    delta = literal.universal_delta(student, batch.images, start, SCALE, 4, 0.1, 1e-3)
    torch.testing.assert_close(
        term, 3 * literal.self_retrospection(student, batch.images, delta, SCALE)
    )


def test_the_official_weight_is_one_sixty_fourth():
    # 2 of 128 images carry delta and their sum is divided by 128
    student, teacher, _ = pair()
    images = torch.rand(128, 1, 4, 4)
    batch = Batch(images, teacher(images).detach())
    two = images[:2]
    for options in ({"per": "batch"}, {"weight": 3 / 64}):
        sr, start = begun(student, teacher, fraction=2 / 128, **options)
        term, _ = term_and_gradient(sr, student, batch)
        delta = literal.universal_delta(student, two, start, SCALE, 4, 0.1, 1e-3)
        divided_by_128 = 3 * 2 * literal.self_retrospection(student, two, delta, SCALE) / 128
        assert term.item() == pytest.approx(divided_by_128.item(), rel=1e-3)


def test_the_divisor_scales_both_orders(double):
    student, teacher, batch = pair()
    for order in (1, 2):
        terms = [
            term_and_gradient(
                begun(student, teacher, fraction=0.4, order=order, per=per)[0], student, batch
            )
            for per in ("perturbed", "batch")
        ]
        for whole, part in zip(*terms, strict=True):
            torch.testing.assert_close(part, whole * 2 / 5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fraction": 0.4},
        {"perturb": "teacher"},
        {"order": 2},
        {"statistics": "running"},
        {"statistics": "mixed"},
        {"anchor": "teacher"},
    ],
    ids=str,
)
def test_perturbed_passes_record_no_statistics(settings):
    student, teacher, batch = pair()
    sr, _ = begun(student, teacher, **settings)
    logits, before = student(batch.images), copy.deepcopy(student.state_dict())
    sr.observe(batch)
    sr.student_term(batch, logits).backward()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert student[2].track_running_stats
    assert all(p.requires_grad for p in student.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def zskt_run(wrn, *defenses, length=4, steps=None, **settings):
    """(the student, its Steps) of a tiny run, as far as ``steps``."""
    teacher, student = wrn(seed=1), wrn(seed=2)
    source = ZSKT(
        (1, 8, 8),
        **{
            "pseudo_batches": length,
            "batch_size": 8,
            "student_steps": 2,
            "z": 5,
            "width": 4,
            **settings,
        },
    )
    stream = distill(teacher, student, source, defenses=defenses, device="cpu")
    found = [step for _, step in zip(range(steps or length), stream, strict=False)]
    stream.close()
    return student, found


def buffers(model):
    return {k: v.clone() for k, v in model.named_buffers()}


@pytest.mark.parametrize("statistics", ["batch", "running", "mixed"])
def test_a_run_records_the_same_statistics_with_and_without(wrn, statistics):
    # one student step, so that both runs are at the same weights when statistics are
    # recorded
    plain, _ = zskt_run(wrn, steps=1, student_steps=1)
    defended, _ = zskt_run(
        wrn,
        SelfRetrospection(start=0, inner_steps=2, statistics=statistics),
        steps=1,
        student_steps=1,
    )
    assert all(torch.equal(v, buffers(defended)[k]) for k, v in buffers(plain).items())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(plain.parameters(), defended.parameters(), strict=True)
    )


def test_weight_zero_is_no_self_retrospection(wrn):
    plain, _ = zskt_run(wrn)
    defended, steps = zskt_run(wrn, SelfRetrospection(start=0, weight=0, lr=None, inner_steps=2))
    assert steps[-1].losses["sr"] == 0
    assert all(torch.equal(v, defended.state_dict()[k]) for k, v in plain.state_dict().items())


def test_before_its_start_it_changes_nothing(wrn):
    plain, expected = zskt_run(wrn, length=5, steps=3)
    defended, found = zskt_run(wrn, SelfRetrospection(start=0.6), length=5, steps=3)
    assert [s.losses for s in found] == [s.losses for s in expected]
    assert all(torch.equal(v, defended.state_dict()[k]) for k, v in plain.state_dict().items())


def test_it_begins_at_its_start_and_says_so(wrn):
    _, steps = zskt_run(wrn, SelfRetrospection(start=0.6, inner_steps=1), length=5)
    assert ["sr" in step.losses for step in steps] == [False] * 3 + [True] * 2
    assert [bool(step.events) for step in steps] == [False] * 3 + [True, False]
    assert "self-retrospection" in steps[3].events[0]


def test_a_short_run_has_it_for_at_least_one_step(wrn):
    # the paper's last 1 % of 4 pseudo-batches is less than one
    _, steps = zskt_run(wrn, SelfRetrospection(inner_steps=1))
    assert "sr" in steps[-1].losses


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": 2, "perturb": "teacher"}, "does not depend on the student"),
        ({"order": 3}, "order is 1 or 2"),
        ({"start": 1.0}, "start is a share"),
        ({"fraction": 0}, "fraction is a share"),
        ({"perturb": "both"}, "perturb is"),
        ({"per": "image"}, "per is"),
        ({"statistics": "none"}, "statistics"),
    ],
)
def test_impossible_settings_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        SelfRetrospection(**wrong)


@pytest.mark.parametrize("anchor", ["detached", "teacher"])
def test_an_anchor_takes_no_gradient_and_only_the_perturbed_answer_moves(wrn, anchor):
    """By hand: the term is KL(anchor || S(x + delta)), so its gradient is that with the
    anchor as a constant.
    """
    teacher, student = wrn(seed=1), wrn(seed=2).train()
    sr = SelfRetrospection(start=0, weight=3.0, inner_steps=2, anchor=anchor)
    sr.start(teacher, student, torch.device("cpu"), 0, 10)
    sr.before(0)
    images = torch.rand(6, 1, 8, 8)
    batch = Batch(images, teacher(images).detach())
    sr.observe(batch)
    term = sr.student_term(batch, student(images))
    fixed = batch.logits if anchor == "teacher" else student(images).detach()
    expected = 3 * literal.mean_kl(fixed, student(images + sr.delta * sr.scale))
    torch.testing.assert_close(term, expected)
    found = torch.autograd.grad(term, student.fc.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, student.fc.weight)[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"anchor": "nobody"}, "anchor is"),
        ({"anchor": "teacher", "order": 2}, "order 2"),
        ({"statistics": "mixed", "order": 2}, "no mixed statistics"),
    ],
)
def test_options_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SelfRetrospection(**options)


def test_mixed_statistics_are_those_of_clean_and_perturbed_together(double):
    student, teacher, batch = pair()
    sr, start = begun(student, teacher, statistics="mixed")
    term, _ = term_and_gradient(sr, student, batch)
    delta = literal.universal_delta(student, batch.images, start, SCALE, 4, 0.1, 1e-3)
    both = student(torch.cat([batch.images, batch.images + delta * SCALE]))
    torch.testing.assert_close(term, 3 * literal.mean_kl(both[:5], both[5:]))
