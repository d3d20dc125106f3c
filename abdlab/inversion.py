"""Universal triggers inverted from a model and synthetic images, what each class costs
in each family of triggers, and how far below the others that is. No data.

After Neural Cleanse (Wang et al., S&P 2019), in four families instead of one, and all
of them in one batch: a trigger is one row of stacked tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.errors import check_keys
from abdlab.features import frozen, mode

#: family -> by how much, as a logarithm, the cheapest class of a clean network may be
#: below the next: two of 20 clean digits teachers exceed this. What is cheap by nature
#: is so in one family: on digits 5 as a stamp, 8 as a blend. Waves are left out: they
#: told no target that the others did not.
SCALES = {"stamp": 0.52, "additive": 0.31, "blend": 0.43}


@dataclass(frozen=True)
class Family:
    """One kind of universal trigger, as functions on stacked rows (triggers, ...).

    Attributes:
        start: (triggers, shape, draw) -> the rows' start values, where ``draw(*size)``
            is Gaussian noise.
        put: (images (triggers, n, C, H, W), values) -> the same images with them.
        size: values -> (triggers,), how visible each is, between 0 and about 1.
        penalty: nats per unit of size. lr: of Adam, on the values.
    """

    start: Callable[[int, tuple[int, int, int], Callable[..., Tensor]], tuple[Tensor, ...]]
    put: Callable[[Tensor, Sequence[Tensor]], Tensor]
    size: Callable[[Sequence[Tensor]], Tensor]
    penalty: float
    lr: float


@lru_cache
def low_cosines(height: int, width: int) -> Tensor:
    """The lowest orthonormal DCT-II images (waves, H, W): those with u / H + v / W up
    to .4, so that a wave of six periods per 32 pixels is in it.

    >>> low_cosines(16, 16).shape
    torch.Size([28, 16, 16])
    """

    def waves(n: int) -> Tensor:
        positions, numbers = torch.arange(n) + 0.5, torch.arange(n)
        basis = torch.cos(math.pi / n * numbers[:, None] * positions) * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
        return basis

    down, across = waves(height), waves(width)
    low = [
        (u, v)
        for u in range(height)
        for v in range(width)
        if round(100 * (u / height + v / width)) <= 40
    ]
    return torch.stack([torch.outer(down[u], across[v]) for u, v in low])


def _rms(delta: Tensor) -> Tensor:
    """(triggers,): root mean square over all but the first dimension."""
    return delta.flatten(1).square().mean(1).clamp_min(1e-12).sqrt()


def _stamp_start(n, shape, draw):
    return draw(n, 1, *shape[1:]) * 0.5 - 1, draw(n, *shape) * 0.5


def _stamp(images, values):
    mask, pattern = (value.sigmoid().unsqueeze(1) for value in values)
    return (1 - mask) * images + mask * pattern


def _additive_start(n, shape, draw):
    return (draw(n, *shape) * 0.02,)


def _additive(images, values):
    return (images + values[0].unsqueeze(1)).clamp(0, 1)


def _blend_start(n, shape, draw):
    return draw(n, 1, 1, 1) * 0.1 - 1.5, draw(n, *shape) * 0.5


def _frequency_start(n, shape, draw):
    waves = len(low_cosines(*shape[1:]))
    return draw(n, shape[0], waves) * 0.02, torch.empty(n, 0, *shape[1:])


def _waves(values: Sequence[Tensor]) -> Tensor:
    """The images (triggers, C, H, W) of DCT coefficients (triggers, C, waves); the
    second value is empty and knows the images' size.
    """
    coefficients, empty = values
    basis = low_cosines(*empty.shape[2:]).to(coefficients)
    return torch.einsum("ncw,whv->nchv", coefficients, basis)


def _frequency(images, values):
    return (images + _waves(values).unsqueeze(1)).clamp(0, 1)


#: What is inverted. Sizes are the mask's mean (stamp), the root mean square in pixel
#: units (additive, frequency) and the share of the pattern (blend): none depends on the
#: image's size, so that the penalties hold for 16x16 digits and for 32x32 photographs.
FAMILIES: dict[str, Family] = {
    "stamp": Family(_stamp_start, _stamp, lambda v: v[0].sigmoid().flatten(1).mean(1), 12.0, 0.3),
    "additive": Family(_additive_start, _additive, lambda v: _rms(v[0]), 5.0, 0.05),
    "blend": Family(_blend_start, _stamp, lambda v: v[0].sigmoid().flatten(1).mean(1), 5.0, 0.15),
    "frequency": Family(_frequency_start, _frequency, lambda v: _rms(_waves(v)), 2.5, 0.15),
}


@dataclass(frozen=True)
class Inverted:
    """One inverted trigger, a function on images (B, C, H, W) in [0, 1].

    Attributes:
        family: a key of :data:`FAMILIES`. target: the class that it calls.
        values: the family's tensors, one row each.
        cost: mean cross-entropy with the target + penalty x size, in nats.
        size: in the family's unit.
    """

    family: str
    target: int
    values: tuple[Tensor, ...]
    cost: float
    size: float

    def __call__(self, images: Tensor) -> Tensor:
        values = [value.to(images.device) for value in self.values]
        return FAMILIES[self.family].put(images.unsqueeze(0), values)[0]


@dataclass(frozen=True)
class Bank:
    """A number of inverted triggers, for one or several targets."""

    triggers: tuple[Inverted, ...] = ()

    def __len__(self) -> int:
        return len(self.triggers)

    def __iter__(self) -> Iterator[Inverted]:
        return iter(self.triggers)

    def __add__(self, other: Bank) -> Bank:
        return Bank(self.triggers + other.triggers)

    @property
    def targets(self) -> list[int]:
        """The classes that they call, in order."""
        return sorted({trigger.target for trigger in self.triggers})

    def of(self, target: int) -> Bank:
        """Those that call one class."""
        return Bank(tuple(t for t in self.triggers if t.target == target))

    def latest(self, size: int) -> Bank:
        """The last ``size`` of them."""
        return Bank(self.triggers[max(0, len(self) - size) :])

    def on(self, images: Tensor, rng: torch.Generator, strength: float = 1.0) -> Tensor:
        """The images (B, C, H, W), each with one of the triggers, drawn from ``rng``.

        Args:
            strength: stamps change an image 1 to so many times as much, evenly drawn, as
                far as [0, 1] allows. An inverted trigger is the least that works; an
                attacker's is more.

        Raises:
            ValueError: for an empty bank.
        """
        if not self.triggers:
            raise ValueError("an empty bank has no trigger to put on images")
        which = torch.randint(len(self), (len(images),), generator=rng)
        factors = None
        if strength > 1:
            drawn = torch.rand(len(images), 1, 1, 1, generator=rng)
            factors = deliver(1 + (strength - 1) * drawn, images.device)
        out = images.clone()
        for i in which.unique().tolist():
            rows = deliver((which == i).nonzero().flatten(), images.device)
            plain, trigger = images[rows], self.triggers[i]
            put = trigger(plain)
            if factors is not None and trigger.family == "stamp":
                put = (plain + factors[rows] * (put - plain)).clamp(0, 1)
            out[rows] = put
        return out

    def state(self) -> list[dict]:
        """All of it, as lists and dicts of tensors and numbers."""
        return [
            {
                "family": t.family,
                "target": t.target,
                "values": list(t.values),
                "cost": t.cost,
                "size": t.size,
            }
            for t in self.triggers
        ]

    @classmethod
    def from_state(cls, state: Sequence[Mapping], device: str | torch.device = "cpu") -> Bank:
        """What :meth:`state` wrote."""
        return cls(
            tuple(
                Inverted(**{**row, "values": tuple(v.to(device) for v in row["values"])})
                for row in state
            )
        )


def _picks(others: Sequence[Tensor], n: int, rng: torch.Generator) -> Tensor:
    """(triggers, n) indices, each trigger's drawn from its own ``others``."""
    return torch.stack([rows[torch.randint(len(rows), (n,), generator=rng)] for rows in others])


