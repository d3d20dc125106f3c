"""Trigger unlearning: inverted triggers by hand and against the literal formulas, what the
student learns from them, and what it must leave alone.
"""

import copy

import literal
import pytest
import torch
from test_self_retrospection import CPU, pair, small, term_and_gradient
from torch import nn

from abdlab import ZSKT, TriggerUnlearning, distill
from abdlab.defenses.inverted_triggers import InvertedTriggers, inverted_trigger, stamped
from abdlab.sources import Batch

#: how the tests invert on their tiny networks
CHEAP = {"inner_lr": 0.3, "penalty": 0.05, "init_std": 0.5}


def begun(student, teacher, seed=0, **settings):
    """A TU that is on, plain but for the settings."""
    plain = {"start": 0.0, "inner_steps": 4, "weight": 3.0, "init_std": 0.1, "inner_lr": 0.1}
    plain |= {"natural": None, "balance": 1.0, "cover": False, "renewals": 0}
    tu = TriggerUnlearning(**{**plain, **settings})
    tu.start(teacher.requires_grad_(False), student, CPU, seed, 10)
    tu.before(0)
    return tu


def dark_corner(count=16):
    """Images of which half are bright, all with a dark last pixel."""
    torch.manual_seed(0)
    lift = torch.tensor([0.0, 0.6]).repeat(count // 2).view(-1, 1, 1, 1)
    images = 0.4 * torch.rand(count, 1, 4, 4) + lift
    images[..., -1, -1] = 0
    return images


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


def test_the_class_with_the_cheapest_trigger_is_found_and_its_trigger_too():
    images, teacher = dark_corner(), Corner()
    tu = begun(Corner(), teacher, **{**CHEAP, "inner_steps": 200})
    tu.observe(Batch(images, teacher(images)))
    assert tu.report()["target"] == 1 == min(range(3), key=tu.bank.costs.__getitem__)
    assert len(tu.bank) == tu.triggers
    for mask in tu.bank.masks[:, 0]:
        assert mask[-1, -1] > 0.3 > 0.1 > mask.flatten()[:-1].max()
    pixels = [round(mask.sum().item(), 1) for mask in tu.bank.masks]
    assert tu.report()["trigger_pixels"] == pixels


def test_a_given_target_is_not_searched_for():
    student, teacher, batch = pair()
    tu = begun(student, teacher, target=2)
    tu.observe(batch)
    assert (tu.report()["target"], tu.report()["costs"]) == (2, [])


def test_the_term_equals_literal(double):
    """One trigger, so that every image carries it; found on the network in eval mode,
    from starts in the order mask, pattern; clean and triggered images pass as one batch.
    """
    student, teacher, batch = pair()
    tu = begun(student, teacher, target=1, penalty=0.01, triggers=1)
    rng = torch.Generator().manual_seed(0)
    starts = [0.1 * torch.randn(1, 1, 4, 4, generator=rng) for _ in range(2)]
    victim = copy.deepcopy(student).eval()
    found = literal.inverted_trigger(victim, batch.images, 1, *starts, 4, 0.1, 0.01)
    term, gradient = term_and_gradient(tu, student, batch)
    moved = batch.images + found[0] * (found[1] - batch.images)
    answers = student(torch.cat([batch.images, moved]))[5:]
    expected = 3 * literal.mean_kl(batch.logits, answers)
    torch.testing.assert_close(term, expected)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in slopes]))


@pytest.mark.parametrize("settings", [{}, {"cover": True}], ids=str)
def test_triggered_passes_record_no_statistics(settings):
    student, teacher, batch = pair()
    tu = begun(student, teacher, **settings)
    logits, before = student(batch.images), copy.deepcopy(student.state_dict())
    tu.observe(batch)
    tu.student_term(batch, logits).backward()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert student[2].track_running_stats
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_triggers_are_renewed_and_the_oldest_goes():
    student, teacher, batch = pair()
    tu = begun(student, teacher, target=0, triggers=2, renewals=2)  # every 3rd of 10
    seen = []
    for _ in range(7):
        tu.observe(batch)
        seen.append(tu.bank.masks.clone())
    assert [len(masks) for masks in seen] == [2] * 7, "the bank is full from the start"
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[3][0], seen[0][1]), "the first trigger has gone"
    assert torch.equal(seen[6][0], seen[3][1])
    assert not torch.equal(seen[6][1], seen[6][0])


@pytest.mark.parametrize(
    ("renewals", "at"), [(0, []), (1, [5]), (2, [3, 6]), (3, [2, 4, 6]), (20, list(range(1, 10)))]
)
def test_renewals_are_so_many_in_a_run_of_ten(renewals, at):
    student, teacher, batch = pair()
    tu = begun(student, teacher, target=0, triggers=1, renewals=renewals)
    banks = []
    for _ in range(10):
        tu.observe(batch)
        banks.append(tu.bank.masks.clone())
    assert [i for i in range(1, 10) if not torch.equal(banks[i], banks[i - 1])] == at


