"""The same calls on an accelerator: chosen by "auto", and close to the CPU's numbers."""

import copy

import pytest
import torch

from abdlab import ZSKT, Exam, SelfRetrospection, ShuffledTeacher, ShufflingVaccine, distill, pick_device, suspicion, train
from abdlab.defenses.shuffling_vaccine import shuffled_layers

pytestmark = pytest.mark.gpu


def defended(teacher, student, device, length=1, **settings):
    """A run with both defences from its first step on."""
    source = ZSKT((1, 8, 8), pseudo_batches=length, batch_size=32, student_steps=1, z=5, width=8)
    defenses = [ShufflingVaccine(layers=3, warmup=0, verify=False), SelfRetrospection(start=0, inner_steps=3)]
    return distill(copy.deepcopy(teacher), student, source, defenses=defenses, device=device, **settings)


def test_auto_is_the_accelerator(teacher, student):
    assert pick_device("auto").type != "cpu"
    next(defended(teacher, student, "auto"))
    assert {p.device.type for p in student.parameters()} == {pick_device("auto").type}


def test_a_defended_pseudo_batch_is_close_to_the_cpus(teacher, student):
    here, there = copy.deepcopy(student), copy.deepcopy(student)
    (cpu,), (gpu,) = list(defended(teacher, here, "cpu")), list(defended(teacher, there, "auto"))
    assert cpu.losses.keys() == gpu.losses.keys() == {"generator", "sv_synthesis", "kd", "attention", "sr"}
    assert gpu.losses == pytest.approx(cpu.losses, rel=0.05, abs=1e-4)
    assert gpu.images.device.type == "cpu"
    torch.testing.assert_close(gpu.images, cpu.images, rtol=0.05, atol=0.05)


def test_the_vaccine_in_one_pass_equals_its_copies(wrn):
    device = pick_device("auto")
    teacher = wrn("wrn-16-1", channels=3).to(device)
    images = torch.rand(16, 3, 8, 8, device=device)
    for last in (4, 5):
        vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, last), 3, torch.Generator().manual_seed(0))
        torch.testing.assert_close(vaccine(images), vaccine.copies(images).mean(0), rtol=0.02, atol=0.02)
        assert suspicion(vaccine, teacher, images).isfinite().all()


def test_a_resumed_run_equals_an_uninterrupted_one(teacher, student, tmp_path):
    whole, parts = copy.deepcopy(student), copy.deepcopy(student)
    list(defended(teacher, whole, "auto", length=6))
    stream = defended(teacher, parts, "auto", length=6, checkpoint=tmp_path / "run.safetensors")
    next(stream), next(stream), stream.close()
    parts = copy.deepcopy(student)
    assert len(list(defended(teacher, parts, "auto", length=6, checkpoint=tmp_path / "run.safetensors"))) == 4
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
    steps = list(train(model, digits.train_images, digits.train_labels, epochs=8, batch_size=20, exam=exam))
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert steps[-1].losses["cross_entropy"] < 0.3 * steps[0].losses["cross_entropy"]
    assert steps[-1].acc > 0.6
