"""The prior on what a generator makes: two terms, each its literal formula."""

import math

import pytest
import torch
from torch import nn

from abdlab import build, distill
from abdlab.defenses import Prior
from abdlab.sources import NAYER, ZSKT

SHAPE = (1, 8, 8)


def nets():
    return (build("wrn-10-1", channels=1, width=2, seed=seed) for seed in (1, 2))


def literal(teacher, images):
    """(distance of statistics, balance) by loops."""
    inputs, handles = {}, []
    norms = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, m in norms.items():
        keep = lambda module, args, out, name=name: inputs.update({name: args[0]})  # noqa: E731
        handles.append(m.register_forward_hook(keep))
    p = teacher(images).softmax(1).mean(0)
    for handle in handles:
        handle.remove()
    distance = 0.0
    for name, m in norms.items():
        mean = torch.stack([inputs[name][:, c].mean() for c in range(m.num_features)])
        var = torch.stack([inputs[name][:, c].var(correction=0) for c in range(m.num_features)])
        distance += math.dist(mean.tolist(), m.running_mean.tolist())
        distance += math.dist(var.tolist(), m.running_var.tolist())
    return distance, sum(x * math.log(x) for x in p.tolist())


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_the_term_is_its_literal_formula(shared):
    """Whether or not the pass is shared with the source's."""
    teacher, student = nets()
    teacher.eval()
    images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    prior = Prior(batch_norm=0.3, balance=0.7)
    prior.start(teacher, student, torch.device("cpu"), 0, 1)
    logits = prior.teacher_logits(images) if shared else teacher(images)
    torch.testing.assert_close(logits, teacher(images))
    distance, balance = literal(teacher, images)
    assert float(prior.synthesis_term(images, logits)) == pytest.approx(
        0.3 * distance + 0.7 * balance, rel=1e-5
    )


def trained(tmp_path=None, stop=None, prior=None, source=ZSKT):
    teacher, student = nets()
    kind = {"pseudo_batches": 4, "z": 5} if source is ZSKT else {"rounds": 2, "warmup": 0}
    made = source(SHAPE, **kind, batch_size=4, width=2)
    file = tmp_path and tmp_path / "c.safetensors"
    steps = distill(
        teacher, student, made, defenses=[prior] if prior else [], checkpoint=file, device="cpu"
    )
    for step in steps:
        if step.index == stop:
            steps.close()
            break
    return torch.cat([p.flatten() for p in student.parameters()]).detach(), step


def test_a_generator_under_it_keeps_to_the_statistics():
    """Weights of zero change nothing; a large one changes the student and is reported."""
    plain, _ = trained()
    same, _ = trained(prior=Prior(batch_norm=0.0, balance=0.0))
    other, step = trained(prior=Prior(batch_norm=10.0))
    torch.testing.assert_close(plain, same, rtol=0, atol=0)
    assert not torch.equal(plain, other)
    assert "prior_synthesis" in step.losses


def test_stopped_and_resumed_it_ends_where_it_would_have(tmp_path):
    whole, _ = trained(prior=Prior())
    trained(tmp_path, stop=2, prior=Prior())
    resumed, _ = trained(tmp_path, prior=Prior())
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)


def test_a_source_that_looks_into_the_teacher_takes_it_too():
    _, step = trained(prior=Prior(), source=NAYER)
    assert "prior_synthesis" in step.losses


def test_bad_values_are_one_sentence():
    with pytest.raises(ValueError, match=r"weights of 0 or more, not -1 and 0\.5"):
        Prior(batch_norm=-1)
    teacher, student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.Linear(1, 1)
    prior = Prior()
    prior.start(teacher, student, torch.device("cpu"), 0, 1)
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        prior.teacher_logits(torch.rand(2, *SHAPE))
