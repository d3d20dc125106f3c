"""How long the trigger designer takes from a slider to its picture, on digits and at
CIFAR-10's size, beside the trigger itself.
"""

import statistics
import time

import pytest
import torch

from abdlab.data import Dataset, load
from abdlab.widgets import TriggerDesigner

pytestmark = pytest.mark.benchmark


def color():
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 3, 32, 32, generator=rng), torch.arange(64) % 10
    return Dataset(
        "digits",
        images,
        labels,
        images,
        labels,
        tuple("0123456789"),
        (0.5,) * 3,
        (0.25,) * 3,
        4,
        True,
    )


@pytest.mark.parametrize("name", ["digits", "3x32x32"])
def test_from_slider_to_picture(tmp_path, name):
    designer = TriggerDesigner(
        tmp_path, None, load("digits", device="cpu") if name == "digits" else color()
    )
    images = designer.data.test_images[:16]
    seconds, alone = [], []
    for size in [3, 4, 5, 6, 7] * 6:
        began = time.perf_counter()
        designer.controls["size"].value = size
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        designer.designed(images)
        alone.append(time.perf_counter() - began)
    ours, least = (1000 * statistics.median(times) for times in (seconds, alone))
    worst = 1000 * max(seconds)
    print(
        f"\n{name}: {ours:.1f} ms from slider to picture and sizes (slowest of {len(seconds)}:"
        f" {worst:.1f} ms), the trigger alone {least:.2f} ms"
    )
