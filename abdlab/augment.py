"""Random changes of image batches that leave their labels true; every draw is from a
given generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deliver(drawn: Tensor, device: str | torch.device) -> Tensor:
    """What a CPU generator drew, on the device: the one way there. A CUDA device gets
    it from pinned memory, and nobody waits.
    """
    if torch.device(device).type == "cuda" and not drawn.is_cuda:
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)


def new_seed(rng: torch.Generator) -> int:
    """A seed for something with draws of its own, drawn from this generator.

    >>> 0 <= new_seed(torch.Generator().manual_seed(0)) < 2**31
    True
    """
    return int(torch.randint(2**31, (), generator=rng))


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by its own random offset (zeros move in) and mirror half of
    them.

    Args:
        images: (N, C, H, W).
        shift: up to this many pixels in each direction; 0 leaves positions alone.
        flip: mirror left-right with probability 1/2.
        generator: a CPU generator; its draws are moved to the images' device.

    Returns:
        (N, C, H, W), a new tensor when anything was asked for.
    """
    n, _, height, width = images.shape
    if shift:
        padded = F.pad(images, [shift] * 4)
        offset = deliver(
            torch.randint(0, 2 * shift + 1, (2, n), generator=generator), images.device
        )
        rows = offset[0, :, None] + torch.arange(height, device=images.device)
        cols = offset[1, :, None] + torch.arange(width, device=images.device)
        index = torch.arange(n, device=images.device)[:, None, None]
        # contiguous(): strides that look like channels_last would put the whole network
        # in that format (see models.place)
        images = (
            padded[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()
        )
    if flip:
        mirrored = deliver(torch.rand(n, generator=generator) < 0.5, images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def resized_crops(images: Tensor, boxes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut a box of its own out of every image and stretch it to the images' size;
    differentiable to the images.

    One affine grid and one bilinear sampling for the whole batch, without smoothing.
    Where a box leaves the image there are zeros. On CUDA torch sums its gradient in no
    fixed order, so that last digits differ from run to run.

    Args:
        images: (N, C, H, W).
        boxes: (N, 4), top, left, height and width in pixels, not necessarily whole
            ones; (0, 0, H, W) is the image itself.
        mirrored: (N,) bool, which results are mirrored left-right.

    Returns:
        (N, C, H, W), a new tensor.
    """
    height, width = images.shape[-2:]
    top, left, tall, wide = boxes.to(images).unbind(1)
    # the grid's coordinates run from -1 at the image's left (upper) edge to 1 at its
    # right (lower) one
    across, down, zero = wide / width, tall / height, torch.zeros_like(top)
    shift_x, shift_y = (2 * left + wide) / width - 1, (2 * top + tall) / height - 1
    if mirrored is not None:
        across = torch.where(mirrored.to(images.device), -across, across)
    theta = torch.stack(
        [torch.stack([across, zero, shift_x], 1), torch.stack([zero, down, shift_y], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def random_views(
    images: Tensor,
    generator: torch.Generator,
    *,
    shift: int = 0,
    scale: Sequence[float] = (1.0, 1.0),
    ratio: Sequence[float] = (1.0, 1.0),
    flip: bool = False,
) -> Tensor:
    """Show every image through its own random box, stretched to the images' size, and
    mirror half of them; differentiable.

    Args:
        images: (N, C, H, W).
        generator: a CPU generator; its draws are moved to the images' device.
        shift: the box is then moved by up to this many whole pixels in each direction
            (zeros move in).
        scale: range of the box's share of the area, in (0, 1]; uniform. Its place
            inside the image is uniform, too.
        ratio: range of its relative width by its relative height; uniform in the
            logarithm. A side that would leave the image is cut to it (torchvision draws
            again).
        flip: mirror left-right with probability 1/2; False where a mirrored image is
            another one, as for digits.

    Returns:
        (N, C, H, W), a new tensor. All three off, it is the images up to round-off.
    """
    n, _, height, width = images.shape
    area, shape, y, x, mirror = torch.rand(5, n, generator=generator)
    area, shape = area * (scale[1] - scale[0]) + scale[0], ratio[0] * (ratio[1] / ratio[0]) ** shape
    tall, wide = (
        (area / shape).sqrt().clamp_max(1) * height,
        (area * shape).sqrt().clamp_max(1) * width,
    )
    moved = torch.randint(-shift, shift + 1, (2, n), generator=generator)
    boxes = torch.stack(
        [y * (height - tall) + moved[0], x * (width - wide) + moved[1], tall, wide], 1
    )
    return resized_crops(
        images,
        deliver(boxes, images.device),
        deliver(mirror < 0.5, images.device) if flip else None,
    )
