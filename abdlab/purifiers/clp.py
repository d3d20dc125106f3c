"""Channel Lipschitz pruning (Zheng et al., ECCV 2022, arXiv 2208.03111): channels to
which a small change of the input can do unusually much are taken out. No data.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from abdlab.purifiers.bounded import batch_norms
from abdlab.purifiers.purifier import Purifier


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(convolution, batch norm) names, where the norm reads that very convolution: they
    are registered in the order conv, bn, in one block, with as many channels.

    In a pre-activation block of a Wide-ResNet that is conv1 with bn2 alone: other
    norms read a sum. A network's first convolution counts where a norm follows it
    directly.
    """
    found, named = [], [(n, m) for n, m in model.named_modules() if not list(m.children())]
    for (name, conv), (after, norm) in itertools.pairwise(named):
        beside = name.rpartition(".")[0] == after.rpartition(".")[0]
        kinds = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        if beside and kinds and conv.out_channels == norm.num_features:
            found.append((name, after))
    return found


def channel_lipschitz(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """(C,): an upper bound of each output channel's Lipschitz constant, the spectral
    norm of its kernel as a matrix (inputs, height x width), times |scale| / std.
    """
    kernels = conv.weight.detach().flatten(2)
    scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    return torch.linalg.matrix_norm(kernels, ord=2) * scale


class CLP(Purifier):
    """Zero the scale and the shift of the batch norm of every channel whose Lipschitz
    constant exceeds its layer's mean by more than ``u`` standard deviations.

    Args:
        u: standard deviations (paper: 3 for CIFAR-10). Of C channels none can exceed
            (C - 1) / sqrt(C), so that 3 prunes nothing in layers of up to 10.
    """

    def __init__(self, *, u: float = 3.0):
        if not u > 0:
            raise ValueError(f"u counts standard deviations and is above 0, not {u}")
        self.u = u

    def needs_pool(self, teacher):
        return False

    @torch.no_grad()
    def clean(self, model, origin, pool, rng):
        if not batch_norms(model):
            raise ValueError(f"{type(model).__name__} has no batch norm, which CLP prunes at")
        pruned = 0
        for conv, norm in pairs(model):
            norm = model.get_submodule(norm)
            bound = channel_lipschitz(model.get_submodule(conv), norm)
            bad = bound > bound.mean() + self.u * bound.std()
            norm.weight[bad], norm.bias[bad] = 0.0, 0.0
            pruned += int(bad.sum())
        return {"u": self.u, "pruned": pruned}
