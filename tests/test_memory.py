"""Memory stays flat over 300 steps, with every source that keeps a pool and every
defense that keeps images; a leak is seen.
"""

import gc
import mmap
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import nn

from abdlab import (
    CMI,
    ZSKT,
    DeepInversion,
    SelfRetrospection,
    ShufflingVaccine,
    TriggerUnlearning,
    distill,
)
from abdlab.models import seeded
from abdlab.sources.pooled import Pooled

STEPS = 300
SHAPE = (1, 8, 8)
POOL = 48
BANK = 40


def small(seed):
    """A network that takes half of the smallest Wide-ResNet's time: what is measured
    is what hundreds of steps leave, not what one does.
    """
    with seeded(seed):
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)),
        ).eval()


@pytest.fixture
def teacher():
    return small(1)


@pytest.fixture
def student():
    return small(2)


@dataclass(frozen=True)
class Held:
    """What is alive: tensors that Python sees (a graph's inner ones it does not), their
    bytes, and the process's resident MB.
    """

    tensors: int
    bytes: int
    resident: float

    @classmethod
    def now(cls):
        gc.collect()
        # exactly these types: whoever compiled something in this process before has
        # left torch's own memory-less FakeTensors
        alive = [
            thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
        ]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in alive
            if t.layout == torch.strided
        }
        return cls(len(alive), sum(storages.values()), psutil.Process().memory_info().rss / 2**20)


def assert_flat(before, after):
    """Nothing grew: but for a few small tensors of a step's own, and 32 MB of anything
    else.
    """
    assert after.tensors <= before.tensors + 5, (
        f"tensors grew from {before.tensors} to {after.tensors}"
    )
    assert after.bytes <= before.bytes + 2**14, (
        f"tensors grew from {before.bytes} to {after.bytes} bytes"
    )
    assert after.resident <= before.resident + 32, (
        f"the process grew from {before.resident:.0f} to {after.resident:.0f} MB"
    )


def held(stream, *marks, look=lambda: None):
    """:class:`Held` after these steps of a stream; ``look`` is called after every step."""
    found = []
    for step in stream:
        look()
        if step.index in marks:
            found.append(Held.now())
    assert len(found) == len(marks)
    return found


def zskt(kind=ZSKT, steps=STEPS):
    return kind(
        SHAPE, pseudo_batches=steps, batch_size=16, student_steps=1, z=5, width=4, attention=0
    )


def pooled(kind, **settings):
    sizes = {
        "synthesis_steps": 2,
        "kd_steps": 4,
        "synthesis_batch": 16,
        "batch_size": 16,
        "pool": POOL,
        "flip": False,
    }
    return kind(SHAPE, rounds=STEPS // 4, **sizes, **settings)


LATE = {
    "order 2": lambda: SelfRetrospection(start=0.5, inner_steps=2, order=2, implicit_steps=2),
    "triggers": lambda: TriggerUnlearning(start=0.5, inner_steps=2, triggers=3, renewals=2),
}


@pytest.mark.parametrize("late", LATE)
def test_zskt_with_two_defenses_is_flat_and_the_pool_is_bounded(teacher, student, late):
    # 100 pseudo-batches fill the pool, which 3 fill; then the vaccine begins, and at
    # 150 the late defense
    vaccine = ShufflingVaccine(layers=3, warmup=1 / 3, pool=POOL, threshold=-1.0)
    defenses = [vaccine, LATE[late]()]
    kept = []
    marks = held(
        distill(teacher, student, zskt(), defenses=defenses, device="cpu"),
        *(20, 90, 110, 145, 180, STEPS),
        look=lambda: kept.append(sum(map(len, vaccine.seen))),
    )
    assert vaccine.report()["verified"]
    assert max(kept) == POOL
    assert kept[-1] == 0
    for before, after in zip(marks[::2], marks[1::2], strict=True):
        assert_flat(before, after)


@pytest.mark.parametrize("kind", [CMI, DeepInversion])
def test_sources_with_a_pool_are_flat_and_their_pools_are_bounded(teacher, student, kind):
    extra = {"z": 5, "width": 3, "negatives": 5, "bank": BANK} if kind is CMI else {}
    source, kept = pooled(kind, **extra), []
    defenses = [
        ShufflingVaccine(layers=3, warmup=0, verify=False),
        SelfRetrospection(start=0.1, inner_steps=2),
    ]
    marks = held(
        distill(teacher, student, source, defenses=defenses, device="cpu"),
        *(60, 180, STEPS),
        look=lambda: kept.append((len(source.pool), len(getattr(source, "bank", ())))),
    )
    assert [max(sizes) for sizes in zip(*kept, strict=True)] == [POOL, BANK if kind is CMI else 0]
    assert_flat(marks[0], marks[1])
    assert_flat(marks[1], marks[2])


def test_docstrings_state_the_bounds():
    plain = [" ".join(kind.__doc__.split()) for kind in (ShufflingVaccine, CMI, Pooled)]
    for text, bound in zip(
        plain,
        ["at most this many images", "features of at most this many images", "at most ``pool``"],
        strict=True,
    ):
        assert bound in text
    assert all("bounded memory" in text for text in plain[:2])


def pages(size=2**21):
    """Memory straight from the kernel, written to: the process grows by it, also where the
    heap still has room that earlier tests left.
    """
    fresh = mmap.mmap(-1, size)
    fresh.write(b"x" * size)
    return fresh


class Hoarder(ZSKT):
    """A source with a leak; ``keep(batch)`` is what it never lets go."""

    def start(self, *args):
        super().start(*args)
        self.hoard = []

    def batch(self, defenses=()):
        batch = super().batch(defenses)
        self.hoard.append(self.keep(batch))
        return batch


@pytest.mark.parametrize(
    "keep",
    [
        lambda self, batch: batch.images,
        lambda self, batch: batch.images[:1, :, :2, :2].clone(),
        lambda self, batch: self.student(batch.images).sum(),  # and with it the pass's whole graph
        lambda self, batch: pages(),
    ],
    ids=["images", "small tensors", "graphs", "bytes"],
)
def test_a_leak_is_seen(teacher, student, monkeypatch, keep):
    monkeypatch.setattr(Hoarder, "keep", keep, raising=False)
    before, after = held(distill(teacher, student, zskt(Hoarder, 120), device="cpu"), 20, 120)
    with pytest.raises(AssertionError, match="grew"):
        assert_flat(before, after)
