"""Networks by name: what a card or a setting calls a network, and how one is placed on
a device. The networks themselves are in :mod:`abdlab.families`.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from abdlab.errors import did_you_mean
from abdlab.families import (
    VGG,
    BasicBlock,
    Block,
    MobileNetV2,
    Network,
    Normalize,
    ResNet,
    WideResNet,
)

__all__ = [
    "MODELS",
    "VGG",
    "BasicBlock",
    "Block",
    "MobileNetV2",
    "Network",
    "Normalize",
    "ResNet",
    "WideResNet",
    "build",
    "memory_format",
    "normalization",
    "place",
    "seeded",
]

#: names for :func:`build`; every other wrn-DEPTH-WIDEN is one too
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"wrn-{depth}-{widen}": partial(WideResNet, depth, widen)
        for depth in (16, 40)
        for widen in (1, 2)
    },
    "resnet-18": partial(ResNet, (2, 2, 2, 2)),
    "resnet-20": partial(ResNet, (3, 3, 3), project=False, width=16),
    "resnet-34": partial(ResNet, (3, 4, 6, 3)),
    "vgg-11": partial(VGG, 11),
    "vgg-16": partial(VGG, 16),
    "mobilenet-v2": MobileNetV2,
}


#: there is one global generator, whichever thread draws from it
GLOBAL_RANDOMNESS = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator is seeded inside the block, where layers draw their
    weights, and restored after it.

    Other threads wait with blocks of their own.
    """
    with GLOBAL_RANDOMNESS:
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
    width: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    seed: int = 0,
) -> nn.Module:
    """The model that ``name`` stands for, one of :data:`MODELS` or wrn-DEPTH-WIDEN,
    with weights drawn from ``seed`` alone.

    Its ``card`` attribute holds the arguments that rebuild it; :mod:`abdlab.checkpoint`
    writes it beside the weights. Its ``stages`` name the modules that end each spatial
    size, for attention transfer.

    Args:
        classes: number of logits.
        channels: of the input images.
        width: channels of the first convolution, which all layers scale with. None is
            the published network: 16 for Wide-ResNets and ResNet-20, 64 for ResNet-18,
            ResNet-34 and VGG, 32 for MobileNetV2.
        mean, std: per channel in [0, 1] units; one number serves all channels.

    Raises:
        ValueError: for a name that no family answers to, with a "did you mean", or a
            size that is not positive.
    """
    name = name.lower()
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        make = partial(WideResNet, int(found[1]), int(found[2]))
    elif name in MODELS:
        make = MODELS[name]
    else:
        raise ValueError(f"{did_you_mean('model', name, MODELS)}, and any other wrn-DEPTH-WIDEN")
    if width is None:
        width = inspect.signature(make).parameters["width"].default
    # the width is written out, so that a card means the same network whatever becomes
    # of a default
    card = {
        "name": name,
        "classes": classes,
        "channels": channels,
        "width": width,
        "mean": list(mean),
        "std": list(std),
    }
    with seeded(seed):
        model = make(classes=classes, channels=channels, width=width, mean=mean, std=std)
    model.card = card
    return model


def place(model: nn.Module, device: torch.device, precision: str | None = None) -> nn.Module:
    """Move a model to a device in the memory format that suits it: channels_last on
    CUDA, contiguous elsewhere, with one exception.

    On a CPU, channels_last takes 12 to 17 % less time for a training step of WRNs on
    3x32x32 and 30 % less for a generator's, but gains nothing with one channel and
    loses 10 to 20 % in bf16. So it is for networks of this library on colour images
    that train in the ``precision`` "float32" (None: that do not train, or in no known
    one). Never for strided 1x1 convolutions, which they do not have: oneDNN's weight
    gradient of those has been seen to write outside its buffers in that format.
    """
    if device.type == "cuda":
        return model.to(device, memory_format=torch.channels_last)
    if device.type != "cpu" or precision is None:
        return model.to(device)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    colour = isinstance(model, Network) and convolutions[0].in_channels >= 3
    strided = any(max(m.kernel_size) == 1 < max(m.stride) for m in convolutions)
    fits = precision == "float32" and colour and not strided
    return model.to(device, memory_format=torch.channels_last if fits else torch.contiguous_format)


def memory_format(model: nn.Module) -> torch.memory_format:
    """The one that a model's kernels have: what networks that work with it best have
    too.
    """
    kernels = [p for p in model.parameters() if p.ndim == 4]
    moved = any(
        not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
        for p in kernels
    )
    return torch.channels_last if moved else torch.contiguous_format


def normalization(model: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """Per-channel mean and std of the model's own :class:`Normalize` layer; (0.5, 0.25)
    where it has none.
    """
    for module in model.modules():
        if isinstance(module, Normalize):
            mean, std = module.mean.flatten().tolist(), module.std.flatten().tolist()
            return (mean * channels)[:channels], (std * channels)[:channels]
    return [0.5] * channels, [0.25] * channels
