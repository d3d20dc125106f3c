"""The same calls on an accelerator: chosen by "auto", and close to the CPU's numbers."""

import copy
import itertools
import sys

import pytest
import torch

from abdlab import (
    ZSKT,
    Diverged,
    Exam,
    SelfRetrospection,
    ShuffledTeacher,
    ShufflingVaccine,
    distill,
    pick_device,
    side_by_side,
    suspicion,
    train,
)
from abdlab.defenses.shuffled_teacher import shuffled_layers
from abdlab.train_together import train_together

pytestmark = pytest.mark.gpu


def defended(teacher, student, device, length=1, **settings):
    """A run with both defenses from its first step on."""
    source = ZSKT((1, 8, 8), pseudo_batches=length, batch_size=32, student_steps=1, z=5, width=8)
    defenses = [
        ShufflingVaccine(layers=3, warmup=0, verify=False),
        SelfRetrospection(start=0, inner_steps=3),
    ]
    return distill(
        copy.deepcopy(teacher), student, source, defenses=defenses, device=device, **settings
    )


def test_auto_is_the_accelerator(teacher, student):
    assert pick_device("auto").type != "cpu"
    next(defended(teacher, student, "auto"))
    assert {p.device.type for p in student.parameters()} == {pick_device("auto").type}


def test_a_defended_pseudo_batch_is_close_to_the_cpus(teacher, student):
    here, there = copy.deepcopy(student), copy.deepcopy(student)
    (cpu,) = list(defended(teacher, here, "cpu"))
    # Adam's first steps follow the sign of a gradient, so that TF32's round-off moves delta
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        (gpu,) = list(defended(teacher, there, "auto"))
    assert (
        cpu.losses.keys()
        == gpu.losses.keys()
        == {"generator", "sv_synthesis", "kd", "attention", "sr"}
    )
    assert gpu.losses == pytest.approx(cpu.losses, rel=0.05, abs=1e-4)
    assert gpu.images.device.type == "cpu"
    torch.testing.assert_close(gpu.images, cpu.images, rtol=0.05, atol=0.05)


def test_the_vaccine_in_one_pass_equals_its_copies(wrn):
    device = pick_device("auto")
    teacher = wrn("wrn-16-1", channels=3).to(device)
    images = torch.rand(16, 3, 8, 8, device=device)
    for last in (4, 5):
        vaccine = ShuffledTeacher(
            teacher, shuffled_layers(teacher, last), 3, torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(
            vaccine(images), vaccine.copies(images).mean(0), rtol=0.02, atol=0.02
        )
        assert suspicion(vaccine, teacher, images).isfinite().all()


def test_a_resumed_run_equals_an_uninterrupted_one(teacher, student, tmp_path):
    whole, parts = copy.deepcopy(student), copy.deepcopy(student)
    list(defended(teacher, whole, "auto", length=6))
    stream = defended(teacher, parts, "auto", length=6, checkpoint=tmp_path / "run.safetensors")
    next(stream), next(stream), stream.close()
    parts = copy.deepcopy(student)
    assert (
        len(
            list(
                defended(teacher, parts, "auto", length=6, checkpoint=tmp_path / "run.safetensors")
            )
        )
        == 4
    )
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_accelerators_random_numbers_are_untouched(teacher, student):
    if pick_device("auto").type != "cuda":
        pytest.skip("only CUDA shows the state of its generator this way")
    before = torch.cuda.get_rng_state()
    list(defended(teacher, student, "auto"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_training_learns_there(wrn, digits):
    model, device = wrn(), pick_device("auto")
    exam = Exam.of(digits.test_images.to(device), digits.test_labels.to(device))
    steps = list(
        train(model, digits.train_images, digits.train_labels, epochs=8, batch_size=20, exam=exam)
    )
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert steps[-1].losses["cross_entropy"] < 0.3 * steps[0].losses["cross_entropy"]
    assert steps[-1].acc > 0.6


def begun(teacher, student, defenses, **settings):
    """A run of 20 pseudo-batches of 3 student steps; the vaccine from the seventh on,
    self-retrospection from the thirteenth.
    """
    known = {
        "sv": lambda: ShufflingVaccine(layers=3, warmup=0.3, verify=False),
        "sr": lambda: SelfRetrospection(start=0.6, inner_steps=3),
        "sr2": lambda: SelfRetrospection(start=0.6, inner_steps=3, order=2),
    }
    source = ZSKT((1, 8, 8), pseudo_batches=20, batch_size=32, student_steps=3, z=5, width=8)
    return distill(
        copy.deepcopy(teacher),
        student,
        source,
        defenses=[known[name]() for name in defenses],
        **settings,
    )


@pytest.fixture
def no_tf32():
    """Convolutions and products in float32, so that two runs stay together."""
    before = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.deterministic,
    ) = before


def cuda():
    if pick_device("auto").type != "cuda":
        pytest.skip("CUDA graphs, streams and synchronisations are CUDA's")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "defenses",
    [(), ("sv",), ("sr",), ("sv", "sr"), ("sr2",)],
    ids=lambda names: "+".join(names) or "plain",
)
def test_graphs_compute_what_python_does(teacher, student, no_tf32, defenses, precision):
    cuda()
    found = []
    for graphs in (False, True):
        mine = copy.deepcopy(student)
        found.append(
            (list(begun(teacher, mine, defenses, graphs=graphs, precision=precision)), mine)
        )
    # bf16 rounds to 8 bits, and training amplifies it
    loose = precision == "bf16"
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert b.losses == pytest.approx(
            a.losses, rel=0.2 if loose else 1e-2, abs=2e-2 if loose else 1e-4
        )
        assert a.events == b.events
    for p, q in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0.2 if loose else 1e-2, atol=2e-2 if loose else 1e-3)