def test_the_target_class_counts_more_by_hand(double):
    # Of four images one is the target: with balance 3 the weights are 3, 1, 1, 1 over
    # their mean of 1.5
    student, teacher, batch = pair()
    batch = Batch(batch.images[:4], torch.eye(3)[[1, 0, 2, 0]].double())
    tu = begun(student, teacher, target=1, triggers=1, balance=3.0)
    tu.observe(batch)
    assert tu.sample_weights(batch).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    term = tu.student_term(batch, student(batch.images))
    moved = stamped(batch.images, tu.bank.masks, tu.bank.patterns)
    answers = student(torch.cat([batch.images, moved]))[4:]
    each = [literal.kl(p, q) for p, q in zip(batch.logits, answers, strict=True)]
    torch.testing.assert_close(term, 3 * (2 * each[0] + 2 / 3 * sum(each[1:])) / 4)
    tu.balance = 1
    assert tu.sample_weights(batch) is None


def test_attention_ends_where_trigger_unlearning_begins(wrn):
    teacher, student = wrn(seed=1), wrn(seed=2)
    source = ZSKT((1, 8, 8), pseudo_batches=4, batch_size=8, student_steps=2, z=5, width=4)
    tu = TriggerUnlearning(start=0.5, inner_steps=1, triggers=2)
    steps = list(distill(teacher, student, source, defenses=[tu], device="cpu"))
    assert ["attention" in step.losses for step in steps] == [True, True, False, False]
    assert all("kd" in step.losses for step in steps)
    assert "trigger unlearning: on from pseudo-batch 2" in steps[2].events


def test_triggers_stay_where_the_teachers_lie():
    images, teacher, student = dark_corner(), Corner(), small(0)
    options = {**CHEAP, "inner_steps": 200, "triggers": 2, "target": 1}
    for margin, pixels in ((0, {15}), (1, {10, 11, 14, 15})):
        tu = begun(student, teacher, margin=margin, **options)
        tu.observe(Batch(images, teacher(images)))
        taken = [mask.flatten().nonzero().flatten().tolist() for mask in tu.bank.masks]
        assert {i for mask in taken for i in mask} == pixels


def test_a_trigger_that_is_dearer_than_the_other_classes_is_not_taken():
    # Corner's class 1 costs one bright pixel, .05, and the other classes far more; the
    # plain student has no such pixel.
    images, teacher = dark_corner(), Corner()
    batch = Batch(images, teacher(images))
    options = {"inner_lr": 0.3, "penalty": 0.05, "inner_steps": 100, "target": 1}
    options |= {"triggers": 2, "renewals": 9}
    for student, natural, renewed in ((Corner(), 0.5, True), (small(0), 0.01, False)):
        tu = begun(student, teacher, natural=natural, **options)
        tu.observe(batch)
        first = tu.bank.masks.clone()
        tu.observe(batch)
        assert torch.equal(tu.bank.masks, first) != renewed
        assert len(tu.bank) == 2


def test_covered_images_are_relabelled_by_hand():
    # The place is the last pixel. Image 0 is bright there and dark elsewhere: with
    # another image's dark pixel Corner says 0. Image 1 is bright there and bright
    # elsewhere: it becomes 2. Images 2 and 3 are not the target, and stay.
    images = torch.zeros(4, 1, 4, 4)
    images[1] = images[3] = 0.9
    images[:2, ..., -1, -1], images[2:, ..., -1, -1] = 1, 0
    teacher = Corner()
    bank = InvertedTriggers(1, 1, 0.1, 0.01, 0.5, None, None, torch.Generator().manual_seed(0))
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


def test_a_backdoor_is_covered_where_the_teachers_own_triggers_lie():
    images = dark_corner()
    images[:3, ..., -1, -1] = 1
    teacher, student = Corner(), small(0)
    batch = Batch(images, teacher(images))
    options = {**CHEAP, "inner_steps": 200, "triggers": 2, "target": 1}
    tu = begun(student, teacher, cover=True, **options)
    tu.observe(batch)
    assert tu.bank.place.flatten().nonzero().flatten().tolist() == [15]
    assert batch.logits.argmax(1)[:3].tolist() == [0, 2, 0]
    assert tu.report()["relabelled"] == 3


def test_a_resumed_run_has_the_same_triggers(wrn, tmp_path):
    def run(steps, path):
        teacher, student = wrn(seed=1), wrn(seed=2)
        source = ZSKT((1, 8, 8), pseudo_batches=4, batch_size=8, student_steps=2, z=5, width=4)
        tu = TriggerUnlearning(start=0, inner_steps=2, triggers=2, renewals=1, natural=2.0)
        options = {"defenses": [tu], "device": "cpu", "checkpoint": tmp_path / path}
        stream = distill(teacher, student, source, **options)
        for _, _step in zip(range(steps), stream, strict=False):
            pass
        stream.close()
        return student, tu

    straight, tu = run(4, "a.safetensors")
    run(3, "b.safetensors")
    resumed, again = run(4, "b.safetensors")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    assert tu.report() == again.report()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": 1.0}, "start is a share"),
        ({"natural": 0}, "natural is a factor above 0"),
        ({"balance": 0}, "balance is a factor above 0"),
        ({"margin": -1}, "margin is a number of pixels"),
        ({"renewals": -1}, "renewals is a number of triggers"),
        ({"triggers": 0}, "triggers and inner_steps"),
        ({"inner_steps": 0}, "inner_steps are at least 1"),
    ],
)
def test_options_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TriggerUnlearning(**options)
