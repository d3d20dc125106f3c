"""Weights on disk: safetensors with a JSON card in the file's own header. Nothing is
ever unpickled: what others wrote with torch.save is read as data (abdlab.strangers).

One file holds tensors and card, so they cannot drift apart and one rename makes a write
atomic.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from abdlab.errors import CheckpointError
from abdlab.fitting import fit, without_prefixes
from abdlab.models import build
from abdlab.pickles import Lazy
from abdlab.processes import is_gone, owner
from abdlab.strangers import TorchFile, first_line, kind_of, shown, some, state_dicts

CARD_KEY = "abdlab"
#: how files of torch.save are called
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pkl")
_HEADER = 16 * 2**20  # bytes of a safetensors header; those of large language models take 1
_TENSOR = "$tensor"


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` so that at every instant the file is the old one or
    the new one, whole. What a killed process had begun to write beside it is removed.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{path.name}."
    for left in path.parent.glob(f"{glob.escape(mine)}*.tmp"):
        if is_gone(left.name.removeprefix(mine).partition(".")[0]):
            left.unlink(missing_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{mine}{owner()}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def save_model(path: str | Path, model: nn.Module, card: dict | None = None) -> Path:
    """Write a model's weights and its card (the model's own ``card`` under ``"model"``,
    when it has one).

    What wrappers put before all names (DataParallel, torch.compile, a ``self.model``) is
    left out; :func:`load_model` finds the names with and without it.
    """
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        model = getattr(model, "_orig_mod", None) or model.module
    card = {
        "kind": "model",
        **({"model": model.card} if hasattr(model, "card") else {}),
        **(card or {}),
    }
    return _write(path, without_prefixes(model.state_dict()), card)


def save_state(path: str | Path, tree: Any, card: dict | None = None) -> Path:
    """Write nested dicts and lists of tensors, numbers, strings and None (an
    optimiser's state, a whole run).
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(tree, "state", tensors)
    return _write(path, tensors, {"kind": "state", **(card or {}), "skeleton": skeleton})


def load_state(path: str | Path, device: str | torch.device = "cpu") -> tuple[Any, dict]:
    """What :func:`save_state` wrote: (tree, card)."""
    path = _file(path)
    tensors, card = _read_safetensors(path, device)
    if card.get("kind") != "state":
        raise CheckpointError(
            f"{path} is not a run's checkpoint: it holds {card.get('kind', 'plain weights')}"
        )
    return _unpack(card.pop("skeleton"), tensors), card


def read_card(path: str | Path) -> dict:
    """The JSON card of a .safetensors file; empty when the file was not written by
    abdlab.
    """
    path = _file(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD_KEY, "{}"))
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (truncated, or another format):"
            f" {first_line(error)}"
        ) from None
    if not isinstance(card, dict):
        raise CheckpointError(
            f"{path} has a card that is no JSON object: it was not written by abdlab"
        )
    return card


