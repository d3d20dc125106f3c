"""Several streams at once, each in a thread: the numbers of each alone, closing,
errors, and what may not be shared.
"""

import copy
import itertools
import threading
import time

import pytest
import torch

from abdlab import (
    OOD,
    ZSKT,
    CleanKD,
    SelfRetrospection,
    ShufflingVaccine,
    build,
    distill,
    side_by_side,
)
from abdlab.checkpoint import load_state
from abdlab.models import seeded
from abdlab.side_by_side import claimed

SHAPE = (1, 8, 8)


def zskt(length=8):
    return ZSKT(SHAPE, pseudo_batches=length, batch_size=8, student_steps=2, z=5, width=4)


def runs(wrn, digits):
    """Four different runs: functions that make a student and its stream."""

    def abd():
        vaccine = ShufflingVaccine(layers=3, warmup=0, verify=False)
        return [vaccine, SelfRetrospection(start=0.5, inner_steps=2)]

    def clean():
        images, labels = digits.train_images, digits.train_labels
        return CleanKD(images, labels, epochs=2, batch_size=10, shift=1)

    kinds = [
        (zskt, {"seed": 1}),
        (zskt, {"seed": 2, "precision": "bf16"}),
        (zskt, {"defenses": abd}),
        (clean, {}),
        (lambda: OOD(SHAPE, patches=32, epochs=2, batch_size=8), {}),
    ]

    def start(make, defenses=list, **settings):
        student = wrn(seed=2)
        return student, distill(
            wrn(seed=1), student, make(), defenses=defenses(), device="cpu", **settings
        )

    return [
        lambda make=make, settings=settings: start(make, **settings) for make, settings in kinds
    ]


def test_each_run_has_the_numbers_that_it_has_alone(wrn, digits):
    alone = []
    for start in runs(wrn, digits):
        student, stream = start()
        alone.append(([step.losses for step in stream], student.state_dict()))
    together = [start() for start in runs(wrn, digits)]
    found = {}
    for number, step in side_by_side(stream for _, stream in together):
        found.setdefault(number, []).append(step.losses)
    assert [found[i] for i in range(5)] == [losses for losses, _ in alone]
    for (student, _), (_, expected) in zip(together, alone, strict=True):
        for name, value in student.state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert not any(thread.name.startswith("stream") for thread in threading.enumerate())


def test_the_global_generator_is_one_threads_at_a_time():
    expected = build("wrn-10-1", channels=1, seed=3).state_dict()

    def make():
        for _ in range(10):
            with seeded(5):
                torch.rand(3)
            yield build("wrn-10-1", channels=1, seed=3).state_dict()

    for _, made in side_by_side([make() for _ in range(4)]):
        assert all(torch.equal(v, made[k]) for k, v in expected.items())


def test_a_stream_is_at_most_one_step_ahead():
    taken = [0, 0]

    def count(number):
        for i in range(1000):
            taken[number] = i + 1
            yield i

    both = side_by_side([count(0), count(1)])
    got = [next(both) for _ in range(6)]
    time.sleep(0.05)
    assert sum(taken) <= 6 + 2
    both.close()
    assert {number for number, _ in got} == {0, 1}


def test_closing_closes_all_and_keeps_their_checkpoints(wrn, tmp_path):
    streams = [
        distill(
            wrn(seed=1),
            wrn(seed=2),
            zskt(100),
            device="cpu",
            seed=i,
            checkpoint=tmp_path / f"{i}.safetensors",
        )
        for i in range(3)
    ]
    both, last = side_by_side(streams), {}
    for number, step in itertools.islice(both, 7):
        last[number] = step.index
    both.close()
    for i in range(3):
        assert (
            last.get(i, 0)
            <= load_state(tmp_path / f"{i}.safetensors")[1]["index"]
            <= last.get(i, 0) + 1
        )
    with pytest.raises(StopIteration):
        next(streams[0])


def test_an_error_in_one_closes_the_others_and_is_raised():
    closed = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    def breaks():
        yield 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        for _ in side_by_side([endless(), breaks(), endless()]):
            pass
    assert sorted(closed) == ["stream 0", "stream 2"]


def test_an_error_while_closing_is_raised():
    def cannot_save():
        try:
            yield from itertools.count()
        finally:
            raise OSError("the disk is full")

    both = side_by_side([cannot_save()])
    next(both)
    with pytest.raises(OSError, match="the disk is full"):
        both.close()


def test_no_streams_are_no_steps():
    assert list(side_by_side([])) == []


def test_runs_that_share_a_teacher_are_refused(teacher, wrn):
    streams = [distill(teacher, wrn(seed=2), zskt(200), device="cpu", seed=i) for i in range(2)]
    with pytest.raises(
        ValueError,
        match=r"two runs side by side use the same teacher: give each run a copy of its own",
    ):
        list(side_by_side(streams))
    assert (
        len(
            list(
                side_by_side(
                    [
                        distill(copy.deepcopy(teacher), wrn(seed=2), zskt(), device="cpu", seed=i)
                        for i in range(2)
                    ]
                )
            )
        )
        == 16
    )


def test_one_thread_may_take_turns_on_one_teacher(teacher, wrn):
    streams = [distill(teacher, wrn(seed=2), zskt(3), device="cpu", seed=i) for i in range(2)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    with claimed(teacher=teacher), claimed(teacher=teacher):
        pass
