"""What purifiers add to a run, against the naive formulas of naive.py, in one process on
the same inputs; only the values are asserted.
"""

import naive
import pytest
import torch
from measure import DEVICES, MAIN, SMALL, agree, clock, interleave, trainable
from torch.optim import Adam

from abdlab.purifiers.bounded import bound
from abdlab.purifiers.unlearn import unlearning_loss

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("size", [MAIN, SMALL], ids=["main", "small"]),
]
K = 1.5
#: what :class:`abdlab.purifiers.Unlearn` takes with a trigger, and as many without
BATCH = 48


def test_bounded_pass(report, device, size):
    """A gradient of images through a bounded teacher, as synthesis takes it."""
    teacher = trainable(size.networks()[0], device).eval()
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(size.batch, *size.shape, generator=rng).to(device)

    def passed(model):
        x = images.clone().requires_grad_(True)
        norm = model(x).square().mean()
        (gradient,) = torch.autograd.grad(norm, x)
        return {"norm": norm.item(), "gradient": gradient.norm().item()}

    plain = clock(lambda: passed(teacher), device)
    theirs = naive.bounded(teacher, K)
    ours = bound(trainable(size.networks()[0], device).eval(), K)
    found = interleave(
        plain=plain,
        ours=clock(lambda: passed(ours), device),
        naive=clock(lambda: passed(theirs), device),
    )
    agree(found["ours"].first, found["naive"].first, device, norm=1e-4, gradient=1e-3)
    assert found["plain"].first != found["ours"].first
    what = "gradient of a batch through a bounded teacher"
    report.compare(what, size, device, found["naive"], found["ours"])
    report.added("bounded, a gradient of a batch", size, device, found["plain"], found["ours"])


def test_unlearning_step(report, device, size):
    """The teacher's answers kept and one pass for both halves, against two passes and the
    teacher's answers anew.
    """
    teacher = trainable(size.networks()[0], device).eval()
    models = [trainable(size.networks()[0], device).eval() for _ in range(2)]
    adams = [Adam(model.parameters(), lr=3e-4) for model in models]
    rng = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, BATCH, *size.shape, generator=rng).to(device)
    triggered = others.clone()
    triggered[..., -3:, -3:] = 1
    with torch.no_grad():
        answers, wanted = teacher(images), teacher(others)

    def ours():
        loss = unlearning_loss(models[0], images, answers, triggered, wanted)
        adams[0].zero_grad(set_to_none=True)
        loss.backward()
        adams[0].step()
        return {"loss": loss.item()}

    def theirs():
        return {"loss": naive.unlearn_step(teacher, models[1], adams[1], images, others, triggered)}

    found = interleave(ours=clock(ours, device), naive=clock(theirs, device))
    agree(found["ours"].first, found["naive"].first, device, loss=1e-3)
    what = f"unlearning, a step of {BATCH} and {BATCH} images"
    report.compare(what, size, device, found["naive"], found["ours"])
