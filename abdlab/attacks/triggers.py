"""Backdoor triggers: one short pure function each, drawn in code, for any size and
channel count.

Every trigger maps images (N, C, H, W) in [0, 1] to images of the same shape and range,
is deterministic, and leaves its input alone. :class:`Trigger` binds a name to its
parameters, so that it can travel in a checkpoint's card. The optimised triggers carry
what :func:`abdlab.attacks.optimize.optimize` found as one such parameter, ``pattern``: a string
(:mod:`abdlab.attacks.patterns`), so that their card stays plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abdlab.attacks.image_wise import image_patch, wanet
from abdlab.attacks.joint import masked
from abdlab.attacks.patches import CORNERS as CORNERS
from abdlab.attacks.patches import paste
from abdlab.attacks.patterns import pack as pack
from abdlab.attacks.patterns import unpack
from abdlab.errors import check_keys, did_you_mean, keywords


def badnet_sq(
    images: Tensor,
    size: int | None = None,
    value: float = 1.0,
    corner: str = "bottom_right",
    margin: int = 0,
) -> Tensor:
    """A square of one brightness in a corner (BadNets, Gu et al. 2017, arXiv
    1708.06733).

    Args:
        size: side in pixels; by default 3/32 of the image's shorter side, at least 2 (3
            pixels at 32).
        value: brightness in [0, 1]; 1 is white.
        corner: one of bottom_right, bottom_left, top_right, top_left.
        margin: pixels between the square and the border.

    >>> badnet_sq(torch.zeros(1, 1, 8, 8), size=2).sum().item()
    4.0
    """
    size = _side(size, images, least=2)
    patch = images.new_full((1, size, size), _unit("value", value))
    return paste(images, patch, torch.ones_like(patch), corner, margin)


def badnet_grid(
    images: Tensor, size: int | None = None, corner: str = "bottom_right", margin: int = 0
) -> Tensor:
    """A black-and-white checkerboard of single pixels in a corner, white in its corners
    (BadNets, arXiv 1708.06733).

    Args:
        size: side in pixels; by default 3/32 of the image's shorter side, at least 3.
        corner, margin: as for :func:`badnet_sq`.

    >>> badnet_grid(torch.zeros(1, 1, 8, 8), size=3)[0, 0, 5:, 5:].int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    size = _side(size, images, least=3)
    steps = torch.arange(size, device=images.device)
    patch = ((steps[:, None] + steps[None, :] + 1) % 2).to(images.dtype).unsqueeze(0)
    return paste(images, patch, torch.ones_like(patch), corner, margin)


def blend(images: Tensor, alpha: float = 0.2, pattern_seed: int = 0) -> Tensor:
    """(1 - alpha) x image + alpha x fixed uniform noise (Chen et al. 2017, arXiv
    1712.05526; there alpha 0.2).

    Args:
        alpha: strength in [0, 1].
        pattern_seed: draws the noise, the same on every device.

    >>> one, other = blend(torch.rand(2, 3, 8, 8), alpha=1.0)
    >>> torch.equal(one, other)  # nothing but the noise is left
    True
    """
    alpha = _unit("alpha", alpha)
    generator = torch.Generator().manual_seed(pattern_seed)
    pattern = torch.rand(images.shape[1:], generator=generator).to(images)
    return (1 - alpha) * images + alpha * pattern


def sig(images: Tensor, strength: float = 20 / 255, frequency: float = 6.0) -> Tensor:
    """A horizontal sine over the whole image (Barni et al. 2019, arXiv 1902.11237;
    there 20/255 and 6 periods).

    Clean-label: :func:`abdlab.attacks.poison.poison` puts it on images of the target class only
    and keeps their label.

    Args:
        strength: amplitude in [0, 1].
        frequency: periods per image width.

    >>> wave = sig(torch.full((1, 1, 8, 8), 0.5), strength=0.1, frequency=2)
    >>> round(wave.min().item(), 3), round(wave.max().item(), 3)
    (0.4, 0.6)
    """
    columns = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    wave = _unit("strength", strength) * torch.sin(
        2 * math.pi * columns * frequency / images.shape[-1]
    )
    return (images + wave).clamp(0, 1)


