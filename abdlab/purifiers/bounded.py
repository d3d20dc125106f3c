"""Bounded activations: no unit of a network may leave the range that its own statistics
say it has on its training data. A trigger has to leave it to win.

Nearest in print: activation clipping (MM-BM, Wang, Miller and Kesidis), which learns
the bounds from clean images. Ours needs neither images nor training.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from abdlab.data import new_seed
from abdlab.features import mode, record
from abdlab.purifiers.pool import rough_pool
from abdlab.purifiers.purifier import Purifier, same_weights

#: what k is chosen from, in standard deviations
KS = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 5.0)

#: The share of rough synthetic images (:func:`abdlab.purifiers.pool.rough_pool`) on
#: which a bounded teacher is to predict what it predicts without, where no purifier
#: came before and where one did. Chosen on badnet_sq's teachers of digits (k = 2.05) and
#: CIFAR-10 (2.72) and on blend's of digits: notebooks/studies/tuning_purifiers.md.
ALONE, AFTER = 0.7, 0.9


class _Clamp(torch.autograd.Function):
    """x within [low, high]. For the gradient it keeps which values stayed; torch's own
    compares with both bounds anew, which takes as long as the batch norm itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, low, high):
        return torch.clamp(x, low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output == inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        (stayed,) = ctx.saved_tensors
        return gradient * stayed, None, None


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x within [low, high]. Bounds may be learned: torch's own clamp knows how."""
    learned = low.requires_grad or high.requires_grad
    if torch.is_grad_enabled() and x.requires_grad and not learned:
        return _Clamp.apply(x, low, high)
    return torch.clamp(x, low, high)


class BoundedBatchNorm(nn.BatchNorm2d):
    """A batch norm whose normalised value is clamped to [-k, k] before scale and shift.

    It stays a batch norm, with its names and running statistics, and has one buffer
    more, ``k``, so that a file says what it holds.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            z = nn.functional.batch_norm(
                x,
                self.running_mean if self.track_running_stats else None,
                self.running_var if self.track_running_stats else None,
                None,
                None,
                True,
                self.momentum or 0.0,
                self.eps,
            ).clamp(-self.k, self.k)
            return z if self.weight is None else z * _channels(self.weight) + _channels(self.bias)
        reach = self.k * (self.running_var + self.eps).sqrt()
        low, high = _channels(self.running_mean - reach), _channels(self.running_mean + reach)
        return super().forward(_clamp(x, low, high))


class _Clamped:
    """Clamps the outputs of any layer to [low, high] per channel, both buffers."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return _clamp(out, _channels(self.low, out), _channels(self.high, out))


class BoundedGroupNorm(_Clamped, nn.GroupNorm):
    """A group norm whose outputs stay within recorded bounds."""


class BoundedLayerNorm(_Clamped, nn.LayerNorm):
    """A layer norm whose outputs stay within recorded bounds (of its last dimension)."""


class BoundedConv2d(_Clamped, nn.Conv2d):
    """A convolution whose outputs stay within recorded bounds."""


#: plain class -> bounded class, of layers that have no statistics of their own
RECORDED = {
    nn.GroupNorm: BoundedGroupNorm,
    nn.LayerNorm: BoundedLayerNorm,
    nn.Conv2d: BoundedConv2d,
}


def _channels(value: Tensor, like: Tensor | None = None) -> Tensor:
    """(C,) as (1, C, 1, 1); as the last dimension where ``like`` has it there."""
    if like is not None and (like.ndim != 4 or like.shape[1] != len(value)):
        return value
    return value.view(1, -1, 1, 1)


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms with running statistics, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None
    }


def boundable(model: nn.Module) -> bool:
    """Whether a model has a layer to bound at all."""
    return bool(batch_norms(model) or _recordable(model))


def _recordable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to bound by recorded statistics: the norms where there are some, else
    the convolutions, by name.
    """
    named = dict(model.named_modules())
    for kinds in ((nn.GroupNorm, nn.LayerNorm), (nn.Conv2d,)):
        found = {name: m for name, m in named.items() if isinstance(m, kinds)}
        if found:
            return found
    return {}


@torch.no_grad()
def statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation per channel, over images and positions, of the
    outputs of the layers that hold no running statistics, by name.
    """
    names, sums = list(_recordable(model)), {}
    with mode(model, training=False), record(model, names) as outputs:
        for part in images.split(128):
            model(part)
            for name in names:
                out = outputs[name].double()
                channels_last = isinstance(model.get_submodule(name), nn.LayerNorm)
                flat = (out if channels_last else out.transpose(1, -1)).flatten(0, -2)
                new = torch.stack([torch.ones_like(flat).sum(0), flat.sum(0), (flat**2).sum(0)])
                sums[name] = sums.get(name, 0) + new
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        found[name] = mean.float(), std.float()
    return found


