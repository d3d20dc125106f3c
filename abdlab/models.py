"""Wide-ResNets with their normalisation inside, and the names by which a card can rebuild them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; mean and std are buffers, so they travel with the weights."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Block(nn.Module):
    """Pre-activation block of two 3x3 convolutions; the shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        same = inside == outside and stride == 1
        # its stride is taken before it: the same numbers, and never oneDNN's strided 1x1 weight gradient (see place)
        self.stride, self.shortcut = stride, None if same else nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(act[:, :, :: self.stride, :: self.stride])
        return self.conv2(F.relu(self.bn2(self.conv1(act)))) + skip


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146) on images in [0, 1].

    Args:
        depth: 6n + 4, at least 10 (n blocks in each of three stages).
        widen: the k of WRN-d-k, at least 1.
        classes: number of logits.
        channels: of the input images.
        width: channels of the first convolution; the stages have width*k, 2*width*k, 4*width*k.
        mean, std: per channel in [0, 1] units; one number serves all channels.

    ``stages`` names the modules whose outputs attention transfer compares.

    Raises:
        ValueError: when the depth is not 6n + 4, or a size is not positive.
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(
        self,
        depth: int,
        widen: int,
        classes: int = 10,
        channels: int = 3,
        width: int = 16,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a Wide-ResNet's depth is 6n + 4 (10, 16, 22, 28, 34, 40, ...), not {depth}")
        if min(widen, classes, channels, width) < 1:
            raise ValueError(
                f"widen, classes, channels and width must be at least 1, got {widen}, {classes}, {channels}, {width}"
            )
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        inside = width
        for stage, (scale, stride) in enumerate(((1, 1), (2, 2), (4, 2)), start=1):
            outside, blocks = width * widen * scale, []
            for i in range((depth - 4) // 6):
                blocks.append(Block(inside, outside, stride if i == 0 else 1))
                inside = outside
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(inside)
        self.fc = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        x = self.stage3(self.stage2(self.stage1(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1)
        return self.fc(x.flatten(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator is seeded inside the block, where layers draw their weights, and restored after it."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def build(
    name: str,
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 16,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    seed: int = 0,
) -> nn.Module:
    """The model that ``name`` stands for, e.g. ``wrn-16-2``, with weights drawn from ``seed`` alone.

    Its ``card`` attribute holds the arguments that rebuild it; :mod:`abdlab.checkpoint` writes it beside the weights.

    Raises:
        ValueError: for a name that no family answers to.
    """
    found = re.fullmatch(r"wrn-(\d+)-(\d+)", name.lower())
    if not found:
        raise ValueError(f"unknown model {name!r}: models are named wrn-DEPTH-WIDEN, for example wrn-16-2")
    card = {"name": name.lower(), "classes": classes, "channels": channels, "width": width, "mean": list(mean), "std": list(std)}
    with seeded(seed):
        model = WideResNet(int(found[1]), int(found[2]), classes, channels, width, mean, std)
    model.card = card
    return model


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device in the memory format that suits it: channels_last on CUDA, contiguous elsewhere.

    On a CPU channels_last is avoided on purpose: with few input channels, oneDNN's weight gradient of strided 1x1
    convolutions (a WRN's shortcuts) writes outside its buffers in that format.
    """
    formats = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    return model.to(device, **formats)


def normalization(model: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """Per-channel mean and std of the model's own :class:`Normalize` layer; (0.5, 0.25) where it has none."""
    for module in model.modules():
        if isinstance(module, Normalize):
            mean, std = module.mean.flatten().tolist(), module.std.flatten().tolist()
            return (mean * channels)[:channels], (std * channels)[:channels]
    return [0.5] * channels, [0.25] * channels
