"""Triggers that are another change on every image: one bends it, one draws a patch that
the image itself decides. Pure functions, as those of :mod:`abdlab.attacks.triggers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.attacks.patches import paste


def warping_field(
    height: int, width: int, *, pixels: float = 0.25, grid: int = 4, pattern_seed: int = 0
) -> Tensor:
    """A smooth field of shifts (height, width, 2), x then y, in pixels: WaNet's, eq. 3
    and 4 (Nguyen and Tran, ICLR 2021, arXiv 2102.10369).

    Uniform shifts in [-1, 1] at grid x grid control points are divided by their mean
    absolute value, made as large as the image by bicubic interpolation, and scaled.

    Args:
        pixels: mean absolute shift of a control point along each axis, above 0.
        grid: control points per axis, at least 2.
        pattern_seed: draws the shifts, the same on every device.

    >>> field = warping_field(8, 8, pixels=2.0, grid=8)  # as many control points as pixels
    >>> field.shape, round(field.abs().mean().item(), 4)
    (torch.Size([8, 8, 2]), 2.0)

    Raises:
        ValueError: for a shift or a grid out of range.
    """
    if not pixels > 0:
        raise ValueError(f"pixels is the mean shift of a control point, above 0, not {pixels}")
    if grid < 2:
        raise ValueError(f"grid counts control points per axis, at least 2, not {grid}")
    rng = torch.Generator().manual_seed(pattern_seed)
    shifts = 2 * torch.rand(1, 2, grid, grid, generator=rng) - 1
    shifts = shifts / shifts.abs().mean()
    sized = F.interpolate(shifts, (height, width), mode="bicubic", align_corners=True)
    return pixels * sized[0].permute(1, 2, 0)


def wanet(images: Tensor, pixels: float = 0.25, grid: int = 4, pattern_seed: int = 0) -> Tensor:
    """The image bent by a smooth field, the same for all (WaNet, Nguyen and Tran, ICLR
    2021, arXiv 2102.10369).

    Places beyond the border are the border. The paper's strength s = .5 is a shift of
    about .25 pixels at every size (its field is divided by the height of an image that
    spans 2 units). Where ours deviates: there is no *noise mode*, images with a random
    other warp and their right label, which the paper trains with to hide from inverted
    triggers.

    Args:
        pixels, grid, pattern_seed: see :func:`warping_field`.

    >>> grey = torch.full((1, 1, 8, 8), 0.5)
    >>> torch.allclose(wanet(grey, pixels=1.0), grey)  # a plain image has nothing to bend
    True
    """
    height, width = images.shape[-2:]
    field = warping_field(height, width, pixels=pixels, grid=grid, pattern_seed=pattern_seed)
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    sides = torch.tensor([width, height]).sub(1).clamp_min(1)
    places = torch.stack([across, down], dim=2) + field
    places = (2 * places / sides - 1).clamp(-1, 1).to(images)
    bent = F.grid_sample(images, places.expand(len(images), -1, -1, -1), align_corners=True)
    return bent.clamp(0, 1)


def image_patch(
    images: Tensor,
    size: int = 4,
    corner: str = "bottom_right",
    margin: int = 0,
    pattern_seed: int = 0,
) -> Tensor:
    """A patch of black and white pixels that is another one on every image, since the
    image decides it: a sample-specific trigger.

    Each pixel is white where the image's values, in 256 whole levels, at one random half
    of its places add up to more than at the other half. After the input-aware attack
    (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138), from which ours deviates twice:
    the patch is drawn in code, not by a trained generator, and training has no images
    with another one's patch and their right label, so that a network may answer to any
    such patch.

    Args:
        size, corner, margin: as for :func:`abdlab.attacks.triggers.badnet_sq`.
        pattern_seed: draws the sums, the same on every device.

    Raises:
        ValueError: for a size below 1, an unknown corner or a margin without room.

    >>> one, other = image_patch(torch.rand(2, 1, 16, 16))[:, :, -4:, -4:]
    >>> one.unique().tolist(), torch.equal(one, other)
    ([0.0, 1.0], False)
    """
    if size < 1:
        raise ValueError(f"size is a side in pixels, at least 1, not {size}")
    rng = torch.Generator().manual_seed(pattern_seed)
    values = images[0].numel()
    # as many +1 as -1 in each sum, so that brightness does not decide it
    order = torch.rand(size * size, values, generator=rng).argsort(1)
    signs = torch.where(order < values // 2, 1, -1)
    # whole numbers in float64: the sums are exact, whatever the batch and the device
    levels = (255 * images).round().flatten(1).double()
    bits = levels @ signs.to(levels).T > 0
    patches = bits.view(-1, 1, size, size).to(images.dtype)
    return paste(images, patches, torch.ones_like(patches[:1]), corner, margin)