def bound(
    model: nn.Module,
    k: float,
    recorded: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> nn.Module:
    """Bound a model in place: batch norms to ``k`` of their own running standard
    deviations, where it has none the layers in ``recorded`` (see :func:`statistics`).

    Raises:
        ValueError: when k is not above 0, or there is nothing to bound.
    """
    if not k > 0:
        raise ValueError(f"k counts standard deviations and is above 0, not {k}")
    norms = batch_norms(model)
    if not norms and not recorded:
        raise ValueError(
            f"{type(model).__name__} has no batch norm: pass the statistics of its other layers"
        )
    for m in norms.values():
        if isinstance(m, BoundedBatchNorm):
            m.k.fill_(k)
            continue
        m.__class__ = BoundedBatchNorm
        m.register_buffer("k", torch.tensor(float(k), device=m.running_mean.device))
    for name, (mean, std) in ({} if norms else recorded).items():
        m = model.get_submodule(name)
        if type(m) in RECORDED:
            m.__class__ = RECORDED[type(m)]
        m.register_buffer("low", mean - k * std)
        m.register_buffer("high", mean + k * std)
    return model


def rebuild(model: nn.Module, purified: Sequence[Mapping]) -> nn.Module:
    """Put into a fresh model, in place, the bounds that a card's "purified" entries
    name, so that the file's weights fit. The bounds' values come with the weights.
    """
    for entry in purified:
        if "layers" not in entry:
            continue
        if entry["layers"] == "batch norm":
            bound(model, entry["k"])
        else:
            sized = {
                name: (torch.zeros(size), torch.ones(size))
                for name, size in entry["channels"].items()
            }
            bound(model, entry["k"], sized)
    return model


@torch.no_grad()
def beyond(model: nn.Module, images: Tensor, k: float) -> dict[str, float]:
    """Share of the values of each batch norm, in [0, 1], that a bound of ``k`` standard
    deviations would change, by the layer's name, in the order of the network.

    Args:
        images: (N, C, H, W) in [0, 1].

    Raises:
        ValueError: for a network without batch norms that have running statistics.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError("beyond needs batch norms with running statistics: the model has none")
    counts = dict.fromkeys(norms, 0.0)
    with mode(model, training=False), record(model, list(norms), inputs=True) as inputs:
        for part in images.split(256):
            model(part)
            for name, m in norms.items():
                mean, std = _channels(m.running_mean), _channels((m.running_var + m.eps).sqrt())
                outside = ((inputs[name] - mean) / std).abs() > k
                counts[name] += outside.double().mean().item() * len(part)
    return {name: count / len(images) for name, count in counts.items()}


@torch.no_grad()
def agreement_curve(
    model: nn.Module, images: Tensor, ks: Sequence[float] = KS
) -> dict[float, float]:
    """k -> share of the images, in [0, 1], on which the bounded model predicts what the
    model predicts.
    """
    plain = model(images).argmax(1)
    recorded = None if batch_norms(model) else statistics(model, images)
    curve = {}
    for k in ks:
        bounded = bound(copy.deepcopy(model), k, recorded)
        curve[k] = (bounded(images).argmax(1) == plain).float().mean().item()
    return curve


def choose_k(curve: Mapping[float, float], agreement: float) -> float:
    """The k at which the curve of :func:`agreement_curve` first reaches ``agreement``,
    linear between its points; the largest k where it never does.

    >>> choose_k({1.0: 0.5, 2.0: 0.9}, 0.7)
    1.5
    """
    points = sorted(curve.items())
    if points[0][1] >= agreement:
        return points[0][0]
    for (low, below), (high, above) in itertools.pairwise(points):
        if above >= agreement:
            return low + (high - low) * (agreement - below) / (above - below)
    return points[-1][0]


class Bounded(Purifier):
    """Each batch norm's normalised value is clamped to [-k, k]; in a network without
    any, the outputs of its group and layer norms, else of its convolutions, to k
    standard deviations around their mean on synthetic images.

    Args:
        k: standard deviations. None takes the k at which the bounded teacher still
            predicts what the teacher does on this share of rough synthetic images:
        agreement: in (0, 1]; None takes :data:`ALONE` for a teacher as it is, and
            :data:`AFTER` for one that a purifier has changed, whose accuracy a tight
            bound costs more and whose backdoor is weak already.
    """

    def __init__(self, *, k: float | None = None, agreement: float | None = None):
        if k is not None and not k > 0:
            raise ValueError(f"k counts standard deviations and is above 0, not {k}")
        if agreement is not None and not 0 < agreement <= 1:
            raise ValueError(f"agreement is a share in (0, 1], not {agreement}")
        self.k, self.agreement = k, agreement

    def needs_pool(self, teacher):
        return not batch_norms(teacher)

    def clean(self, model, origin, pool, rng):
        k = self.k
        if k is None:
            wanted = self.agreement
            if wanted is None:
                wanted = ALONE if same_weights(model, origin) else AFTER
            seed = new_seed(rng)
            rough = rough_pool(origin, pool.shape[1:], device=pool.device, seed=seed)
            k = round(choose_k(agreement_curve(model, rough), wanted), 2)
        if batch_norms(model):
            bound(model, k)
            return {"k": k, "layers": "batch norm"}
        recorded = statistics(model, pool)
        bound(model, k, recorded)
        channels = {name: len(mean) for name, (mean, _) in recorded.items()}
        return {"k": k, "layers": "recorded", "channels": channels}
