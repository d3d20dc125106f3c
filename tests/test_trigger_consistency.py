"""Trigger consistency: its term by hand, what it filters, and runs that resume."""

import pytest
import torch
from torch import nn

from abdlab.defenses import DEFENSES
from abdlab.defenses.trigger_consistency import TriggerConsistency, suspicious
from abdlab.distill import distill
from abdlab.inversion import Bank, Inverted
from abdlab.models import build
from abdlab.purifiers import Bounded, Unlearn
from abdlab.sources.source import Batch
from abdlab.sources.zskt import ZSKT

SHAPE = (1, 8, 8)


def bright(target=0, amount=0.5):
    """A trigger by hand: all pixels brighter."""
    values = (torch.full((1, *SHAPE), amount),)
    return Bank((Inverted("additive", target, values, 0.1, amount),))


@pytest.fixture
def teacher():
    return build("wrn-10-1", channels=1, width=4, classes=3, seed=1).eval().requires_grad_(False)


def started(tc, teacher, student):
    tc.start(teacher, student, torch.device("cpu"), 0, 10)
    return tc


def test_suspicious_by_hand():
    teacher, cleaned = torch.eye(3)[[0, 0, 1, 2]], torch.eye(3)[[0, 1, 0, 2]]
    assert suspicious(teacher, cleaned, [0]).tolist() == [False, True, False, False]
    assert suspicious(teacher, cleaned, [0, 1]).tolist() == [False, True, True, False]
    assert suspicious(teacher, cleaned, []).tolist() == [False] * 4


def test_term_is_its_literal_formula(teacher):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    tc = TriggerConsistency(weight=2.0).give(teacher, bright())
    started(tc, teacher, student)
    images, logits = torch.rand(4, *SHAPE), 5 * torch.eye(3)[[0, 1, 2, 1]]
    batch = Batch(images, logits)
    tc.observe(batch)
    term = tc.student_term(batch, student(images))
    literal = 0.0
    for i in (1, 2, 3):  # the first one is the target
        p = logits[i].softmax(0)
        q = student((images[i : i + 1] + 0.5).clamp(0, 1))[0].softmax(0)
        literal += 2.0 / 3 * (p * (p / q).log()).sum().item()
    assert term.item() == pytest.approx(literal, rel=1e-5)
    term.backward()
    assert student[1].weight.grad.abs().sum() > 0


def test_filter_and_teach(teacher):
    other = build("wrn-10-1", channels=1, width=4, classes=3, seed=2).eval()
    images = torch.rand(16, *SHAPE)
    with torch.no_grad():
        logits, answers = 5 * torch.eye(3)[torch.arange(16) % 3], other(images)
    tc = started(TriggerConsistency().give(other, bright()), teacher, nn.Identity())
    batch = Batch(images, logits)
    tc.observe(batch)
    expected = [float(not (i % 3 == 0 and answers[i].argmax() != 0)) for i in range(16)]
    assert tc.sample_weights(batch).tolist() == expected
    assert torch.equal(batch.logits, logits)
    tc = started(TriggerConsistency(cleaned="teach").give(other, bright()), teacher, nn.Identity())
    tc.observe(batch)
    assert torch.equal(batch.logits, answers)
    assert tc.sample_weights(batch) is None
    tc = started(TriggerConsistency(filter=False).give(other, bright()), teacher, nn.Identity())
    tc.observe(batch)
    assert tc.sample_weights(batch) is None


def test_without_a_suspect_it_does_nothing(teacher):
    tc = started(TriggerConsistency().give(teacher, Bank()), teacher, teacher)
    batch = Batch(torch.rand(4, *SHAPE), torch.randn(4, 3))
    tc.observe(batch)
    assert tc.sample_weights(batch) is None
    assert tc.student_term(batch, batch.logits) is None
    assert tc.dropped() == ()
    assert tc.report()["targets"] == []


def run(teacher, tc, path=None, until=None):
    student = build("wrn-10-1", channels=1, width=4, classes=3, seed=3)
    source = ZSKT(SHAPE, pseudo_batches=4, batch_size=8, width=8)
    stream = distill(teacher, student, source, defenses=[tc], checkpoint=path, seed=5, device="cpu")
    steps = []
    for step in stream:
        steps.append(step)
        if step.index == until:
            break
    stream.close()
    return student, steps


@pytest.mark.parametrize("given", [True, False])
def test_a_resumed_run_ends_with_the_same_weights(teacher, tmp_path, given):
    def tc():
        if given:
            purified = Bounded(k=2.0).purify(teacher, SHAPE, pool=torch.rand(8, *SHAPE))
            return TriggerConsistency(renew_every=2, size=9).give(purified, bright())
        unlearn = Unlearn(targets=[0], rounds=1, starts=1, steps=1, natural=1e9, guard=0)
        steps = [unlearn, Bounded(k=2.0)]
        return TriggerConsistency(renew_every=2, size=9, purifiers=steps, images=64)

    whole, steps = run(teacher, tc())
    assert "tc" in steps[-1].losses
    assert "attention" not in steps[-1].losses
    path = tmp_path / "run.safetensors"
    run(teacher, tc(), path, until=2)
    defense = tc()
    resumed, _ = run(teacher, defense, path)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert defense.report()["renewed"] > 0


def test_registered_and_checked():
    assert DEFENSES["tc"] is TriggerConsistency
    for bad in ({"purifiers": ["bounded"]}, {"purifiers": ["unlearn", "x"]}, {"size": 0}):
        with pytest.raises(ValueError, match=r"unlearn|purifier|at least 1"):
            TriggerConsistency(**bad)
    with pytest.raises(ValueError, match="'filter' or 'teach'"):
        TriggerConsistency(cleaned="both")
