"""bf16: what is computed in it, what stays float32, and that training still learns."""

import statistics

import pytest
import torch
from torch import nn

from abdlab import (
    CleanKD,
    Exam,
    SelfRetrospection,
    ShufflingVaccine,
    build,
    distill,
    distillation,
    load,
    train,
)
from abdlab.features import full, precision
from abdlab.settings import settings
from abdlab.sources import SOURCES

CPU = torch.device("cpu")
SHORT = {
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 4,
    "dafl.pseudo_batches": 4,
    "dfad.pseudo_batches": 4,
    "dfq.pseudo_batches": 4,
    "choi.pseudo_batches": 4,
    "cgdfkd.pseudo_batches": 4,
    "fastdfkd.rounds": 2,
    "fastdfkd.warmup": 1,
    "nayer.rounds": 2,
    "nayer.warmup": 1,
    "cmi.rounds": 2,
    "deepinversion.rounds": 2,
    **{
        f"{pooled}.{steps}": 3
        for pooled in ("cmi", "deepinversion", "fastdfkd", "nayer")
        for steps in ("synthesis_steps", "kd_steps")
    },
    "ood.epochs": 1,
    "ood.patches": 128,
    "clean.epochs": 1,
    "mixed.pseudo_batches": 4,
}


@pytest.fixture(scope="module")
def digits():
    return load("digits", size=8, device="cpu")


def test_the_networks_compute_in_bf16_and_what_they_return_is_float32(digits):
    model, inside = build("wrn-10-1", classes=10, channels=1).eval(), []
    handle = model.get_submodule(model.stages[0]).register_forward_hook(
        lambda module, args, output: inside.append(output.dtype)
    )
    with precision("bf16", CPU, model):
        logits = model(digits.test_images[:4])
    again = model(digits.test_images[:4])
    handle.remove()
    assert inside == [torch.bfloat16, torch.float32]
    assert logits.dtype == torch.float32
    assert not model._forward_hooks
    # 8 bits of mantissa: the same to about one part in a hundred, and not the same
    # numbers
    torch.testing.assert_close(logits, again, rtol=0.05, atol=0.05 * again.abs().max().item())
    assert not torch.equal(logits, again)


def test_full_raises_half_precision_only():
    assert full(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert full(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_an_update_inside_the_block_is_seen_by_the_next_pass():
    layer = nn.Linear(1, 1, bias=False)
    with precision("bf16", CPU, layer):
        for weight in (1.0, 2.0):
            with torch.no_grad():
                layer.weight.fill_(weight)
            assert layer(torch.ones(1, 1)).item() == weight


@pytest.fixture(scope="module")
def taught(digits):
    """A network trained in each precision, and its ACC."""
    found = {}
    for name in ("float32", "bf16"):
        model = build("wrn-10-1", classes=10, channels=1, width=8, seed=0)
        exam = Exam.of(digits.test_images, digits.test_labels)
        *_, last = train(
            model,
            digits.train_images,
            digits.train_labels,
            epochs=5,
            batch_size=32,
            precision=name,
            exam=exam,
            device="cpu",
        )
        found[name] = model, last.acc
    return found


def test_bf16_learns_digits_as_float32_does(taught):
    found = {name: acc for name, (_, acc) in taught.items()}
    for model, _ in taught.values():
        assert all(
            p.dtype == torch.float32 for p in model.state_dict().values() if p.is_floating_point()
        )
    assert min(found.values()) > 0.97
    assert abs(found["float32"] - found["bf16"]) < 0.02


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_with_both_defenses_trains_in_bf16_with_float32_losses(digits, source):
    chosen = settings("quick/digits", SHORT, device="cpu")
    teacher, student, src = (
        chosen.teacher(digits),
        chosen.student(digits),
        chosen.source(source, digits),
    )
    dtypes, learn = set(), src.student_loss

    def watched(batch):
        logits, kd, terms = learn(batch)
        dtypes.update(
            {
                batch.images.dtype,
                batch.logits.dtype,
                logits.dtype,
                kd.dtype,
                *(term.dtype for term in terms.values()),
            }
        )
        return logits, kd, terms

    src.student_loss = watched
    defenses = [
        ShufflingVaccine(layers=2, verify=False, warmup=0.0),
        SelfRetrospection(start=0.5, inner_steps=2),
    ]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    *_, last = distill(teacher, student, src, defenses=defenses, precision="bf16", device="cpu")
    assert dtypes == {torch.float32}
    assert last.images.dtype == torch.float32
    moved = [
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(moved) > len(before) / 2


def test_students_distilled_in_bf16_end_where_those_in_float32_do(digits, taught):
    """Over seeds: the difference of the means is within the noise that seeds make, or
    two points.
    """
    images, labels = digits.train_images, digits.train_labels
    teacher, _ = taught["float32"]
    exam, found = Exam.of(digits.test_images, digits.test_labels), {"float32": [], "bf16": []}
    for name, accs in found.items():
        for seed in range(3):
            student = build("wrn-10-1", channels=1, width=8, seed=seed + 2)
            source = CleanKD(images, labels, share=0.3, epochs=5, batch_size=32)
            *_, last = distill(
                teacher, student, source, exam=exam, precision=name, seed=seed, device="cpu"
            )
            accs.append(last.acc)
    noise = max(statistics.stdev(accs) for accs in found.values())
    assert min(map(min, found.values())) > 0.8
    assert abs(statistics.fmean(found["float32"]) - statistics.fmean(found["bf16"])) < max(
        2 * noise, 0.02
    )


def test_the_vaccine_still_finds_its_one_pass_in_bf16(digits):
    """The check of the fast pass against permuted weights must not fail for bf16's
    round-off.
    """
    chosen = settings("quick/digits", SHORT, device="cpu")
    vaccine = ShufflingVaccine(layers=2, verify=False, warmup=0.0)
    source = chosen.source("zskt", digits)
    list(
        distill(
            chosen.teacher(digits),
            chosen.student(digits),
            source,
            defenses=[vaccine],
            precision="bf16",
            device="cpu",
        )
    )
    assert vaccine.vaccine._parting == [""]


@pytest.mark.parametrize(
    ("overrides", "dtype"), [({}, torch.float32), ({"student.precision": "bf16"}, torch.bfloat16)]
)
def test_a_run_computes_in_the_precision_of_its_settings(digits, tmp_path, overrides, dtype):
    chosen, inside = settings("quick/digits", {**SHORT, **overrides}, device="cpu"), set()
    going = distillation(tmp_path, chosen, digits, chosen.teacher(digits), "zskt")
    stage = going.student.get_submodule(going.student.stages[0])
    handle = stage.register_forward_hook(
        lambda module, args, output: inside.add(output.dtype) if torch.is_grad_enabled() else None
    )
    next(going.stream)
    handle.remove()
    going.stream.close()
    assert inside == {dtype}


def test_an_unknown_precision_is_named(digits):
    with pytest.raises(ValueError, match=r"precision 'bf61'.*did you mean 'bf16'"):
        next(
            train(
                build("wrn-10-1", classes=10, channels=1),
                digits.train_images,
                digits.train_labels,
                precision="bf61",
                device="cpu",
            )
        )
