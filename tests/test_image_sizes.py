"""Images of 48, 64 and 96 pixels: every source with every defense, all families of
networks, inversion and purifiers, on tiny networks.
"""

import pytest
import torch

from abdlab import build, distill, inversion, purify, settings
from abdlab.purifiers import Bounded, synthetic_pool
from abdlab.sources import SOURCES

SIZES = (48, 64, 96)
TINY = {
    "student.width": 4,
    "student.model": "wrn-10-1",
    "zskt.student_steps": 1,
    "ood.patches": 8,
    "ood.epochs": 1,
    "sv.layers": 3,
    "sv.stop": 1.0,
    "sr.start": 0.5,
    "sr.inner_steps": 1,
    "tu.start": 0.5,
    "tu.inner_steps": 1,
    "tu.triggers": 1,
}
ROUNDS = {"rounds": 1, "kd_steps": 2, "synthesis_steps": 1, "warmup": 1, "synthesis_batch": 4}
PLAIN = {"pseudo_batches": 2, "batch_size": 4, "width": 4, "z": 8}


def at(size, **more):
    """Settings of a run on colour images of this size that nobody has."""
    given = {"data.name": "none", "data.shape": [3, size, size], "data.classes": 4}
    for name, kind in SOURCES.items():
        keys = kind.keys()
        few = PLAIN | (ROUNDS if "kd_steps" in keys else {})
        given |= {f"{name}.{key}": value for key, value in few.items() if key in keys}
    return settings("quick/digits", given | TINY | more, device="cpu")


def teacher_of(name="wrn-10-1", **more):
    return build(name, classes=4, **({"width": 4} | more)).eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"clean"}))
def test_a_source_and_its_defenses(name, size):
    chosen = at(size)
    data = chosen.dataset()
    source, defenses = chosen.source(name, data), chosen.defenses("sv", "tu")
    stream = distill(teacher_of(), chosen.student(data), source, defenses=defenses, device="cpu")
    *_, last = stream
    assert last.index == last.total == len(source)
    assert last.images.shape[1:] == (3, size, size)
    assert last.images.isfinite().all()
    if name not in ("mixed", "ood"):
        assert source.synthesize(3).shape == (3, 3, size, size)


@pytest.mark.parametrize(
    ("name", "size"), [("wrn-16-2", 96), ("resnet-18", 64), ("resnet-20", 48), ("vgg-11", 96)]
)
def test_a_network_teaches_and_learns(name, size):
    chosen = at(size, **{"student.model": name})
    data = chosen.dataset()
    teacher, student = teacher_of(name), chosen.student(data)
    defenses = chosen.defenses("sv", "sr")
    source = chosen.source("zskt", data)
    *_, last = distill(teacher, student, source, defenses=defenses, device="cpu")
    assert last.index == 2
    with torch.no_grad():
        assert student(torch.rand(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize("size", SIZES)
def test_inversion_and_purifiers(size):
    teacher, shape = teacher_of(), (3, size, size)
    pool = synthetic_pool(teacher, shape, images=8, steps=1, doublings=0)
    assert pool.shape == (8, *shape)
    bank = inversion.invert(teacher, pool, [0], steps=1, batch=2)
    assert bank.triggers[0](pool).shape == pool.shape
    made = purify(teacher, [Bounded(k=2.0), "clp"], shape, pool=pool)
    assert made(pool).shape == (8, 4)
