"""Every training step against the naive loop of naive.py, in one process on the same
inputs; only the losses are asserted.
"""

import naive
import pytest
import torch
from measure import (
    DEVICES,
    ENDLESS,
    MAIN,
    SLACK,
    SMALL,
    TINY,
    Loops,
    SRStep,
    Timed,
    agree,
    clock,
    interleave,
    trainable,
)
from torch.optim import Adam

from abdlab import CMI, OOD, train
from abdlab.distill import distill, seed_of
from abdlab.features import mode
from abdlab.inversion import Bank, invert
from abdlab.sources import NAYER, FastDFKD

pytestmark = [pytest.mark.benchmark, pytest.mark.parametrize("device", DEVICES)]
SIZES = {"main": MAIN, "small": SMALL}


@pytest.mark.parametrize("size", SIZES)
def test_pseudo_batch(report, size, device):
    size = SIZES[size]
    plain, vaccine = Loops(size, device), Loops(size, device, vaccine=True)
    half = Loops(size, device, precision="bf16")
    found = interleave(
        plain=clock(plain.ours, device),
        naive=clock(plain.theirs, device),
        sv=clock(vaccine.ours, device),
        naive_sv=clock(vaccine.theirs, device),
        bf16=clock(half.ours, device),
    )
    for ours, theirs in (("plain", "naive"), ("sv", "naive_sv")):
        agree(
            found[ours].first, found[theirs].first, device, generator=1e-3, kd=1e-2, attention=1e-2
        )
    agree(found["sv"].first, found["naive_sv"].first, device, sv_synthesis=2e-2)
    report.compare("pseudo-batch", size, device, found["naive"], found["plain"])
    report.compare("pseudo-batch, SV", size, device, found["naive_sv"], found["sv"])
    report.compare(
        "pseudo-batch, bf16", size, device, found["naive"], found["bf16"], "naive in float32"
    )
    report.added("SV", size, device, found["plain"], found["sv"])
    report.added("bf16", size, device, found["plain"], found["bf16"])


def test_sr_step(report, device):
    official, student = SRStep(device, "teacher", 2), SRStep(device, "student", 2)
    first = SRStep(device, "student", 1)
    found = interleave(
        first=first.ours,
        second=student.ours,
        teacher=official.ours,
        official=official.theirs,
        naive=student.theirs,
    )
    for ours, theirs, a, b in (
        ("teacher", "official", official, official),
        ("second", "naive", student, student),
        ("first", "naive", first, student),
    ):
        agree(found[ours].first, found[theirs].first, device, kd=1e-3, attention=1e-3, sr=2e-2)
        # loose: delta's Adam steps amplify round-off; tests/test_benchmarks.py compares
        # in float64
        wanted = b.gradients["naive"]
        assert (a.gradients["ours"] - wanted).norm() < 0.2 * SLACK[device] * wanted.norm()
    for label, ours in (
        ("order 1", "first"),
        ("order 2", "second"),
        ("delta for the teacher", "teacher"),
    ):
        report.compare(
            f"SR step, {label}", MAIN, device, found["official"], found[ours], "naive: official"
        )
    report.compare(
        "SR step, order 2",
        MAIN,
        device,
        found["naive"],
        found["second"],
        "naive: order 2, delta for the student",
    )
    report.added("SR's order 2 instead of 1", MAIN, device, found["first"], found["second"])


