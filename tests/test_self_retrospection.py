"""Self-Retrospection: delta and both gradients against the literal formulas and by
hand, and what it must leave alone.
"""

import copy
import itertools
import math

import literal
import pytest
import torch
from torch import nn

from abdlab import ZSKT, SelfRetrospection, distill
from abdlab.defenses.inverted_triggers import Stamps, inverted_trigger, stamped
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


def test_delta_is_kept_for_as_many_steps_as_asked(double):
    student, teacher, batch = pair()

    def deltas(**settings):
        sr, _ = begun(student, teacher, **settings)
        sr.observe(batch)
        return [sr.student_term(batch, student(batch.images)).item() for _ in range(4)]

    every, second = deltas(), deltas(delta_every=2)
    assert len(set(every)) == 4
    assert second == [every[0], every[0], every[1], every[1]]


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
        {"shape": "stamp"},
        {"shape": "stamp", "perturb": "teacher"},
        {"shape": "stamp", "cover": True},
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
        ({"fraction": 0}, "fraction one in"),
        ({"perturb": "both"}, "perturb is"),
        ({"per": "image"}, "per is"),
        ({"statistics": "none"}, "statistics"),
        ({"delta_every": 0}, "delta_every"),
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


def test_delta_is_found_anew_every_so_many_student_steps(wrn):
    teacher, student = wrn(seed=1), wrn(seed=2).train()
    sr = SelfRetrospection(start=0, inner_steps=1, delta_every=2)
    sr.start(teacher, student, torch.device("cpu"), 0, 10)
    sr.before(0)
    images, deltas = torch.rand(6, 1, 8, 8), []
    batch = Batch(images, teacher(images).detach())
    for _ in range(2):
        sr.observe(batch)
        for _ in range(3):
            sr.student_term(batch, student(images))
            deltas.append(sr.delta.clone())
    same = [torch.equal(a, b) for a, b in itertools.pairwise(deltas)]
    assert same == [True, False, False, True, False]  # a pseudo-batch begins with a new one


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"anchor": "nobody"}, "anchor is"),
        ({"anchor": "teacher", "order": 2}, "order 2"),
        ({"delta_every": 0}, "delta_every counts"),
        ({"shape": "sticker"}, "shape is"),
        ({"shape": "stamp", "order": 2}, "shape='additive'"),
        ({"statistics": "mixed", "order": 2}, "no mixed statistics"),
        ({"natural": 0}, "natural is a factor above 0"),
        ({"balance": 0}, "balance is a factor above 0"),
        ({"margin": -1}, "margin is a number of pixels"),
        ({"renewals": -1}, "renewals is a number of stamps"),
        ({"stamps": 0}, "stamps, stamp_every"),
        ({"stamp_every": 0}, "stamps, stamp_every"),
        ({"shape": "stamp", "inner_steps": 0}, "inner_steps are at least 1"),
    ],
)
def test_options_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SelfRetrospection(**options)


def test_a_stamp_by_hand():
    # half of a white pattern on .2 is .6; where the mask is 0 the image stays, where it
    # is 1 the pattern stands
    images, mask = torch.full((1, 2, 1, 3), 0.2), torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    found = stamped(images, mask, torch.ones(1, 2, 1, 3))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.6, 1.0]).expand(1, 2, 1, 3))


@pytest.mark.parametrize("steps", [1, 10])
def test_an_inverted_trigger_equals_literal(double, steps):
    model, images = small(0).requires_grad_(False).eval(), torch.rand(5, 1, 4, 4)
    mask, pattern = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    found = inverted_trigger(model, images, 2, mask, pattern, steps, 0.3, 0.05)
    for a, b in zip(
        found,
        literal.inverted_trigger(model, images, 2, mask, pattern, steps, 0.3, 0.05),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class Corner(nn.Module):
    """Class 1 when the last pixel is bright; classes 0 and 2 by the mean of the others.
    What a backdoor does, in one line.
    """

    def forward(self, x):
        x = x.flatten(1)
        mean = x[:, :-1].mean(1)
        return torch.stack([10 - 20 * mean, 40 * x[:, -1] - 20, 20 * mean - 10], 1)


def test_the_class_with_the_cheapest_stamp_is_found_and_its_stamp_is_the_trigger():
    torch.manual_seed(0)
    images = 0.4 * torch.rand(16, 1, 4, 4) + torch.tensor([0.0, 0.6]).repeat(8).view(-1, 1, 1, 1)
    images[..., -1, -1] = 0
    teacher, student = Corner(), small(0)
    batch = Batch(images, teacher(images))
    options = {
        "perturb": "teacher",
        "inner_steps": 200,
        "inner_lr": 0.3,
        "penalty": 0.05,
        "init_std": 0.5,
    }
    sr, _ = begun(student, teacher, shape="stamp", **options)
    sr.observe(batch)
    assert sr.report()["target"] == 1 == min(range(3), key=sr.bank.costs.__getitem__)
    assert len(sr.bank) == sr.stamps
    for mask in sr.bank.masks[:, 0]:
        assert mask[-1, -1] > 0.3 > 0.1 > mask.flatten()[:-1].max()
    assert sr.report()["stamp_pixels"] == [round(mask.sum().item(), 1) for mask in sr.bank.masks]


def test_a_given_target_is_not_searched_for():
    student, teacher, batch = pair()
    sr, _ = begun(student, teacher, shape="stamp", target=2)
    sr.observe(batch)
    assert (sr.report()["target"], sr.report()["costs"]) == (2, [])


@pytest.mark.parametrize("perturb", ["student", "teacher"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_stamped_term_equals_literal(double, perturb, fraction):
    """One stamp, so that every image carries it; found on the network in eval mode,
    from starts in the order mask, pattern.
    """
    student, teacher, batch = pair()
    sr, _ = begun(
        student,
        teacher,
        shape="stamp",
        target=1,
        perturb=perturb,
        fraction=fraction,
        penalty=0.01,
        stamps=1,
    )
    rng = torch.Generator().manual_seed(0)
    starts = [0.1 * torch.randn(1, 1, 4, 4, generator=rng) for _ in range(2)]
    images, victim = (
        batch.images[: round(5 * fraction)],
        student if perturb == "student" else teacher,
    )
    mask, pattern, _ = literal.inverted_trigger(
        copy.deepcopy(victim).eval(), images, 1, *starts, 4, 0.1, 0.01
    )
    term, gradient = term_and_gradient(sr, student, batch)
    expected = 3 * literal.mean_kl(student(images), student(images + mask * (pattern - images)))
    torch.testing.assert_close(term, expected)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in slopes]))


