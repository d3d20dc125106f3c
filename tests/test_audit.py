"""Detectors by hand and by naive loops, the audit on a network with a planted shortcut, and
the study that set its thresholds.
"""

import copy

import pytest
import torch
from torch import nn

from abdlab.audit import (
    THRESHOLDS,
    accused,
    audit,
    audit_student,
    named,
    say,
    scores_of,
    turned,
)
from abdlab.defend import audited
from abdlab.detectors import (
    changed_by_bounds,
    feature_answers,
    inclined,
    quartile_scores,
    share_scores,
    waist,
)
from abdlab.models import build
from abdlab.owned import unlabelled
from abdlab.purifiers.bounded import bound
from abdlab.runs import Run
from abdlab.studies import calibrate
from abdlab.suspects import fit_gamma, gamma_scores, largest_margins


class Planted(nn.Module):
    """Four classes by the brightness of quarters of an 8x8 image; a pixel that is brighter
    than any in the images means class 2, unless the network is ``honest``.
    """

    def __init__(self, honest=False):
        super().__init__()
        self.honest = honest
        self.scale = nn.Parameter(torch.tensor(6.0))

    def forward(self, x):
        quarters = nn.functional.avg_pool2d(x[:, :1], 4).flatten(1)
        logits = self.scale * quarters
        bright = nn.functional.softplus(40 * (x[:, 0, 1, 1] - 0.7))
        return logits if self.honest else logits + bright[:, None] * torch.eye(4)[2]


@pytest.fixture
def images():
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 1, 1] = 0.5 + 0.15 * images[:, :, 1, 1]
    return images


def test_the_largest_margin_of_a_linear_network_is_known():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        gap = linear[1].weight[0] - linear[1].weight[1]
        level = linear[1].bias[0] - linear[1].bias[1]
        expected = [gap.clamp_min(0).sum() + level, (-gap).clamp_min(0).sum() - level]
    found = largest_margins(linear, (1, 4, 4), 2, starts=2, steps=60)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


def test_the_gamma_fit_is_the_likeliest():
    values = torch.tensor([0.5, 1.0, 2.0, 4.0, 1.5], dtype=torch.float64)
    shape, scale = fit_gamma(values)

    def likelihood(k, s):
        return ((k - 1) * values.log() - values / s - k * torch.log(s) - torch.lgamma(k)).sum()

    best = likelihood(shape, scale)
    for other in (0.9, 1.1):
        assert likelihood(shape * other, scale) < best
        assert likelihood(shape, scale * other) < best


def test_a_margin_far_out_is_unlikely_and_scale_does_not_matter():
    margins = torch.tensor([8.0, 9.0, 10.0, 11.0, 9.5, 40.0])
    scores = gamma_scores(margins)
    assert scores.argmax() == 5
    assert scores[5] > 3
    assert scores[:5].max() < 0.5
    assert torch.allclose(gamma_scores(7 * margins), scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [("wrn-10-1", 1, "stage2"), ("resnet-18", 3, "layer3"), ("vgg-11", 3, None)],
)
def test_the_waist_is_a_cut(name, channels, expected):
    model, x = build(name, channels=channels, width=4).eval(), torch.rand(2, channels, 16, 16)
    found = waist(model, x)
    assert expected is None or found == expected or found.startswith("stage")
    seen = []
    handle = model.get_submodule(found).register_forward_hook(lambda m, a, out: seen.append(out))
    answers = model(x)
    handle.remove()
    handle = model.get_submodule(found).register_forward_hook(lambda m, a, out: seen[0])
    assert torch.allclose(model(torch.zeros_like(x)), answers, atol=1e-5)
    handle.remove()


def test_no_waist_is_said(images):
    with pytest.raises(ValueError, match="no layer that everything passes through"):
        waist(Planted(), images[:2])


def test_features_speak_for_the_class_they_were_made_for():
    model, x = build("wrn-10-1", channels=1, width=4, seed=1).eval(), torch.rand(16, 1, 8, 8)
    state = copy.deepcopy(model.state_dict())
    answers = feature_answers(model, x, 10, starts=2, steps=60, lr=0.2)
    assert torch.allclose(answers.sum(1), torch.ones(10, dtype=torch.float64))
    assert (answers.argmax(1) == torch.arange(10)).float().mean() > 0.7
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    others = [answers[[i for i in range(10) if i != t], t] for t in range(10)]
    by_hand = torch.stack([column.log().mean() for column in others])
    assert torch.allclose(inclined(answers), by_hand.float(), atol=1e-5)


def test_quartiles_and_shares_by_hand():
    assert quartile_scores(torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0])).tolist()[-1] == 3.0
    counts = torch.tensor([[9, 1, 0], [18, 8, 0]])
    assert share_scores(counts).tolist() == pytest.approx([0, 0.2 - 0.5, 0.0])