#: sources that make images in rounds: the source, its naive loop, and options of its own
ROUNDS = {
    "CMI": (
        CMI,
        naive.NaiveCMI,
        {"synthesis_batch": MAIN.batch, "bank": 4096, "pool": 8 * MAIN.batch},
    ),
    "FastDFKD": (FastDFKD, naive.NaiveFast, {"warmup": 0}),
    "NAYER": (NAYER, naive.NaiveFast, {"warmup": 0}),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_round(report, device, name):
    kind, loop_of, options = ROUNDS[name]
    steps, kd_steps = 2, 3
    settings = {
        "rounds": ENDLESS,
        "synthesis_steps": steps,
        "kd_steps": kd_steps,
        "batch_size": MAIN.batch,
        "width": MAIN.generator,
        **options,
    }
    teacher, student = MAIN.networks()
    twin, twins = (
        kind(MAIN.shape, **settings),
        [trainable(net, device) for net in (teacher.eval(), student.train())],
    )
    twin.start(*twins, torch.device(device), seed_of(0, "source", twin.name))
    loop, stream = (
        loop_of(twin, *twins),
        distill(teacher, student, kind(MAIN.shape, **settings), device=device),
    )
    found = interleave(
        ours=clock(lambda: next(stream).losses, device),
        ours_kd=clock(lambda: [next(stream) for _ in range(kd_steps - 1)], device),
        naive=clock(lambda: loop.synthesis() | loop.kd_step(), device),
        naive_kd=clock(lambda: [loop.kd_step() for _ in range(kd_steps - 1)], device),
    )
    tolerances = {"batch_norm": 1e-3, "one_hot": 1e-3, "adversarial": 1e-2, "kd": 2e-2}
    tolerances |= {"contrastive": 1e-2} if name == "CMI" else {}
    agree(found["ours"].first, found["naive"].first, device, **tolerances)
    kd, synthesis = {}, {}
    for side in ("ours", "naive"):
        kd[side] = Timed({}, [seconds / (kd_steps - 1) for seconds in found[f"{side}_kd"].seconds])
        pairs = zip(found[side].seconds, kd[side].seconds, strict=True)
        synthesis[side] = Timed({}, [(round_ - step) / steps for round_, step in pairs])
    report.compare(f"{name}, a synthesis step", MAIN, device, synthesis["naive"], synthesis["ours"])
    report.compare(f"{name}, a KD step", MAIN, device, kd["naive"], kd["ours"])


def test_ood_step(report, device):
    settings = {"patches": 2 * MAIN.batch, "batch_size": MAIN.batch, "epochs": ENDLESS}
    teacher, student = MAIN.networks()
    twin, twins = (
        OOD(MAIN.shape, **settings),
        [trainable(net, device) for net in (teacher.eval(), student.train())],
    )
    twin.start(*twins, torch.device(device), seed_of(0, "source", "ood"))
    # its patches are wanted, not the pass that the naive step makes itself
    twin.teacher = lambda images: images
    adam, stream = (
        Adam(twins[1].parameters(), lr=twin.lr),
        distill(teacher, student, OOD(MAIN.shape, **settings), device=device),
    )
    found = interleave(
        ours=clock(lambda: next(stream).losses, device),
        naive=clock(lambda: naive.ood_step(twin, *twins, adam), device),
    )
    agree(found["ours"].first, found["naive"].first, device, kd=1e-3)
    report.compare("OOD step", MAIN, device, found["naive"], found["ours"])


@pytest.mark.parametrize("size", SIZES)
def test_inversion(report, device, size):
    """All classes and families at once, against one trigger after the other; of one image
    again and again, so that both see the same ones.
    """
    size, steps, batch = SIZES[size], 3, 8
    model = trainable(size.networks()[1], device)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(1, *size.shape, generator=rng).expand(64, -1, -1, -1).to(device)
    with torch.no_grad(), mode(model, training=False):
        said = model(images[:2])[0].argmax().item()
    bank = invert(model, images, [c for c in range(10) if c != said], steps=1, batch=batch)

    def costs(banks):
        found = [invert(model, images, [], warm=b, steps=steps, batch=batch) for b in banks]
        return {"cost": sum(t.cost for each in found for t in each) / len(bank)}

    found = interleave(
        ours=clock(lambda: costs([bank]), device),
        naive=clock(lambda: costs([Bank((t,)) for t in bank]), device),
    )
    agree(found["ours"].first, found["naive"].first, device, cost=1e-3)
    what = f"inversion, {steps} steps of {len(bank)} triggers, {batch} images each"
    report.compare(what, size, device, found["naive"], found["ours"], "naive: one by one")


def test_teacher_epoch(report, device):
    count = (2 if TINY else 5) * MAIN.batch
    rng = torch.Generator().manual_seed(0)
    images, labels = (
        torch.rand(count, *MAIN.shape, generator=rng),
        torch.randint(10, (count,), generator=rng),
    )
    images, labels = images.to(device), labels.to(device)
    options = {"epochs": ENDLESS, "batch_size": MAIN.batch, "shift": 4, "flip": True}
    models = [trainable(MAIN.networks()[0], device) for _ in range(3)]
    plain = train(models[0], images, labels, device=device, **options)
    half = train(models[1], images, labels, device=device, precision="bf16", **options)
    slow = naive.teacher_epochs(models[2], images, labels, **options)
    found = interleave(
        plain=clock(lambda: next(plain).losses, device),
        naive=clock(lambda: next(slow), device),
        bf16=clock(lambda: next(half).losses, device),
    )
    agree(found["plain"].first, found["naive"].first, device, cross_entropy=2e-2)
    what = f"teacher epoch of {count} images"
    for name, label in (("plain", what), ("bf16", f"{what}, bf16")):
        pace = f"{count / found[name].best:,.0f} images/s" + (
            ", naive in float32" if name == "bf16" else ""
        )
        report.compare(label, MAIN.teacher, device, found["naive"], found[name], pace)
    report.added("bf16", f"{MAIN.teacher}, an epoch", device, found["plain"], found["bf16"])