def _check_header(path: Path) -> None:
    """Refuse a header that would take far more memory than it describes weights."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if _HEADER < length < path.stat().st_size:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its header takes {length / 1e6:.0f} MB, and"
            f" that of a model at most {_HEADER / 1e6:.0f}"
        )


def _file(path: str | Path) -> Path:
    """The path of a file that is there and may be read, its ``~`` expanded."""
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} {kind_of(path)}")
        if not path.exists():
            raise CheckpointError(f"there is no file {path}")
        if not path.is_file():
            raise CheckpointError(f"{path} is a device or a pipe, and no file")
        with path.open("rb"):
            return path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def load_model(
    path: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    *,
    key: str | None = None,
    ignore: str | Collection[str] = (),
) -> nn.Module:
    """Load weights, also a stranger's, without ever running code from the file.

    Args:
        path: a .safetensors file, or what torch.save wrote of a state dict, alone or
            in a dict beside other data (as Lightning and BackdoorBench do).
        model: the module (or a function making it) whose weights these are; by default
            what the card names.
        key: where the state dict lies ("ema", "nets.teacher"), for files with several.
        ignore: names that the model does not need: of an entry, of its last part, or of
            the module that it begins with.

    Returns:
        the model in eval mode on ``device``; its ``card`` attribute is the model part
        of the file's card, if any. Prefixes of wrappers (``module.``, ``_orig_mod.``,
        ``model.``) come off, or are put before, where names do not fit without.

    Raises:
        CheckpointError: one sentence for any file that does not fit or cannot be read,
            code in a pickle by name, weights that are not finite. A module that was
            given keeps its weights then.

    >>> load_model("no.pt", nn.Linear(1, 1))
    Traceback (most recent call last):
    abdlab.errors.CheckpointError: there is no file no.pt
    """
    path = _file(path)
    weights, card = _read(path, key)
    given = isinstance(model, nn.Module)
    model = model if given else _made(path, model, card, weights)
    fit(path, model, weights, (ignore,) if isinstance(ignore, str) else ignore, undo=given)
    if "model" in card:
        model.card = card["model"]
    return model.to(device).eval()


def read_weights(
    path: str | Path, device: str | torch.device = "cpu", *, key: str | None = None
) -> tuple[dict[str, Tensor], dict]:
    """A flat name -> tensor dict, names as in the file, and the card (empty for foreign
    files). Raises :class:`CheckpointError`.
    """
    weights, card = _read(_file(path), key)
    return {k: v.clone().to(device) for k, v in weights.items() if isinstance(v, Tensor)}, card


def _read(path: Path, key: str | None) -> tuple[dict[str, Any], dict]:
    """The entries of a file's state dict, tensors as views of the file, and the card."""
    if (part := re.search(r"-(\d+)-of-(\d+)\.\w+$", path.name)) and int(part[2]) > 1:
        raise CheckpointError(
            f"{path} is part {int(part[1])} of {int(part[2])} of one model: join the parts into one"
            " file first"
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        if key is not None:
            raise CheckpointError(f"{path} holds one state dict: key= is for files with several")
        return _read_safetensors(path, "cpu")
    if suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path} {kind_of(path) or 'is of an unknown kind'}: weights come as .safetensors, .pt"
            " or .pth, or in torch's format as .ckpt, .bin, .tar or .pkl"
        )
    file = TorchFile(path)
    found = state_dicts(file.tree)
    names = some(found) if len(found) > 3 else ", ".join(map(shown, found))
    if not found:
        raise CheckpointError(
            f"{path} holds no state dict: expected names with tensors, found {_what(file.tree)}"
        )
    if key is not None and key not in found:
        raise CheckpointError(f"{path} holds no state dict under {key!r}: there are {names}")
    if key is None and len(found) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts: pass key= with one of {names or 'them'}"
        )
    weights = next(iter(found.values())) if key is None else found[key]
    return {k: file.tensor(v) if isinstance(v, Lazy) else v for k, v in weights.items()}, {}


def _what(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dict with {some(tree)}" if tree else "an empty dict"
    return (
        "one tensor" if isinstance(tree, Lazy) else f"a {type(tree).__name__.lstrip('_').lower()}"
    )


def _made(
    path: Path, make: Callable[[], nn.Module] | None, card: dict, weights: Mapping[str, Any]
) -> nn.Module:
    """The module that weights are for: what ``make`` returns, or what the card names."""
    if make is not None:
        name = getattr(make, "__name__", type(make).__name__)
        try:
            model = make()
        except Exception as error:
            raise CheckpointError(
                f"{path}: {name}() cannot be made without arguments ({first_line(error)}): pass"
                " model= an nn.Module, or a function that makes one"
            ) from error
        if not isinstance(model, nn.Module):
            raise CheckpointError(
                f"{path}: model= must be an nn.Module or a function that makes one, and {name}()"
                f" makes a {type(model).__name__}"
            )
        return model
    if "model" not in card:
        raise CheckpointError(
            f"{path} does not say which architecture it holds: pass model=, an nn.Module of yours"
        )
    try:
        depth = max(map(int, re.findall(r"\d{1,9}", card["model"]["name"])), default=0)
        held = sum(v.numel() for v in weights.values())
        with torch.device("meta"):  # a card may ask for any size
            size = 0
            if depth <= max(64, len(weights)):
                size = sum(p.numel() for p in build(**card["model"]).parameters())
        if depth > max(64, len(weights)) or size > 2 * held + 2**20:
            raise ValueError("it is larger than the weights beside it")
        return build(**card["model"])
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} names an architecture that cannot be built: {first_line(error)}"
        ) from None


def _write(path: str | Path, tensors: dict[str, Tensor], card: dict) -> Path:
    # clone(): safetensors refuses tensors that share memory
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return write_atomically(path, save(plain, metadata={CARD_KEY: json.dumps(card)}))


def _read_safetensors(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict]:
    card = read_card(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # a safe_open cannot be iterated
            return {key: file.get_tensor(key) for key in file.keys()}, card  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds a tensor that torch cannot take: {first_line(error)}"
        ) from None


def _pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}:{name}"  # the number keeps {1: ...} and {"1": ...} apart
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, dict):
        # keys keep their type: optimisers number their parameters
        return {
            "$dict": [[key, _pack(value, f"{name}.{key}", tensors)] for key, value in tree.items()]
        }
    if isinstance(tree, (list, tuple)):
        return [_pack(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"{name} is a {type(tree).__name__}: a checkpoint holds tensors, numbers, strings, lists"
        " and dicts"
    )


def _unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return tensors[skeleton[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in skeleton["$dict"]}
    if isinstance(skeleton, list):
        return [_unpack(value, tensors) for value in skeleton]
    return skeleton
