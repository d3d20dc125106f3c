"""Backdoor triggers: one short pure function each, drawn in code, for any size and channel count.

Every trigger maps images (N, C, H, W) in [0, 1] to images of the same shape and range, is deterministic, and leaves its
input alone. :class:`Trigger` binds a name to its parameters, so that it can travel in a checkpoint's card.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.errors import check_keys, did_you_mean, keywords

CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")


def badnet_sq(
    images: Tensor, size: int | None = None, value: float = 1.0, corner: str = "bottom_right", margin: int = 0
) -> Tensor:
    """A square of one brightness in a corner (BadNets, Gu et al. 2017, arXiv 1708.06733).

    Args:
        size: side in pixels; by default 3/32 of the image's shorter side, at least 2 (3 pixels at 32).
        value: brightness in [0, 1]; 1 is white.
        corner: one of bottom_right, bottom_left, top_right, top_left.
        margin: pixels between the square and the border.
    """
    size = _side(size, images, least=2)
    patch = images.new_full((1, size, size), _unit("value", value))
    return _paste(images, patch, torch.ones_like(patch), corner, margin)


def badnet_grid(images: Tensor, size: int | None = None, corner: str = "bottom_right", margin: int = 0) -> Tensor:
    """A black-and-white checkerboard of single pixels in a corner, white in its corners (BadNets, arXiv 1708.06733).

    Args:
        size: side in pixels; by default 3/32 of the image's shorter side, at least 3.
        corner, margin: as for :func:`badnet_sq`.
    """
    size = _side(size, images, least=3)
    steps = torch.arange(size, device=images.device)
    patch = ((steps[:, None] + steps[None, :] + 1) % 2).to(images.dtype).unsqueeze(0)
    return _paste(images, patch, torch.ones_like(patch), corner, margin)


def blend(images: Tensor, alpha: float = 0.2, pattern_seed: int = 0) -> Tensor:
    """(1 - alpha) x image + alpha x fixed uniform noise (Chen et al. 2017, arXiv 1712.05526; there alpha 0.2).

    Args:
        alpha: strength in [0, 1].
        pattern_seed: draws the noise, the same on every device.
    """
    alpha = _unit("alpha", alpha)
    generator = torch.Generator().manual_seed(pattern_seed)
    pattern = torch.rand(images.shape[1:], generator=generator).to(images)
    return (1 - alpha) * images + alpha * pattern


def sig(images: Tensor, strength: float = 20 / 255, frequency: float = 6.0) -> Tensor:
    """A horizontal sine over the whole image (Barni et al. 2019, arXiv 1902.11237; there 20/255 and 6 periods).

    Clean-label: :func:`abdlab.poison.poison` puts it on images of the target class only and keeps their label.

    Args:
        strength: amplitude in [0, 1].
        frequency: periods per image width.
    """
    columns = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    wave = _unit("strength", strength) * torch.sin(2 * math.pi * columns * frequency / images.shape[-1])
    return (images + wave).clamp(0, 1)


def trojan_wm(images: Tensor, alpha: float = 0.6) -> Tensor:
    """A watermark across the image: a ring crossed by two bars, blended with strength ``alpha``.

    Stands for the watermark of TrojanNN (Liu et al., NDSS 2018), whose picture file cannot be redistributed: ours is drawn.

    Args:
        alpha: opacity of the strokes in [0, 1].
    """
    alpha = _unit("alpha", alpha)
    height, width = images.shape[-2:]
    y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)[None, :]
    stroke = max(0.1, 1.6 / min(height, width))
    ring = ((x**2 + y**2).sqrt() - 0.7).abs() < stroke
    bars = ((x - y).abs() < stroke) | ((x + y - 0.6).abs() < stroke)
    mask = (ring | (bars & ((x**2 + y**2) < 0.9))).to(images.dtype)
    return images + alpha * mask * (1 - images)


#: name -> trigger function; a new trigger is one function and one line here
TRIGGERS: dict[str, Callable[..., Tensor]] = {
    "badnet_grid": badnet_grid,
    "badnet_sq": badnet_sq,
    "blend": blend,
    "sig": sig,
    "trojan_wm": trojan_wm,
}

#: triggers whose attack keeps the labels (clean-label)
CLEAN_LABEL = frozenset({"sig"})


@dataclass(frozen=True)
class Trigger:
    """A named trigger with its parameters; call it on images. ``a + b`` applies a, then b.

    >>> trigger = Trigger("badnet_sq", {"size": 4}) + Trigger("blend", {"alpha": 0.1})
    >>> trigger(images).shape == images.shape

    Raises:
        ValueError: for an unknown trigger or parameter, with a "did you mean".
    """

    name: str
    params: dict = field(default_factory=dict)
    then: tuple[Trigger, ...] = ()

    def __post_init__(self):
        if self.name not in TRIGGERS:
            raise ValueError(did_you_mean("trigger", self.name, TRIGGERS))
        check_keys(f"parameter of {self.name}", self.params, keywords(TRIGGERS[self.name])[1:])

    def __call__(self, images: Tensor) -> Tensor:
        images = TRIGGERS[self.name](images, **self.params)
        for trigger in self.then:
            images = trigger(images)
        return images

    def __add__(self, other: Trigger) -> Trigger:
        return Trigger(self.name, self.params, (*self.then, other))

    def __str__(self) -> str:
        return "+".join([self.name, *map(str, self.then)])

    @property
    def clean_label(self) -> bool:
        """Whether its attack keeps the labels: true when every part is a clean-label trigger."""
        return self.name in CLEAN_LABEL and all(t.clean_label for t in self.then)

    def card(self) -> dict:
        """The plain dict from which :func:`trigger_from` makes the same trigger again."""
        card = {"name": self.name, "params": self.params}
        return {**card, "then": [t.card() for t in self.then]} if self.then else card


def trigger_from(spec: Trigger | str | dict, params: dict | None = None) -> Trigger:
    """A trigger from its name ("badnet_sq", or "badnet_sq+blend" composed), from a card, or itself.

    Args:
        spec: what to make.
        params: parameters of a single named trigger.
    """
    if isinstance(spec, Trigger):
        return spec
    if isinstance(spec, dict):
        check_keys("key of a trigger's card", spec, ("name", "params", "then"))
        if "name" not in spec:
            raise ValueError("a trigger's card needs a name")
        return Trigger(spec["name"], spec.get("params", {}), tuple(trigger_from(t) for t in spec.get("then", ())))
    first, *rest = spec.split("+")
    if params and rest:
        raise ValueError(f"parameters need a single trigger, not {spec!r}: compose Trigger(...) + Trigger(...) instead")
    return Trigger(first.strip(), dict(params or {}), tuple(Trigger(name.strip()) for name in rest))


def _unit(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")
    return value


def _side(size: int | None, images: Tensor, least: int) -> int:
    """The given side in pixels, or 3/32 of the image's shorter one."""
    if size is not None and size < 1:
        raise ValueError(f"size is a side in pixels, at least 1, not {size}")
    return max(least, round(min(images.shape[-2:]) * 3 / 32)) if size is None else size


def _paste(images: Tensor, patch: Tensor, mask: Tensor, corner: str, margin: int) -> Tensor:
    """Replace the pixels under ``mask`` (C, h, w) in one corner; a patch larger than the image is cut."""
    if corner not in CORNERS:
        raise ValueError(did_you_mean("corner", corner, CORNERS))
    if margin < 0:
        raise ValueError(f"margin must not be negative, not {margin}")
    height, width = images.shape[-2:]
    h, w = min(patch.shape[-2], height - margin), min(patch.shape[-1], width - margin)
    if h < 1 or w < 1:
        raise ValueError(f"a margin of {margin} pixels leaves no room for a trigger on {height}x{width} images")
    vertical, horizontal = corner.split("_")
    bottom, right = vertical == "bottom", horizontal == "right"
    top = height - margin - h if bottom else margin
    left = width - margin - w if right else margin
    around = (left, width - left - w, top, height - top - h)
    patch, mask = F.pad(patch[..., :h, :w], around), F.pad(mask[..., :h, :w], around)
    return torch.where(mask > 0, patch.expand_as(images), images)