def trojan_wm(images: Tensor, alpha: float = 0.6) -> Tensor:
    """A watermark across the image: a ring crossed by two bars, blended with strength
    ``alpha``.

    Stands for the watermark of TrojanNN (Liu et al., NDSS 2018), whose picture file
    cannot be redistributed: ours is drawn.

    Args:
        alpha: opacity of the strokes in [0, 1].

    >>> marked = trojan_wm(torch.zeros(1, 3, 32, 32), alpha=0.5)
    >>> marked.unique().tolist()
    [0.0, 0.5]
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


def trojan_3x3(
    images: Tensor, pattern: str | None = None, corner: str = "bottom_right", margin: int = 0
) -> Tensor:
    """A patch of 3x3 pixels that excites chosen neurons of a clean model (TrojanNN, Liu
    et al., NDSS 2018).

    Args:
        pattern: packed levels (C, 3, 3), 0 to 255, from
            :func:`abdlab.attacks.optimize.optimize`.
        corner, margin: as for :func:`badnet_sq`; a patch larger than the image is cut.

    Raises:
        ValueError: without a pattern, or with one of another shape.

    >>> white = pack(torch.full((1, 3, 3), 255))
    >>> trojan_3x3(torch.zeros(1, 1, 8, 8), pattern=white).sum().item()
    9.0
    """
    return _trojan(images, "trojan_3x3", 3, pattern, corner, margin)


def trojan_8x8(
    images: Tensor, pattern: str | None = None, corner: str = "bottom_right", margin: int = 0
) -> Tensor:
    """A patch of 8x8 pixels that excites chosen neurons of a clean model, otherwise as
    :func:`trojan_3x3`.

    >>> white = pack(torch.full((1, 8, 8), 255))
    >>> trojan_8x8(torch.zeros(1, 1, 16, 16), pattern=white).sum().item()
    64.0
    """
    return _trojan(images, "trojan_8x8", 8, pattern, corner, margin)


def cl(images: Tensor, size: int | None = None, margin: int = 0) -> Tensor:
    """A black-and-white grid in each of the four corners (label-consistent attack,
    Turner et al. 2019, arXiv 1912.02771).

    Clean-label: :func:`abdlab.attacks.poison.poison` puts it on images of the target class
    only, keeps their label, and first perturbs them against a clean model, so that what
    is left to learn from is the trigger. Test images get the grids alone.

    Args:
        size, margin: as for :func:`badnet_grid`.

    >>> cl(torch.zeros(1, 1, 16, 16), size=3).sum().item()  # 5 white pixels in each corner
    20.0
    """
    for corner in CORNERS:
        images = badnet_grid(images, size, corner, margin)
    return images


def l2_inv(images: Tensor, pattern: str | None = None) -> Tensor:
    """A faint change of every pixel, small in l2 (Li et al., TDSC 2020, arXiv
    1909.02742, "optimised with l2 regularisation").

    Args:
        pattern: packed levels (C, H, W), -255 to 255, added in steps of 1/255, from
            :func:`abdlab.attacks.optimize.optimize`.

    Raises:
        ValueError: without a pattern, or with one of another shape than the images.

    >>> faint = pack(torch.full((1, 8, 8), 51))
    >>> round(l2_inv(torch.zeros(1, 1, 8, 8), pattern=faint).mean().item(), 3)
    0.2
    """
    return _added("l2_inv", pattern, images)


def l0_inv(images: Tensor, pattern: str | None = None) -> Tensor:
    """A few pixels replaced, at the same places in every image (Li et al., TDSC 2020,
    arXiv 1909.02742, the l0 variant).

    Args:
        pattern: packed levels (C, H, W), 0 to 255 where a pixel is replaced and -1
            where it stays, from :func:`abdlab.attacks.optimize.optimize`.

    Raises:
        ValueError: without a pattern, or with one of another shape than the images.

    >>> levels = torch.full((1, 8, 8), -1)
    >>> levels[0, 0, 0] = 255
    >>> l0_inv(torch.zeros(1, 1, 8, 8), pattern=pack(levels)).sum().item()
    1.0
    """
    levels = _levels("l0_inv", pattern, images, images.shape[1:])
    return torch.where(levels < 0, images, (levels / 255).clamp(0, 1))


def smooth(images: Tensor, pattern: str | None = None) -> Tensor:
    """A low-frequency change of the whole image (Zeng et al., ICCV 2021, arXiv
    2104.03413).

    Args:
        pattern: packed levels (C, k, k), from :func:`abdlab.attacks.optimize.optimize`: the
            weights, in steps of 1/255, of the k x k lowest cosines, cos(pi (y + 1/2) u
            / H) cos(pi (x + 1/2) v / W) for u, v < k. All other coefficients of its
            discrete cosine transform are zero, and it fits images of any height and
            width from k on.

    Raises:
        ValueError: without a pattern, or with one for other channels or larger images.

    >>> brighter = pack(torch.full((1, 1, 1), 51))  # one cosine: brightness
    >>> round(smooth(torch.zeros(1, 1, 8, 8), pattern=brighter).mean().item(), 3)
    0.2
    """
    levels = _levels("smooth", pattern, images)
    k, sides = levels.shape[-1], images.shape[-2:]
    if levels.shape != (images.shape[1], k, k) or k > min(sides):
        raise ValueError(_misfit("smooth", levels.shape, images))
    return (images + cosines(levels / 255, *sides)).clamp(0, 1)


def weak(images: Tensor, pattern: str | None = None) -> Tensor:
    """A faint change of every pixel, bounded in each (BackWeak, arXiv 2511.12046, where
    a benign teacher is fine-tuned with it at a low rate: ``teacher.tune``).

    Args:
        pattern: packed levels as for :func:`l2_inv`, which also says what is raised.

    >>> faint = pack(torch.full((1, 8, 8), 8))
    >>> round(255 * weak(torch.zeros(1, 1, 8, 8), pattern=faint).max().item(), 3)
    8.0
    """
    return _added("weak", pattern, images)


def adba(images: Tensor, pattern: str | None = None) -> Tensor:
    """(1 - mask) x image + mask x pattern, both found while a teacher and a shadow student
    learn (ADBA, Ge et al., ACM MM 2021).

    Args:
        pattern: packed levels (C + 1, H, W), from :func:`abdlab.attacks.optimize.optimize`,
            in steps of 1/255: the pattern, and the mask last.

    Raises:
        ValueError: without a pattern, or with one of another shape than the images.

    >>> half = pack(torch.tensor([[[255, 255]], [[51, 0]]]))
    >>> round(adba(torch.zeros(1, 1, 1, 2), pattern=half).sum().item(), 3)
    0.2
    """
    levels = _levels("adba", pattern, images)
    fits = (len(levels) - 1, *levels.shape[1:])
    if fits != images.shape[1:]:
        raise ValueError(_misfit("adba", fits, images))
    return masked(images, (levels / 255).clamp(0, 1))


def cosines(weights: Tensor, height: int, width: int) -> Tensor:
    """The sum (C, height, width) of the lowest k x k two-dimensional cosines, each with
    its weight (C, k, k).
    """

    def basis(side: int) -> Tensor:
        places = torch.arange(side, device=weights.device, dtype=weights.dtype) + 0.5
        return torch.cos(
            math.pi / side * torch.arange(weights.shape[-1]).to(weights)[:, None] * places
        )

    return basis(height).T @ weights @ basis(width)


#: name -> trigger function; a new trigger is one function and one line here
TRIGGERS: dict[str, Callable[..., Tensor]] = {
    "badnet_grid": badnet_grid,
    "badnet_sq": badnet_sq,
    "blend": blend,
    "sig": sig,
    "trojan_wm": trojan_wm,
    "trojan_3x3": trojan_3x3,
    "trojan_8x8": trojan_8x8,
    "cl": cl,
    "l2_inv": l2_inv,
    "l0_inv": l0_inv,
    "smooth": smooth,
    "weak": weak,
    "adba": adba,
    "wanet": wanet,
    "image_patch": image_patch,
}

#: triggers whose attack keeps the labels (clean-label)
CLEAN_LABEL = frozenset({"sig", "cl"})
#: triggers whose pattern is optimised against a clean model (:mod:`abdlab.attacks.optimize`)
OPTIMISED = frozenset({"trojan_3x3", "trojan_8x8", "l2_inv", "l0_inv", "smooth", "weak", "adba"})
#: clean-label triggers whose poisoned images are first perturbed against a clean model
ADVERSARIAL = frozenset({"cl"})


@dataclass(frozen=True)
class Trigger:
    """A named trigger with its parameters; call it on images. ``a + b`` applies a, then
    b.

    >>> trigger = Trigger("badnet_sq", {"size": 4}) + Trigger("blend", {"alpha": 0.1})
    >>> images = torch.rand(2, 3, 8, 8)
    >>> trigger(images).shape == images.shape
    True

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
        """Whether its attack keeps the labels: true when every part is a clean-label
        trigger.
        """
        return self.name in CLEAN_LABEL and all(t.clean_label for t in self.then)

    @property
    def adversarial(self) -> bool:
        """Whether its clean-label attack perturbs the images against a clean model
        first: true when any part is such a one.
        """
        return self.name in ADVERSARIAL or any(t.adversarial for t in self.then)

    @property
    def needs_pattern(self) -> bool:
        """Whether a part is an optimised trigger that has not been optimised yet."""
        return (self.name in OPTIMISED and not self.params.get("pattern")) or any(
            t.needs_pattern for t in self.then
        )

    def card(self) -> dict:
        """The plain dict from which :func:`trigger_from` makes the same trigger again."""
        card = {"name": self.name, "params": self.params}
        return {**card, "then": [t.card() for t in self.then]} if self.then else card