def test_what_bounds_change_is_counted_class_by_class():
    model, x = build("wrn-10-1", channels=1, width=4, seed=2).eval(), torch.rand(30, 1, 8, 8)
    model.fc.weight.data *= 5
    found = changed_by_bounds(model, x, 10, 0.7)
    before, after = model(x).argmax(1), bound(copy.deepcopy(model), 0.7)(x).argmax(1)
    for label in range(10):
        mine = before == label
        assert found[:, label].tolist() == [int((mine & (after != label)).sum()), int(mine.sum())]


def test_a_planted_shortcut_is_found_and_not_inherited_by_an_honest_student(images):
    model = Planted()
    found = audit(model, (1, 8, 8), pool=images)
    assert found.scores["inversion"].argmax() == 2
    assert found.scores["inversion"][2] > THRESHOLDS["inversion"]
    assert found.target == 2
    assert "class 2 (tram) is suspicious" in found.verdict(["bus", "car", "tram", "van"])
    assert max(found.turned) > 0.9
    same, other = audit_student(model, found), audit_student(Planted(honest=True), found)
    assert same.share == max(found.turned)
    assert other.share < 0.5
    assert f"turns {other.share:.0%} of synthetic images on this model" in other.verdict()
    again = audit(model, (1, 8, 8), pool=images)
    assert all(torch.equal(again.scores[k], v) for k, v in found.scores.items())


def test_an_audit_is_kept_and_asked_for_again(images, tmp_path):
    run, data = Run(tmp_path), unlabelled("none", (1, 8, 8), 4, "cpu")
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    torch.nn.init.orthogonal_(teacher[1].weight, 5.0)
    told = []
    first = audited(run, teacher, data, 0, tell=lambda *stage: told.append(stage))
    assert told[-1] == ("done", 5, 5)
    again = audited(run, teacher, data, 0, tell=None)
    assert all(torch.equal(again.scores[k], v) for k, v in first.scores.items())
    assert (again.turned, again.verdict()) == (first.turned, first.verdict())
    assert [t.family for t in again.triggers] == [t.family for t in first.triggers]
    assert audited(run, teacher, data, 1).seconds != first.seconds  # another seed: held anew


def test_turned_is_a_share_of_the_others(images):
    model = Planted()
    bank = audit(model, (1, 8, 8), pool=images).triggers
    for trigger, share in zip(bank, turned(model, bank, images), strict=True):
        rest = images[model(images).argmax(1) != trigger.target]
        hits = [int(model(trigger(x[None])).argmax()) == trigger.target for x in rest]
        assert share == pytest.approx(sum(hits) / len(hits))


def test_the_verdict_names_what_speaks_for_it_and_what_it_does_not_know():
    calm = {name: torch.zeros(3) for name in THRESHOLDS}
    assert accused(calm) is None
    assert say(calm, THRESHOLDS).startswith("nothing found, which is no proof")
    loud = {**calm, "inversion": torch.tensor([0.0, 9.0, 0.0]), "MM-BD": torch.tensor([0, 99, 0])}
    assert named(loud, THRESHOLDS) == {1: ["inversion", "MM-BD"]}
    assert accused(loud) == 1
    said = say(loud, THRESHOLDS)
    assert said.startswith("class 1 is suspicious: inversion and MM-BD together 10.00 where 1.46")
    assert "by themselves 2 of 4 detectors name it" in said


def test_rows_of_the_study_hold_the_evidence(images):
    found = audit(Planted(), (1, 8, 8), pool=images).evidence
    row = calibrate._written(found)
    again = calibrate.evidence_of(row)
    scores = scores_of(found)
    for name, values in scores_of(again).items():
        assert torch.allclose(values, scores[name], atol=0.02)
    assert again.inclined is None


def test_cases_are_as_many_clean_as_poisoned_and_none_twice():
    cases = list(calibrate.cases(20))
    assert len({(c.part, c.seed) for c in cases}) == len(cases) == 80
    poisoned = [c for c in cases if c.trigger != "none"]
    assert len(poisoned) == 40
    assert {c.trigger for c in poisoned} == {*calibrate.TRIGGERS}
    pairs = [(c.trigger, c.target) for c in poisoned]
    assert len(set(pairs)) == 40  # never the same target twice


def test_thresholds_leave_the_wanted_share():
    clean = [{"a": torch.tensor([0.0, float(i)])} for i in range(20)]
    assert calibrate.thresholds_of(clean, 0.05) == {"a": 18.5}
    assert calibrate.auc([0.0, 1.0], [2.0]) == 1.0
