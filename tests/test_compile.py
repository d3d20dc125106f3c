"""torch.compile as an option: what is compiled, that it is undone, and that the numbers
stay.
"""

import copy

import pytest
import torch
from torch import nn

from abdlab import ZSKT, SelfRetrospection, ShufflingVaccine, distill, record, train
from abdlab.features import compiled


def parts(model):
    return [
        name for name, module in model.named_modules() if module._compiled_call_impl is not None
    ]


def test_what_is_compiled_are_the_largest_parts_without_a_recorded_layer(teacher):
    with compiled(teacher):
        assert parts(teacher) == [""]
    with compiled(teacher, ["stage2"]):
        assert parts(teacher) == ["stage1", "stage2.0", "stage3"]
    with compiled(teacher, teacher.stages):
        assert parts(teacher) == ["stage1.0", "stage2.0", "stage3.0"]
    with compiled(teacher, teacher.stages, wanted=False):
        assert parts(teacher) == []
    with pytest.raises(KeyError), compiled(teacher):
        raise KeyError
    assert parts(teacher) == []


def test_a_compiled_run_has_the_numbers_of_a_plain_one(wrn, monkeypatch):
    """What torch traces, guards and differentiates; without the C++ compiler, which
    would take a minute.
    """
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend="aot_eager"))
    found = []
    for compile in (False, True):
        student, source = (
            wrn(seed=2),
            ZSKT((1, 8, 8), pseudo_batches=4, batch_size=8, student_steps=2, z=5, width=4),
        )
        defenses = [
            ShufflingVaccine(layers=3, warmup=0, verify=False),
            SelfRetrospection(start=0.5, inner_steps=2),
        ]
        stream = distill(
            wrn(seed=1), student, source, defenses=defenses, compile=compile, device="cpu"
        )
        first = next(stream)
        assert bool(parts(student)) == bool(parts(source.generator)) == compile
        found.append(([first, *stream], student))
        assert not parts(student)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert b.losses == pytest.approx(a.losses, rel=2e-3, abs=1e-5)
    for p, q in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3)
    with record(found[1][1], ["stage1"]) as acts:
        found[1][1](torch.rand(2, 1, 8, 8))
    assert acts["stage1"].shape[0] == 2
    copy.deepcopy(found[1][1])


@pytest.mark.slow
def test_compiled_training_has_the_numbers_of_plain_training(wrn, digits):
    found = []
    for compile in (False, True):
        model = wrn()
        steps = list(
            train(
                model,
                digits.train_images,
                digits.train_labels,
                epochs=2,
                batch_size=20,
                compile=compile,
                device="cpu",
            )
        )
        found.append(([step.losses["cross_entropy"] for step in steps], model))
        assert not parts(model)
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-3)
    for p, q in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3)
