"""Activations by layer name, and temporary states of models, as context managers that
leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from abdlab.errors import did_you_mean

#: how a network computes while it trains: torch's default, or bfloat16 where autocast
#: allows it
PRECISIONS = ("float32", "bf16")


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The submodule with this dotted name; ValueError with a "did you mean" when there
    is none.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(
            did_you_mean(f"layer of {type(model).__name__}", name, [n for n in modules if n])
        )
    return modules[name]


def last_linear(model: nn.Module, purpose: str = "to read features from") -> str:
    """The name of the nn.Linear that the model registers last; its input are the
    penultimate features.

    Raises:
        ValueError: when it has none, saying what it was wanted for (``purpose``).
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.Linear {purpose}")
    return names[-1]


class _Recorded(dict):
    """Tensors by layer, which know whether they are still what was recorded."""

    def keep(self, name: str, value: Tensor) -> None:
        self[name] = value
        self.__dict__.setdefault("versions", {})[name] = _version(value)

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        if _version(value) != self.__dict__.get("versions", {}).get(name):
            raise ValueError(
                f"{name} was recorded, and then changed in place by a later layer: record that"
                " one, or build it with inplace=False"
            )
        return value


def _version(value: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count it."""
    counted = isinstance(value, Tensor) and not value.is_inference()
    return value._version if counted else None


@contextmanager
def record(
    model: nn.Module, names: Sequence[str], inputs: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the named layers, or their first ``inputs``, during forward
    passes inside the block.

    >>> from abdlab.models import build
    >>> model = build("wrn-10-1", width=4)
    >>> with record(model, ["stage3"]) as acts:
    ...     logits = model(torch.rand(2, 3, 8, 8))
    >>> acts["stage3"].shape
    torch.Size([2, 16, 2, 2])

    The dict holds the latest one of each layer (attached to the graph). Hooks are gone
    afterwards, also after an error.

    Raises:
        ValueError: on reading a layer's values that a later layer has changed in place (an
            activation with ``inplace=True``).
    """
    acts = _Recorded()
    handles = []
    try:
        for name in names:

            def keep(module, args, output, name=name):
                acts.keep(name, args[0] if inputs else output)

            handles.append(module_at(model, name).register_forward_hook(keep))
        yield acts
    finally:
        for handle in handles:
            handle.remove()


def full(x: Tensor) -> Tensor:
    """The tensor in float32 where it is a half-precision one, else as it is: losses are
    computed in no less.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextmanager
def precision(name: str, device: torch.device, *models: nn.Module) -> Iterator[None]:
    """In "bf16", convolutions and products inside the block run in bfloat16
    (torch.autocast).

    What the given models return is float32 all the same, and so are weights, gradients,
    batch-norm statistics and the losses that are made of them. On CPUs with bfloat16
    arithmetic a WRN's training step takes about half as long.

    Raises:
        ValueError: for a name that is not one of :data:`PRECISIONS`, with a "did you
            mean".
    """
    if name not in PRECISIONS:
        raise ValueError(did_you_mean("precision", name, PRECISIONS))
    if name == "float32":
        yield
        return
    handles = [
        model.register_forward_hook(lambda module, args, output: full(output)) for model in models
    ]
    try:
        # without the cache, which would hold weights as they were before an optimiser's
        # step inside the block
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def compiled(
    model: nn.Module, recorded: Collection[str] = (), wanted: bool = True
) -> Iterator[nn.Module]:
    """Inside the block the model runs through torch.compile, in place; not at all
    unless ``wanted``.

    Compiled code calls the hooks that there were when it was compiled, and no later
    ones. So what is compiled are the largest modules without a ``recorded`` layer
    inside, and nobody may record another one in the block.
    """
    looked_at = [module_at(model, name) for name in recorded]

    def parts(module: nn.Module) -> Iterator[nn.Module]:
        if not any(layer in looked_at for layer in module.modules()):
            yield module
        else:
            for child in module.children():
                if next(child.children(), None) is not None:  # a single layer is as fast as it is
                    yield from parts(child)

    chosen = list(parts(model)) if wanted else []
    for module in chosen:
        module.compile()
    try:
        yield model
    finally:
        for module in chosen:
            module._compiled_call_impl = None


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[nn.Module]:
    """Put every submodule in train or eval mode for the block, and restore each one's
    own flag after it.
    """
    before = [(m, m.training) for m in model.modules()]
    try:
        yield model.train(training)
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def frozen(model: nn.Module, weights: bool = True) -> Iterator[nn.Module]:
    """Batch-norm running statistics stay as they are inside the block; with ``weights``
    no parameter takes a gradient.

    Layers in train mode still normalise with the batch's own statistics: they only stop
    recording them.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [m.track_running_stats for m in norms]
    wanted = [p for p in model.parameters() if p.requires_grad] if weights else []
    try:
        for module in norms:
            # In eval mode this flag is what makes a layer use its running statistics,
            # so only train mode is touched.
            if module.training:
                module.track_running_stats = False
        for p in wanted:
            p.requires_grad_(False)
        yield model
    finally:
        for module, flag in zip(norms, tracked, strict=True):
            module.track_running_stats = flag
        for p in wanted:
            p.requires_grad_(True)