def test_a_run_with_graphs_resumes_without_and_the_other_way_round(
    teacher, student, no_tf32, tmp_path
):
    cuda()
    whole = copy.deepcopy(student)
    list(begun(teacher, whole, ("sv", "sr")))
    for first in (True, False):
        path = tmp_path / f"{first}.safetensors"
        stream = begun(teacher, copy.deepcopy(student), ("sv", "sr"), checkpoint=path, graphs=first)
        list(itertools.islice(stream, 15))
        stream.close()
        rest = copy.deepcopy(student)
        assert len(list(begun(teacher, rest, ("sv", "sr"), checkpoint=path, graphs=not first))) == 5
        for p, q in zip(whole.parameters(), rest.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3)


def test_runs_side_by_side_with_graphs_are_those_alone(teacher, student, no_tf32):
    cuda()
    alone, beside = ([copy.deepcopy(student) for _ in range(5)] for _ in range(2))
    for seed, mine in enumerate(alone):
        list(begun(teacher, mine, ("sr",), seed=seed))
    streams = [
        begun(teacher, mine, ("sr",), graphs=True, seed=seed) for seed, mine in enumerate(beside)
    ]
    assert len(list(side_by_side(streams))) == 5 * 20
    for mine, other in zip(alone, beside, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_networks_trained_together_with_graphs_are_those_without(wrn, digits, no_tf32, precision):
    cuda()
    images = digits.train_images[:80].to("cuda")
    sets = [(images, digits.train_labels[:80].to("cuda"))] * 3
    options = {"epochs": 3, "batch_size": 20, "lr": 0.05, "shift": 1, "flip": True}
    found = []
    for graphs in (False, True):
        models = [wrn(seed=i) for i in range(3)]
        steps = list(train_together(models, sets, graphs=graphs, precision=precision, **options))
        found.append(([s.losses["cross_entropy"] for pair in steps for s in pair], models))
    loose = precision == "bf16"
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1 if loose else 1e-2)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(
                q, p, rtol=0.2 if loose else 1e-2, atol=5e-2 if loose else 1e-3
            )


@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_waits_once_per_pseudo_batch(teacher, student, monkeypatch, graphs):
    cuda()
    module, reads = sys.modules["abdlab.distill"], []
    read = module._read

    def waits(values):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(values))
        found = read(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    stream = begun(teacher, student, ("sv", "sr"), graphs=graphs)
    list(
        itertools.islice(stream, 17)
    )  # both defenses have begun, and with graphs their pieces are captured
    monkeypatch.setattr(module, "_read", waits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1
    stream.close()


def test_a_gradient_that_is_not_finite_is_seen_there(teacher, student):
    broken = copy.deepcopy(teacher)
    torch.nn.init.constant_(broken.fc.bias, float("nan"))
    before = copy.deepcopy(student)
    with pytest.raises(Diverged, match=r"at step 1 the loss 'generator' is nan"):
        next(defended(broken, student, "auto"))
    for p, q in zip(before.parameters(), student.parameters(), strict=True):
        assert torch.equal(p, q.cpu())