def trigger_from(spec: Trigger | str | dict, params: dict | None = None) -> Trigger:
    """A trigger from its name ("badnet_sq", or "badnet_sq+blend" composed), from a
    card, or itself.

    Args:
        spec: what to make.
        params: parameters of a single named trigger.

    >>> str(trigger_from("badnet_sq+blend"))
    'badnet_sq+blend'

    Raises:
        ValueError: for an unknown trigger, parameter or key, or parameters of a
            composed name.
    """
    if isinstance(spec, Trigger):
        return spec
    if isinstance(spec, dict):
        check_keys("key of a trigger's card", spec, ("name", "params", "then"))
        if "name" not in spec:
            raise ValueError("a trigger's card needs a name")
        return Trigger(
            spec["name"],
            spec.get("params", {}),
            tuple(trigger_from(t) for t in spec.get("then", ())),
        )
    first, *rest = spec.split("+")
    if params and rest:
        raise ValueError(
            f"parameters need a single trigger, not {spec!r}: compose Trigger(...) + Trigger(...)"
            " instead"
        )
    return Trigger(first.strip(), dict(params or {}), tuple(Trigger(name.strip()) for name in rest))


def _added(name: str, pattern: str | None, images: Tensor) -> Tensor:
    """The images with a pattern of their size added, in steps of 1/255."""
    return (images + _levels(name, pattern, images, images.shape[1:]) / 255).clamp(0, 1)


