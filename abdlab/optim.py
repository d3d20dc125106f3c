"""One step of an optimiser, and what optimisers are made of and kept as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from abdlab.errors import Diverged


def fusable(model: nn.Module) -> bool | None:
    """SGD's ``fused`` for this model: True on CUDA, where a step then needs no look at
    a gradient's norm, else torch's default.

    On a CPU it takes .2 ms instead of .8 ms per step of a WRN-16-2, of half a second,
    but rounds otherwise: seeds would no longer give the numbers that were reported for
    them.
    """
    return True if next(model.parameters()).is_cuda else None


def sgd(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov: bool = False
) -> SGD:
    """SGD on all weights of a model, fused where that is wanted; ``nesterov`` holds
    only with momentum.
    """
    nesterov = nesterov and momentum > 0
    return SGD(
        model.parameters(),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=fusable(model),
    )


def take_step(optimizers: Iterable[Optimizer], model: nn.Module, clip: float | None) -> Tensor:
    """One step of the optimisers on a model's gradients, clipped to a norm; none where
    the gradients are not finite.

    Scaling by an infinite norm would turn every weight into NaN: then weights and
    moments stay as they are. Fused optimisers see that on the device, so that the host
    goes on without a look and :func:`check_finite` can say it later. For others the
    host looks.

    Args:
        model: holds all that the optimisers train. clip: None leaves the norm.

    Returns:
        the gradients' norm before clipping, a scalar on the device: not finite when no
        step was taken.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
    for optimizer in optimizers:
        if norm.device.type in ("cpu", "cuda") and all(
            group.get("fused") for group in optimizer.param_groups
        ):
            optimizer.grad_scale, optimizer.found_inf = None, norm.isfinite().logical_not().float()
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
            continue
        if not norm.isfinite():
            optimizer.zero_grad(set_to_none=True)  # a step of nothing, which its schedule counts
        optimizer.step()
    return norm


def check_finite(losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
    """Raise :class:`Diverged` naming the first loss that is not finite; else the losses
    whose gradient has no finite norm.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise Diverged(f"the loss {name!r} is {value}")
    for names, value in norms.items():
        if not math.isfinite(value):
            raise Diverged(f"the gradient of {names} is not finite")


def shares_of_run(milestones: Sequence[float]) -> tuple[float, ...]:
    """The milestones as they are; ValueError for one that is no share of a run."""
    if not all(0 < share <= 1 for share in milestones):
        raise ValueError(f"milestones are shares of the run in (0, 1], not {tuple(milestones)}")
    return tuple(milestones)


def decay(optimizer: Optimizer, milestones: Sequence[float], steps: int) -> LRScheduler:
    """The learning rate x0.1 at each milestone, a share in (0, 1] of ``steps``."""
    return MultiStepLR(optimizer, [max(1, round(share * steps)) for share in milestones], gamma=0.1)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's state with each moment laid out in memory like its parameter.

    Fused optimisers walk moments and weights in memory order, so that a contiguous
    moment beside a channels_last weight would be paired with the wrong elements.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter).copy_(value)
