"""What tests/test_killed.py kills: one warm process imports everything and forks a child
for every try, so that no try pays for the imports.

    python killed_run.py FOLDER KILLS SEED

writes FOLDER/whole.safetensors, the student of an uninterrupted run, and
FOLDER/killed.safetensors, that of a run which was killed so many times; and prints where.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets  # noqa: F401 (a photograph needs it: once, and not in every child)
import torch
import torch._dynamo  # a process's first optimizer imports it, which takes seconds
import torchvision  # noqa: F401 (OOD's patches need it)
from torch import nn

from abdlab import (
    OOD,
    ZSKT,
    Mixed,
    ShufflingVaccine,
    TriggerUnlearning,
    build,
    distill,
    read_card,
    save_model,
)
from abdlab.models import seeded

torch.set_num_threads(1)
SHAPE, LENGTH = (1, 8, 8), 110


class Forgetful(nn.Module):
    """A student with dropout, after its convolution and before its logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.4))
        self.last = nn.Linear(24, 10)

    def forward(self, images):
        return self.last(self.head(self.body(images)))


def run(folder, name, told):
    """The run, from its checkpoint if there is one; a byte for every step."""
    teacher = build("wrn-10-1", channels=1, width=4, seed=1)
    with seeded(2):
        student = Forgetful()
    generated = ZSKT(
        SHAPE, pseudo_batches=LENGTH, batch_size=8, student_steps=2, z=5, width=2, attention=0
    )
    mix = Mixed([generated, OOD(SHAPE, patches=24, batch_size=8)], weights=[2, 1])
    unlearning = TriggerUnlearning(
        start=0.15, inner_steps=2, triggers=3, renewals=20, without=(), target=0
    )
    stream = distill(
        teacher,
        student,
        mix,
        defenses=[ShufflingVaccine(layers=3, warmup=0.1, sigma=0), unlearning],
        checkpoint=folder / f"{name}-run.safetensors",
        checkpoint_every=3,
        device="cpu",
    )
    for _ in stream:
        os.write(told, b".")
    save_model(folder / f"{name}.safetensors", student, {"report": unlearning.report()})


def attempt(folder, name, steps=None, delay=0.0):
    """A forked child that runs; killed so many steps (0: none) and seconds after its
    beginning, or let run to its end. Returns its exit status.
    """
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        status = 1
        try:
            run(folder, name, here)
            status = 0
        finally:
            os._exit(status)
    os.close(here)
    seen = 0
    while steps is None or seen < steps:
        if not (told := os.read(there, 1)):
            break  # it ended
        seen += len(told)
    if steps is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(there)
    return os.waitpid(child, 0)[1]


def main():
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.perf_counter()
    assert attempt(folder, "whole") == 0
    pace = (time.perf_counter() - began) / LENGTH
    checkpoint = folder / "killed-run.safetensors"
    for _ in range(kills):
        # at random, also while it begins or reads its checkpoint, but before its end
        left = LENGTH - (read_card(checkpoint)["index"] if checkpoint.exists() else 0)
        status = attempt(
            folder, "killed", rng.randrange(0, max(1, min(8, left - 4))), rng.uniform(0, 2 * pace)
        )
        assert os.WIFSIGNALED(status), f"it ended by itself: {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        print(read_card(checkpoint)["index"] if checkpoint.exists() else 0, flush=True)
    assert attempt(folder, "killed") == 0


if __name__ == "__main__":
    main()