def _levels(
    name: str, pattern: str | None, images: Tensor, shape: torch.Size | tuple | None = None
) -> Tensor:
    """The pattern's levels, in the images' own type and on their device."""
    if not pattern:
        raise ValueError(
            f"{name} is optimised against a clean model and has no pattern yet: make it with"
            f" abdlab.optimize({name!r}, model, images, labels, target), or with"
            " abdlab.prepare(run, chosen, data) for a run's settings"
        )
    levels = unpack(pattern)
    if levels.ndim != 3 or (shape is not None and levels.shape != torch.Size(shape)):
        raise ValueError(_misfit(name, levels.shape, images))
    return levels.to(images)


def _misfit(name: str, shape: tuple[int, ...], images: Tensor) -> str:
    given, wanted = ("x".join(map(str, sides)) for sides in (shape, images.shape[1:]))
    return (
        f"this {name} was optimised for other images: its pattern is {given}, and the images are"
        f" {wanted}"
    )


def _trojan(
    images: Tensor, name: str, side: int, pattern: str | None, corner: str, margin: int
) -> Tensor:
    patch = (_levels(name, pattern, images, (images.shape[1], side, side)) / 255).clamp(0, 1)
    return paste(images, patch, torch.ones_like(patch), corner, margin)


def _unit(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")
    return value


def _side(size: int | None, images: Tensor, least: int) -> int:
    """The given side in pixels, or 3/32 of the image's shorter one."""
    if size is not None and size < 1:
        raise ValueError(f"size is a side in pixels, at least 1, not {size}")
    return max(least, round(min(images.shape[-2:]) * 3 / 32)) if size is None else size