def test_mixed_statistics_are_those_of_clean_and_perturbed_together(double):
    student, teacher, batch = pair()
    sr, start = begun(student, teacher, statistics="mixed")
    term, _ = term_and_gradient(sr, student, batch)
    delta = literal.universal_delta(student, batch.images, start, SCALE, 4, 0.1, 1e-3)
    both = student(torch.cat([batch.images, batch.images + delta * SCALE]))
    torch.testing.assert_close(term, 3 * literal.mean_kl(both[:5], both[5:]))


def test_stamps_are_renewed_and_the_oldest_goes():
    student, teacher, batch = pair()
    sr, _ = begun(student, teacher, shape="stamp", target=0, stamps=2, stamp_every=3)
    seen = []
    for _ in range(7):
        sr.observe(batch)
        seen.append(sr.bank.masks.clone())
    assert [len(masks) for masks in seen] == [2] * 7, "the bank is full from the start"
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[3][0], seen[0][1]), "the first stamp has gone"
    assert torch.equal(seen[6][0], seen[3][1])
    assert not torch.equal(seen[6][1], seen[6][0])


@pytest.mark.parametrize(
    ("renewals", "at"), [(0, []), (1, [5]), (2, [3, 6]), (3, [2, 4, 6]), (20, list(range(1, 10)))]
)
def test_renewals_are_so_many_in_a_run_of_ten(renewals, at):
    student, teacher, batch = pair()
    sr, _ = begun(
        student, teacher, shape="stamp", target=0, stamps=1, stamp_every=7, renewals=renewals
    )
    banks = []
    for _ in range(10):
        sr.observe(batch)
        banks.append(sr.bank.masks.clone())
    assert [i for i in range(1, 10) if not torch.equal(banks[i], banks[i - 1])] == at


def test_the_target_class_counts_more_by_hand(double):
    # Of four images one is the target: with balance 3 the weights are 3, 1, 1, 1 over
    # their mean of 1.5
    student, teacher, batch = pair()
    batch = Batch(batch.images[:4], torch.eye(3)[[1, 0, 2, 0]].double())
    sr, _ = begun(
        student,
        teacher,
        shape="stamp",
        target=1,
        stamps=1,
        balance=3.0,
        anchor="teacher",
        statistics="running",
    )
    sr.observe(batch)
    assert sr.sample_weights(batch).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    term = sr.student_term(batch, student(batch.images))
    moved = stamped(batch.images, sr.bank.masks, sr.bank.patterns)
    each = [
        literal.kl(p, q)
        for p, q in zip(batch.logits, copy.deepcopy(student).eval()(moved), strict=True)
    ]
    torch.testing.assert_close(term, 3 * (2 * each[0] + 2 / 3 * sum(each[1:])) / 4)
    sr.balance = 1
    assert sr.sample_weights(batch) is None


def test_attention_ends_where_self_retrospection_begins(wrn):
    teacher, student = wrn(seed=1), wrn(seed=2)
    source = ZSKT((1, 8, 8), pseudo_batches=4, batch_size=8, student_steps=2, z=5, width=4)
    sr = SelfRetrospection(start=0.5, inner_steps=1, without=["attention"])
    steps = list(distill(teacher, student, source, defenses=[sr], device="cpu"))
    assert ["attention" in step.losses for step in steps] == [True, True, False, False]
    assert all("kd" in step.losses for step in steps)


