"""Weights into a model whose names they have, or nearly have: prefixes, what may be left
out, and torch's own load_state_dict as the judge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abdlab.errors import CheckpointError
from abdlab.strangers import first_line, shown, some

#: what wrappers put before a network's own names: DataParallel, torch.compile, Lightning
PREFIXES = ("module.", "_orig_mod.", "model.")
#: what profilers (thop) and averages (SWA) add to a state dict
COUNTERS = ("total_ops", "total_params", "n_averaged")


def without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names without what wrappers put before all of them."""
    bare = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    bare = bare if len(bare) == len(weights) else dict(weights)
    while prefix := next((p for p in PREFIXES if bare and all(n.startswith(p) for n in bare)), ""):
        bare = {name.removeprefix(prefix): value for name, value in bare.items()}
    return bare


def fit(
    path: Path, model: nn.Module, weights: dict[str, Any], ignore: Collection[str], *, undo: bool
) -> None:
    """Put weights into a model, as torch's own load_state_dict judges them; or raise,
    and leave the model as it was when ``undo``.
    """
    wanted, name = model.state_dict(), type(model).__name__
    weights = {k: v for k, v in weights.items() if not _ignored(k, ignore)}
    weights = _renamed(path, weights, wanted)
    tensors = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
    order = [*(k for k in wanted if k in tensors), *(k for k in tensors if k not in wanted)]
    wrong = {k: why for k in order if (why := _wrong(k, tensors[k], wanted.get(k), name))}
    before = {k: v.clone() for k, v in wanted.items() if isinstance(v, Tensor)} if undo else {}
    try:
        judged = model.load_state_dict(
            {k: v for k, v in tensors.items() if k not in wrong}, strict=False
        )
        missing = _missing(judged.missing_keys, wanted, tensors)
        extra = [*judged.unexpected_keys, *(weights.keys() - tensors.keys())]
        if missing and extra:
            raise CheckpointError(
                f"{path} holds another architecture than {name}: it lacks {some(missing)} and has"
                f" {some(extra)} instead"
            )
        if missing:
            raise CheckpointError(f"{path} lacks {some(missing)}, which {name} needs")
        if extra:
            raise CheckpointError(
                f"{path} has {some(extra)}, which {name} does not know{_way_out(extra)}"
            )
        if wrong:
            raise CheckpointError(f"{path}: {next(iter(wrong.values()))}")
    except Exception as error:
        with torch.no_grad():
            for key, value in before.items():
                wanted[key].copy_(value)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit {name}: {first_line(error)}") from error


def _wrong(key: str, value: Tensor, wanted: Any, name: str) -> str:
    """What keeps one tensor of a file from being a model's; empty when nothing does."""
    key = shown(key)
    known = isinstance(wanted, Tensor) and not nn.parameter.is_lazy(wanted)
    # torch takes (1,) for (): files of torch 0.3
    if known and value.shape != wanted.shape and (wanted.ndim or value.shape != (1,)):
        return (
            f"{key} has shape {tuple(value.shape)}, but {name} needs {tuple(wanted.shape)}"
            " (another width, depth or number of classes?)"
        )
    if known and wanted.is_floating_point() and not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        return f"{key} holds {kind} numbers, and {name} needs floating-point ones (quantised?)"
    if value.is_floating_point() and value.numel():
        value = value if value.element_size() > 1 else value.float()
        low, high = value.aminmax()
        if not ((low.isfinite() and high.isfinite()) or (known and torch.equal(value, wanted))):
            return f"{key} holds values that are not finite"
        if known and not wanted.is_floating_point() and not torch.equal(value, value.round()):
            return f"{key} holds fractions, and {name} needs whole numbers"
    return ""


def _missing(names: Iterable[str], wanted: Mapping, tensors: Mapping) -> list[str]:
    """Of the names that a file lacks, those that it does need: not batch norms' counters
    and no weight that is tied to another.
    """
    there = {_place(wanted[k]) for k in tensors if isinstance(wanted.get(k), Tensor)}
    return [
        k
        for k in names
        if k not in tensors
        and not k.endswith("num_batches_tracked")
        and not (
            isinstance(wanted.get(k), Tensor) and wanted[k].numel() and _place(wanted[k]) in there
        )
    ]


def _place(value: Tensor) -> tuple:
    return value.data_ptr(), value.shape, value.stride()


def _ignored(name: str, ignore: Collection[str]) -> bool:
    return any(name == i or name.endswith(f".{i}") or name.startswith(f"{i}.") for i in ignore)


def _way_out(extra: list[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in extra})
    if set(last) <= set(COUNTERS):
        return f" (counters of a profiler or an average: ignore={tuple(last)!r} leaves them out)"
    first = sorted({name.partition(".")[0] for name in extra})
    if len(first) > 3 or not all(part.isidentifier() and len(part) <= 40 for part in first):
        return " (ignore= with their names leaves them out)"
    return f" (ignore={tuple(first)!r} leaves them out, if it can do without)"


def _renamed(path: Path, weights: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by the model's names. Where names do not fit as they are, they lose,
    or get, the prefixes of wrappers by which most of them fit.
    """
    known = {name.replace("_orig_mod.", ""): name for name in wanted}
    bare = {name: name.replace("_orig_mod.", "") for name in weights}
    if all(name in wanted for name in weights):
        return weights

    def moved(name: str, off: str, on: str) -> str:
        return on + name[len(off) :] if name.startswith(off) else name

    pairs = [(off, on) for off in _beginnings(bare.values()) for on in _beginnings(known)]
    off, on = max(
        sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])),  # of equals the shortest
        key=lambda pair: len(known.keys() & {moved(name, *pair) for name in bare.values()}),
    )
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, value in weights.items():
        new = moved(bare[name], off, on)
        # what leads nowhere is best known as it is in the file; but old weight norms
        # are known to torch alone, without a prefix
        new = known.get(new, new if off and bare[name].startswith(off) else name)
        if new in renamed:
            raise CheckpointError(
                f"{path} has two weights for {shown(new)}: {shown(origin[new])} and {shown(name)}"
            )
        renamed[new], origin[new] = value, name
    return renamed


def _beginnings(names: Iterable[str]) -> list[str]:
    """The runs of prefixes that names begin with, the empty one included."""
    found = {""}
    for name in names:
        run = re.match(r"(?:(?:module|model)\.){0,4}", name)[0]
        while run:
            found.add(run)
            run = run[: run[:-1].rfind(".") + 1]
    return sorted(found, key=len)[:16]
