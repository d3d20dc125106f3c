"""The shuffled teacher of the Shuffling Vaccine, and the scores that it gives images
(Hong et al., ICML 2023, arXiv 2306.02368, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from abdlab.features import module_at
from abdlab.losses import log_kl

#: whose kernels have the input channels in their second dimension (transposed ones have
#: not)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def shuffled_layers(model: nn.Module, last: int) -> list[str]:
    """Names of the ``last`` convolutions, found by type, in the order in which the
    model registers them.

    Convolutions that see one input channel (per group) cannot be shuffled and do not
    count.

    Raises:
        ValueError: when the model has fewer.
    """
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and m.in_channels > m.groups
    ]
    if last < 1 or last > len(names):
        raise ValueError(
            f"the last {last} convolutions were asked for, but {type(model).__name__} has"
            f" {len(names)} that can be shuffled"
        )
    return names[-last:]


class ShuffledTeacher:
    """T~: the mean logits of k copies of a teacher whose named convolutions see their
    input channels in random order.

    Args:
        teacher: in eval mode; it is never changed.
        layers: names of the convolutions, see :func:`shuffled_layers`.
        k: number of copies; every copy and layer has its own permutation.
        rng: a CPU generator that draws the permutations.
        permutations: (k, input channels per group) per layer, instead of drawing.

    All copies run in one pass: the layers before the first shuffled one are shared, on
    request with the teacher itself too (:meth:`beside`); from there on all of them are
    one batch, and only a shuffled layer takes it apart, for the permuted kernels of
    each; the first ones, whose input is shared, are one convolution with the kernels of
    all. Where a path goes round the first shuffled layer, the passes part at the
    smallest block around it that has no such path. Where there is none (checked once,
    against copies with permuted weights), the k copies run one by one.
    """

    def __init__(
        self,
        teacher: nn.Module,
        layers: Sequence[str],
        k: int = 3,
        rng: torch.Generator | None = None,
        permutations: dict[str, Tensor] | None = None,
    ):
        if k < 1:
            raise ValueError(f"k, the number of shuffled copies, must be at least 1, not {k}")
        self.teacher, self.layers, self.k = teacher, list(layers), k
        if permutations is None:
            widths = {
                name: module_at(teacher, name).in_channels // module_at(teacher, name).groups
                for name in layers
            }
            permutations = {
                name: torch.stack([torch.randperm(c, generator=rng) for _ in range(k)])
                for name, c in widths.items()
            }
        self.permutations = {name: value.cpu() for name, value in permutations.items()}
        self._parting: list[str] | None = (
            None  # where the passes part, see _parts_at; None: not tried yet
        )
        device = next(teacher.parameters()).device
        self._kernels = {name: order.to(device) for name, order in self.permutations.items()}
        self._inputs = {name: self._input_order(name).to(device) for name in layers}

    def __call__(self, images: Tensor) -> Tensor:
        """Mean logits (N, classes) of the k copies; differentiable to the images."""
        return (
            self._together(images).mean(0)
            if self._parts_at(images)
            else self.copies(images).mean(0)
        )

    def beside(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the teacher's own logits, the mean logits of the copies), (N, classes) each:
        as two calls, at less cost.
        """
        if not self._parts_at(images):
            return self.teacher(images), self(images)
        own, *shuffled = self._together(images, with_teacher=True)
        return own, torch.stack(shuffled).mean(0)

    def copies(self, images: Tensor) -> Tensor:
        """Logits (k, N, classes), each copy run by itself with permuted weights."""
        return torch.stack(
            [functional_call(self.teacher, self.weights(j), (images,)) for j in range(self.k)]
        )

    def weights(self, copy: int) -> dict[str, Tensor]:
        """The permuted kernels of one copy, by parameter name."""
        return {
            f"{name}.weight": module_at(self.teacher, name).weight[:, order[copy]]
            for name, order in self._kernels.items()
        }

    def _together(self, images: Tensor, with_teacher: bool = False) -> Tensor:
        """Logits (k, N, classes) of the copies, or (k + 1, N, classes) with the
        teacher's first, in one pass.
        """
        count, (block,) = self.k + with_teacher, self._parting
        handle, modules = None, {name: module_at(self.teacher, name) for name in self.layers}
        norms = [
            m
            for m in self.teacher.modules()
            if type(m) in NORMS and not m.training and m.running_var is not None
        ]
        norms = norms if images.device.type == "cpu" else []
        try:
            if block:
                handle = module_at(self.teacher, block).register_forward_pre_hook(
                    lambda module, args: (torch.cat([args[0]] * count), *args[1:])
                )
            for name, module in modules.items():
                module.forward = partial(
                    self._convolve, name, module, count, None if block else len(images)
                )
            for module in norms:
                module.forward = partial(_normalized, module)
            return self.teacher(images).unflatten(0, (count, len(images)))
        finally:
            if handle is not None:
                handle.remove()
            for module in (*modules.values(), *norms):
                module.__dict__.pop("forward", None)

    def _convolve(
        self, name: str, module: nn.Module, count: int, shared: int | None, x: Tensor
    ) -> Tensor:
        """A shuffled layer on all passes: on ``shared`` images as they are before the
        passes part, or on count x as many.
        """
        own, together = count - self.k, shared == len(x)
        parts = [x] * count if together else x.chunk(count)
        # whatever else it does with its input, it gets that shuffled
        if type(module) not in CONVOLUTIONS:
            moved = [
                part.index_select(1, order)
                for part, order in zip(parts[own:], self._inputs[name], strict=True)
            ]
            return type(module).forward(module, torch.cat([*parts[:own], *moved]))
        kernels = [module.weight] * own + list(module.weight[:, self._kernels[name]].unbind(1))
        if together and module.groups == 1:
            bias = None if module.bias is None else module.bias.repeat(count)
            return torch.cat(module._conv_forward(x, torch.cat(kernels), bias).chunk(count, 1))
        return torch.cat(
            [
                module._conv_forward(part, k, module.bias)
                for part, k in zip(parts, kernels, strict=True)
            ]
        )

    def _parts_at(self, images: Tensor) -> list[str]:
        """Where passes part: [""] at the shuffled layers themselves, or [block], or []
        when no place gives the right numbers.
        """
        if self._parting is None:
            first = self.layers[0].split(".")
            blocks = ["", *(".".join(first[:depth]) for depth in range(len(first) - 1, 0, -1))]
            probe = images[:1].detach().expand(2, *images.shape[1:])
            self._parting = next(([block] for block in blocks if self._agrees(probe, block)), [])
        return self._parting

    @torch.no_grad()
    def _agrees(self, images: Tensor, block: str) -> bool:
        self._parting = [block]
        try:
            with torch.autocast(
                images.device.type, enabled=False
            ):  # round-off would hide what is compared
                wanted = torch.cat([self.teacher(images)[None], self.copies(images)])
                got = self._together(images, with_teacher=True)
            # a GPU convolves in TF32, and other shapes are other algorithms there
            near = 1e-2 if images.is_cuda else 1e-4
            return torch.allclose(got, wanted, rtol=1e-3, atol=near * wanted.abs().max().item())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError):
            # shapes clash, as a path round the block meets the copies, or it takes no tensor
            return False

    def _input_order(self, name: str) -> Tensor:
        """(k, in_channels): the order of the activations that equals the permuted
        kernels.
        """
        groups, inverse = module_at(self.teacher, name).groups, self.permutations[name].argsort(1)
        return torch.cat([inverse + g * inverse.shape[1] for g in range(groups)], dim=1)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm in eval mode as what it is, one factor and one summand per channel.

    torch's own gradient of it takes nine times as long on a CPU in channels_last, also
    where no weight wants one.
    """
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    if x.dtype != factor.dtype:
        return type(norm).forward(norm, x)
    summand = -norm.running_mean * factor
    summand = summand if norm.bias is None else summand + norm.bias
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(summand.view(shape), x, factor.view(shape))


def suspicion(
    vaccine: ShuffledTeacher,
    teacher: nn.Module,
    images: Tensor,
    batch: int = 1000,
    reverse: bool = False,
) -> Tensor:
    """log10 KL(T~(x) || T(x)) per image, float64 (N,): low is suspicious (paper,
    section 4.1). Clamped below at -12.

    Args:
        reverse: KL(T(x) || T~(x)) instead, which is what the official code computes.
    """
    with torch.no_grad():
        pairs = ((vaccine(part), teacher(part)) for part in images.split(batch))
        return torch.cat(
            [log_kl(t, shuffled) if reverse else log_kl(shuffled, t) for shuffled, t in pairs]
        )


def tail_share(scores: Tensor, sigma: float = 3.0) -> float:
    """Share of the scores below mean - sigma x std; a Gaussian has .00135 below 3. Of
    no scores it is 0.
    """
    if len(scores) == 0:
        return 0.0
    return (scores < scores.mean() - sigma * scores.std(correction=0)).double().mean().item()