def test_stamps_stay_where_the_teachers_lie():
    torch.manual_seed(0)
    images = 0.4 * torch.rand(16, 1, 4, 4) + torch.tensor([0.0, 0.6]).repeat(8).view(-1, 1, 1, 1)
    images[..., -1, -1] = 0
    teacher, student = Corner(), small(0)
    options = {
        "inner_steps": 200,
        "inner_lr": 0.3,
        "penalty": 0.05,
        "init_std": 0.5,
        "stamps": 2,
        "target": 1,
        "shape": "stamp",
    }
    for margin, pixels in ((0, {15}), (1, {10, 11, 14, 15})):
        sr, _ = begun(student, teacher, margin=margin, **options)
        sr.observe(Batch(images, teacher(images)))
        assert {
            i for mask in sr.bank.masks for i in mask.flatten().nonzero().flatten().tolist()
        } == pixels


def test_a_stamp_that_is_dearer_than_the_other_classes_is_not_taken():
    # Corner's class 1 costs one bright pixel, .05, and the other classes far more; the
    # student has no such pixel.
    images = 0.4 * torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[::2] += 0.6
    images[..., -1, -1] = 0
    teacher, student = Corner(), small(0)
    batch = Batch(images, teacher(images))
    options = {
        "shape": "stamp",
        "inner_steps": 100,
        "inner_lr": 0.3,
        "penalty": 0.05,
        "stamps": 2,
        "stamp_every": 1,
    }
    for victim, natural, renewed in (
        ("teacher", 0.5, True),
        ("student", 0.01, False),
        ("student", None, True),
    ):
        sr, _ = begun(student, teacher, perturb=victim, natural=natural, target=1, **options)
        sr.observe(batch)
        first = sr.bank.masks.clone()
        sr.observe(batch)
        assert torch.equal(sr.bank.masks, first) != renewed
        assert len(sr.bank) == 2


def test_covered_images_are_relabelled_by_hand():
    # The place is the last pixel. Image 0 is bright there and dark elsewhere: with
    # another image's dark pixel Corner says 0. Image 1 is bright there and bright
    # elsewhere: it becomes 2. Images 2 and 3 are not the target, and stay.
    images = torch.zeros(4, 1, 4, 4)
    images[1] = images[3] = 0.9
    images[:2, ..., -1, -1], images[2:, ..., -1, -1] = 1, 0
    teacher = Corner()
    bank = Stamps(1, 1, 0.1, 0.01, 0.5, None, None, torch.Generator().manual_seed(0))
    bank.place = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    bank.place[..., -1, -1] = True
    batch = Batch(images, teacher(images))
    kept = batch.logits
    assert kept.argmax(1).tolist() == [1, 1, 0, 2]
    bank.relabel(teacher, batch)
    assert batch.logits.argmax(1).tolist() == [0, 2, 0, 2]
    assert batch.logits[0].tolist() == pytest.approx([10, -20, -10])
    assert kept.argmax(1).tolist() == [1, 1, 0, 2], "the source's own tensor is left alone"
    assert bank.report()["relabelled"] == 2
    bank.place[:] = False  # nothing is covered: all stays
    batch.logits = kept
    bank.relabel(teacher, batch)
    assert torch.equal(batch.logits, kept)
    everything = Batch(images[:2], kept[:2])  # nothing to cover with
    bank.relabel(teacher, everything)
    assert everything.logits.argmax(1).tolist() == [1, 1]


def test_a_backdoor_is_covered_where_the_teachers_own_stamps_lie():
    torch.manual_seed(0)
    images = 0.4 * torch.rand(16, 1, 4, 4) + torch.tensor([0.0, 0.6]).repeat(8).view(-1, 1, 1, 1)
    images[..., -1, -1] = 0
    images[:3, ..., -1, -1] = 1
    teacher, student = Corner(), small(0)
    batch = Batch(images, teacher(images))
    options = {"inner_steps": 200, "inner_lr": 0.3, "penalty": 0.05, "init_std": 0.5, "stamps": 2}
    sr, _ = begun(student, teacher, shape="stamp", cover=True, target=1, **options)
    sr.observe(batch)
    assert sr.bank.place.flatten().nonzero().flatten().tolist() == [15]
    assert batch.logits.argmax(1)[:3].tolist() == [0, 2, 0]
    assert sr.report()["relabelled"] == 3


def test_a_resumed_run_has_the_same_stamps(wrn, tmp_path):
    def run(steps, path):
        teacher, student = wrn(seed=1), wrn(seed=2)
        source = ZSKT((1, 8, 8), pseudo_batches=4, batch_size=8, student_steps=2, z=5, width=4)
        sr = SelfRetrospection(
            start=0, shape="stamp", inner_steps=2, stamps=2, stamp_every=2, natural=2.0, cover=True
        )
        stream = distill(
            teacher, student, source, defenses=[sr], device="cpu", checkpoint=tmp_path / path
        )
        for _, _step in zip(range(steps), stream, strict=False):
            pass
        stream.close()
        return student, sr

    straight, sr = run(4, "a.safetensors")
    run(3, "b.safetensors")
    resumed, again = run(4, "b.safetensors")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    assert sr.report() == again.report()
