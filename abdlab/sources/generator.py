"""The generator that data-free sources share: noise in, images out. What stands at its
end differs from paper to paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abdlab.errors import did_you_mean
from abdlab.features import full

OUTPUTS = ("batchnorm", "tanh", "sigmoid")


class Generator(nn.Module):
    """Noise (B, z) to images (B, C, H, W).

    Linear to 2*width x H/4 x W/4, BN, up x2, conv, BN, LeakyReLU(.2), up x2, conv, BN,
    LeakyReLU, conv, output. The papers have width 64 for 32x32 images.

    Args:
        shape: (channels, height, width) of the images.
        z: noise dimensions. width: channels before the last convolution.
        mean, std: per channel in [0, 1] units; where the output is in normalised units,
            these map it to pixels.
        output: "batchnorm" ends in an affine batch norm that emits normalised images
            (ZSKT); "tanh" in a tanh and a batch norm without parameters, also
            normalised (DAFL, DFAD); "sigmoid" emits pixels in [0, 1] (CMI, DFQ). The
            first two are not clamped: images may leave [0, 1].
    """

    def __init__(
        self,
        shape: Sequence[int],
        z: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        output: str = "batchnorm",
    ):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(did_you_mean("generator output", output, OUTPUTS))
        channels, height, breadth = shape
        low = (2 * width, -(-height // 4), -(-breadth // 4))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.in_pixels = output == "sigmoid"
        ends = {
            "batchnorm": [nn.BatchNorm2d(channels)],
            "tanh": [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)],
            "sigmoid": [nn.Sigmoid()],
        }
        self.layers = nn.Sequential(
            nn.Linear(z, low[0] * low[1] * low[2]),
            nn.Unflatten(1, low),
            nn.BatchNorm2d(2 * width),
            nn.Upsample(size=(-(-height // 2), -(-breadth // 2))),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(size=(height, breadth)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            *ends[output],
        )

    def forward(self, z: Tensor) -> Tensor:
        images = full(self.layers(z))  # pixels in bfloat16 would have steps of 1/256
        return images if self.in_pixels else images * self.std + self.mean