def _carried(
    rows: Sequence[tuple[str, list[int], tuple[Tensor, ...]]], images: Tensor
) -> tuple[Tensor, Tensor]:
    """(images (triggers, n, C, H, W) with each its own trigger, penalty x size of each
    in nats) for rows of (family, their targets, their values).
    """
    parts, penalties, at = [], [], 0
    for name, targets, values in rows:
        family = FAMILIES[name]
        parts.append(family.put(images[at : at + len(targets)], values))
        penalties.append(family.penalty * family.size(values))
        at += len(targets)
    return torch.cat(parts), torch.cat(penalties)


def invert(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int],
    *,
    families: Sequence[str] = tuple(FAMILIES),
    starts: int = 1,
    steps: int = 60,
    batch: int = 16,
    seed: int = 0,
    warm: Bank | None = None,
) -> Bank:
    """For each target and family the cheapest universal triggers that turn other images
    into the target, all of them in the same forward passes.

    By Adam on mean cross-entropy with the target + the family's penalty x size. Each
    step draws other images for each trigger. A trigger's cost is the mean over the last
    quarter of the steps.

    Args:
        model: in eval mode inside; neither it nor its weights change.
        images: (N, C, H, W) in [0, 1]; those that the model predicts as a target are
            not used for that target.
        targets: classes. families: keys of :data:`FAMILIES`.
        starts: triggers of each target and family, from random starts.
        steps: of Adam. batch: images per trigger and step.
        warm: further triggers to go on from, besides the new ones.

    Returns:
        targets x families x starts triggers in that order, then the warm ones.

    Raises:
        ValueError: for an unknown family, or when every image is already a target.
    """
    for family in families:
        check_keys("family of triggers", [family], FAMILIES)
    rng, device, shape = torch.Generator().manual_seed(seed), images.device, images.shape[1:]
    with torch.no_grad(), mode(model, training=False):
        predicted = torch.cat([model(part).argmax(1) for part in images.split(256)]).cpu()
    for target in targets:
        if bool((predicted == target).all()):
            raise ValueError(
                f"all {len(images)} images are class {target} already: nothing shows what would"
                " turn another one into it"
            )

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    rows: list[tuple[str, list[int], tuple[Tensor, ...]]] = []
    for family in dict.fromkeys([*families, *(t.family for t in warm or ())]):
        wanted = [t for t in targets for _ in range(starts)] if family in families else []
        values = FAMILIES[family].start(len(wanted), tuple(shape), draw)
        old = [t for t in warm or () if t.family == family]
        values = tuple(
            torch.cat([value.to(device), *(t.values[i].to(device) for t in old)])
            for i, value in enumerate(values)
        )
        rows.append((family, [*wanted, *(t.target for t in old)], values))
    for _, _, values in rows:
        for value in values:
            value.requires_grad_()
    labels = torch.tensor([target for _, wanted, _ in rows for target in wanted])
    others = [(predicted != target).nonzero().flatten() for target in labels.tolist()]
    adam = Adam([{"params": list(v), "lr": FAMILIES[family].lr} for family, _, v in rows])
    trained = [value for _, _, values in rows for value in values if value.numel()]
    late, counted = torch.zeros(len(labels), device=device), 0
    wanted = deliver(labels.repeat_interleave(batch), device)
    with mode(model, training=False), frozen(model):
        for step in range(steps):
            picked = images[deliver(_picks(others, batch, rng), device).flatten()]
            picked = picked.unflatten(0, (len(labels), batch))
            triggered, penalties = _carried(rows, picked)
            logits = model(triggered.flatten(0, 1))
            each = F.cross_entropy(logits, wanted, reduction="none").unflatten(0, (-1, batch))
            costs = each.mean(1) + penalties
            for value, grad in zip(trained, torch.autograd.grad(costs.sum(), trained), strict=True):
                value.grad = grad
            adam.step()
            if step >= steps - max(1, steps // 4):
                late, counted = late + costs.detach(), counted + 1
    costs, new, old = iter((late / max(1, counted)).tolist()), {}, []
    for family, targets_, values in rows:
        sizes = FAMILIES[family].size(values).tolist()
        fresh = len(targets) * starts if family in families else 0
        for i, target in enumerate(targets_):
            row = tuple(value.detach()[i : i + 1].clone() for value in values)
            trigger = Inverted(family, target, row, next(costs), sizes[i])
            (new.setdefault((target, family), []) if i < fresh else old).append(trigger)
    return Bank((*(t for c in targets for f in families for t in new[c, f]), *old))


def costs(
    model: nn.Module,
    images: Tensor,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    steps: int = 40,
    batch: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Bank]:
    """What the cheapest trigger of every class costs in every family.

    Args: those of :func:`invert`.

    Returns:
        (costs in nats (classes, families), the bank that they were read from)
    """
    with torch.no_grad(), mode(model, training=False):
        classes = model(images[:2]).shape[1]
    bank = invert(
        model, images, range(classes), families=families, steps=steps, batch=batch, seed=seed
    )
    table = torch.tensor([t.cost for t in bank]).view(classes, len(families))
    return table, bank


def leads(table: Tensor, rivals: int = 3) -> Tensor:
    """How far each class's cost is below that of the cheapest others, in each family
    (classes, families): mean logarithm of the ``rivals`` cheapest others' costs less its
    own. A factor of two is .69.

    >>> leads(torch.tensor([[1.0], [2.0], [2.0], [2.0]]))[:, 0]
    tensor([ 0.6931, -0.2310, -0.2310, -0.2310])
    """
    logs = table.clamp_min(1e-6).log()
    found = []
    for c in range(len(logs)):
        others = torch.cat([logs[:c], logs[c + 1 :]]).sort(0).values
        found.append(others[:rivals].mean(0) - logs[c])
    return torch.stack(found)


def outlier_index(table: Tensor) -> Tensor:
    """How suspiciously cheap each class is, (classes,): the mean of its two largest
    :func:`leads` among the families of :data:`SCALES`, each in that family's scale. Two,
    since a local trigger is cheap both as a stamp and as an addition, and what is cheap
    by nature is so in one family.

    Args:
        table: (classes, families) in nats, families in the order of :data:`FAMILIES`.

    >>> table = torch.tensor([[1.0, 1.0, 9.0, 1.0], [2.0, 2.0, 9.0, 1.0], [2.0, 2.0, 9.0, 1.0]])
    >>> outlier_index(table)
    tensor([ 1.7845, -0.3332, -0.3332])
    """
    columns = [[*FAMILIES].index(family) for family in SCALES]
    found = leads(table[:, columns]) / torch.tensor([*SCALES.values()]).to(table)
    return found.topk(2, dim=1).values.mean(1)
