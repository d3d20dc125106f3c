"""Where a trigger acts inside a model: change per channel, spatial maps, Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from abdlab.features import mode, record
from abdlab.losses import attention


def convolutions(model: nn.Module) -> list[str]:
    """Names of all convolutions, found by type, in the order in which the model
    registers them.
    """
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]


def stage(model: nn.Module, number: int) -> str:
    """The name of the layer that ends a stage: of the model's own ``stages``, or in a
    network that names none the convolution about as deep among three.

    Args:
        number: counted from 0; -1 is the last.

    >>> stage(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), -1)
    '2'

    Raises:
        ValueError: for a network without stages and without convolutions.
    """
    names = list(getattr(model, "stages", ()) or ())
    if not names:
        found = convolutions(model)
        if not found:
            raise ValueError(f"{type(model).__name__} has no convolution to look into")
        names = [found[max(0, round(len(found) * part / 3) - 1)] for part in (1, 2, 3)]
    return names[number]


@torch.no_grad()
def triggered_change(
    model: nn.Module,
    clean: Tensor,
    triggered: Tensor,
    layers: Sequence[str] | None = None,
    relative: bool = True,
    batch: int = 500,
) -> dict[str, Tensor]:
    """Trigger-activated change per channel (TAC; Zheng et al., ECCV 2022, arXiv
    2208.03111, eq. 5).

    TAC_c = mean over images of the l2 norm of F_c(triggered) - F_c(clean), F_c being
    channel c of the layer's output.

    Args:
        clean, triggered: the same images (N, C, H, W) without and with the trigger.
        layers: names; by default every convolution.
        relative: divide by the layer's mean clean norm per channel, so that layers can
            be compared (deviation: the paper shows the absolute change; False gives
            it).

    Returns:
        layer name -> (channels,) on the CPU.

    Raises:
        ValueError: when the two sets differ in shape, or a layer does not exist.
    """
    if clean.shape != triggered.shape or len(clean) == 0:
        raise ValueError(
            f"clean and triggered must be the same images, got {tuple(clean.shape)} and"
            f" {tuple(triggered.shape)}"
        )
    layers = convolutions(model) if layers is None else list(layers)
    change, norm = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    with mode(model, training=False), record(model, layers) as acts:
        for x, y in zip(clean.split(batch), triggered.split(batch), strict=True):
            model(x)
            before = {name: acts[name].flatten(2) for name in layers}
            model(y)
            for name in layers:
                change[name] = change[name] + (acts[name].flatten(2) - before[name]).norm(
                    dim=2
                ).sum(0)
                norm[name] = norm[name] + before[name].norm(dim=2).sum(0)
    scale = {
        name: norm[name].mean().clamp_min(1e-12) if relative else len(clean) for name in layers
    }
    return {name: (change[name] / scale[name]).cpu() for name in layers}


def participation(change: Tensor) -> float:
    """In how many channels a change lives: (sum d^2)^2 / sum d^4 over channels, between 1
    (one of them) and all of them (evenly); 0 where nothing changes.

    Args:
        change: (channels,), such as a layer's of :func:`triggered_change`; its scale does
            not matter.

    >>> participation(torch.tensor([3.0, 0.0, 3.0, 0.0]))
    2.0
    """
    squares = change.double().square()
    fourth = squares.square().sum()
    return (squares.sum().square() / fourth).item() if fourth > 0 else 0.0


def _spatial(feature: Tensor, layer: str, model: nn.Module) -> None:
    """Raise ValueError for an output that is no map (N, C, H, W), such as tokens."""
    if not isinstance(feature, Tensor) or feature.ndim != 4:
        kind = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise ValueError(
            f"{layer} of {type(model).__name__} has no spatial map: it answers {kind}, and a map"
            " is (N, channels, height, width). Choose a convolution, or a stage of them"
        )


@torch.no_grad()
def spatial_map(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """Attention map of a layer, (N, h, w) on the CPU: the channel mean of squares, each
    map scaled to a maximum of 1.
    """
    with mode(model, training=False), record(model, [layer]) as acts:
        model(images)
    feature = acts[layer]
    _spatial(feature, layer, model)
    maps = attention(feature).unflatten(1, feature.shape[-2:])
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu()


def grad_cam(model: nn.Module, images: Tensor, layer: str, target: int | Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) for class ``target`` through captum: (N,
    H, W) at the images' size, on the CPU.

    Only evidence for the class is kept (ReLU); each map is scaled to a maximum of 1, or
    stays 0 where there is none.

    Args:
        target: a class, or one per image (N,).
    """
    from captum.attr import LayerAttribution, LayerGradCam

    from abdlab.features import module_at

    with torch.no_grad(), mode(model, training=False), record(model, [layer]) as acts:
        model(images[:1])
    _spatial(acts[layer], layer, model)
    wanted = [p.requires_grad for p in model.parameters()]
    with mode(model, training=False):
        try:
            # captum differentiates to the layer's output, which frozen weights would cut off
            model.requires_grad_(True)
            maps = LayerGradCam(model, module_at(model, layer)).attribute(
                images, target, relu_attributions=True
            )
        finally:
            for p, flag in zip(model.parameters(), wanted, strict=True):
                p.requires_grad_(flag)
    maps = (
        LayerAttribution.interpolate(maps, tuple(images.shape[-2:]), "bilinear").detach().squeeze(1)
    )
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu()


def nearest_share(points: np.ndarray, groups: Sequence[str], of: str, to: str) -> float:
    """The share of one group's points whose nearest point of all other groups belongs to
    the group ``to``.

    Args:
        points: (N, D), such as :func:`tsne` returns.
        groups: the name of each point's group (N,).

    >>> points = np.array([[0.0], [5.0], [1.0], [4.0], [6.0]])
    >>> nearest_share(points, ["clean", "triggered", "new", "new", "new"], "new", "triggered")
    0.6666666666666666
    """
    points, named = torch.as_tensor(np.asarray(points)).double(), np.array(groups)
    mine, others = named == of, named != of
    if not mine.any() or not others.any():
        raise ValueError(f"there must be points of {of} and of another group, in {set(groups)}")
    nearest = torch.cdist(points[mine], points[others]).argmin(1).numpy()
    return float((named[others][nearest] == to).mean())


def tsne(model: nn.Module, layer: str, images: Tensor, seed: int = 0) -> np.ndarray:
    """scikit-learn's t-SNE (N, 2) of a layer's activations, averaged over positions."""
    from sklearn.manifold import TSNE

    from abdlab.features import mode, record

    with torch.no_grad(), mode(model, training=False), record(model, [layer]) as acts:
        model(images)
    feature = acts[layer]
    feature = feature.mean((2, 3)) if feature.ndim == 4 else feature.flatten(1)
    perplexity = min(30, max(2, (len(images) - 1) // 3))
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        feature.float().cpu().numpy()
    )
