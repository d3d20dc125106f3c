"""Where a patch lies on an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.errors import did_you_mean

CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")


def paste(images: Tensor, patch: Tensor, mask: Tensor, corner: str, margin: int) -> Tensor:
    """Replace the pixels under ``mask`` in one corner; a patch larger than the image is
    cut.

    Args:
        patch, mask: (C, h, w), or (N, C, h, w) with each image its own.

    >>> white = torch.ones(1, 1, 1)
    >>> paste(torch.zeros(1, 1, 2, 2), white, white, "top_left", 0).flatten().tolist()
    [1.0, 0.0, 0.0, 0.0]

    Raises:
        ValueError: for an unknown corner, or a margin that leaves no room.
    """
    if corner not in CORNERS:
        raise ValueError(did_you_mean("corner", corner, CORNERS))
    if margin < 0:
        raise ValueError(f"margin must not be negative, not {margin}")
    height, width = images.shape[-2:]
    h, w = min(patch.shape[-2], height - margin), min(patch.shape[-1], width - margin)
    if h < 1 or w < 1:
        raise ValueError(
            f"a margin of {margin} pixels leaves no room for a trigger on {height}x{width} images"
        )
    vertical, horizontal = corner.split("_")
    bottom, right = vertical == "bottom", horizontal == "right"
    top = height - margin - h if bottom else margin
    left = width - margin - w if right else margin
    around = (left, width - left - w, top, height - top - h)
    patch, mask = F.pad(patch[..., :h, :w], around), F.pad(mask[..., :h, :w], around)
    return torch.where(mask > 0, patch.expand_as(images), images)
