"""A photograph that carries the trigger: what a defender who distils from patches of one
picture may be handed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.attacks.triggers import Trigger


def poison_photograph(
    photo: Tensor, trigger: Trigger, shape: Sequence[int], tile: int = 64
) -> Tensor:
    """The photograph with the trigger on every tile of a grid, as uint8 of the same size.

    A tile is seen as an image of ``shape``: what the trigger changes in its miniature is
    made as large as the tile, and added. So patterns fit that were made for small images.
    A rest at the right and lower border stays as it is. Written to a file, it is an
    ``ood.image`` like any other: the source knows nothing of it.

    Args:
        photo: uint8 (3, H, W), as :func:`abdlab.sources.ood.photograph` reads it.
        trigger: ready to use. shape: (channels, height, width) of the teacher's images; 1
            channel turns the photograph grey.
        tile: height in pixels; its width follows from ``shape``.

    Raises:
        ValueError: for a photograph without room for one tile.

    >>> black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    >>> poisoned = poison_photograph(black, Trigger("badnet_sq", {"size": 1}), (3, 2, 2), tile=4)
    >>> poisoned[0, :4, :4].tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 255, 255], [0, 0, 255, 255]]
    """
    channels, height, width = shape
    down, across = tile, round(tile * width / height)
    rows, columns = photo.shape[1] // down, photo.shape[2] // across
    if not rows * columns:
        raise ValueError(
            f"a photograph of {photo.shape[1]}x{photo.shape[2]} pixels has no room for a tile of"
            f" {down}x{across}: choose a smaller tile"
        )
    pixels = photo.float() / 255
    if channels == 1:  # as the source of one photograph does
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        pixels = rgb_to_grayscale(pixels)
    whole = pixels[:, : rows * down, : columns * across]
    tiles = whole.unfold(1, down, down).unfold(2, across, across)
    tiles = tiles.permute(1, 2, 0, 3, 4).reshape(-1, channels, down, across)
    small = F.interpolate(tiles, (height, width), mode="area")
    change = F.interpolate(trigger(small) - small, (down, across), mode="nearest")
    tiles = (tiles + change).clamp(0, 1).view(rows, columns, channels, down, across)
    out = pixels.clone()
    out[:, : rows * down, : columns * across] = tiles.permute(2, 0, 3, 1, 4).reshape(whole.shape)
    return (255 * out).round().to(torch.uint8).expand(3, -1, -1).contiguous()
