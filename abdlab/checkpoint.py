"""Weights on disk: safetensors with a JSON card in the file's own header. Nothing is
ever unpickled.

One file holds tensors and card, so they cannot drift apart and one rename makes a write
atomic.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from abdlab.errors import CheckpointError
from abdlab.models import build

CARD_KEY = "abdlab"
_TENSOR = "$tensor"


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` so that at every instant the file is the old one or
    the new one, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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
    """
    card = {
        "kind": "model",
        **({"model": model.card} if hasattr(model, "card") else {}),
        **(card or {}),
    }
    return _write(path, model.state_dict(), card)


def save_state(path: str | Path, tree: Any, card: dict | None = None) -> Path:
    """Write nested dicts and lists of tensors, numbers, strings and None (an
    optimiser's state, a whole run).
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(tree, "state", tensors)
    return _write(path, tensors, {"kind": "state", **(card or {}), "skeleton": skeleton})


def load_state(path: str | Path, device: str | torch.device = "cpu") -> tuple[Any, dict]:
    """What :func:`save_state` wrote: (tree, card)."""
    tensors, card = _read_safetensors(Path(path), device)
    if card.get("kind") != "state":
        raise CheckpointError(
            f"{path} is not a run's checkpoint: it holds {card.get('kind', 'plain weights')}"
        )
    return _unpack(card.pop("skeleton"), tensors), card


def read_card(path: str | Path) -> dict:
    """The JSON card of a .safetensors file; empty when the file was not written by
    abdlab.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD_KEY, "{}"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (truncated, or another format): {error}"
        ) from None
    if not isinstance(card, dict):
        raise CheckpointError(
            f"{path} has a card that is no JSON object: it was not written by abdlab"
        )
    return card


def load_model(
    path: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load weights, also a stranger's, without ever running code from the file.

    Args:
        path: a .safetensors file, or a .pt/.pth state dict, which is read with
            ``weights_only=True`` and nothing else.
        model: the module (or a function making it) whose weights these are; by default
            what the card names.

    Returns:
        the model in eval mode on ``device``; its ``card`` attribute is the model part
        of the file's card, if any.

    Raises:
        CheckpointError: one sentence for a missing or truncated file, a pickle that
            holds code, an unknown format, missing or extra keys, wrong shapes, weights
            that are not finite.
    """
    path = Path(path)
    weights, card = read_weights(path, device)
    if model is None:
        if "model" not in card:
            raise CheckpointError(
                f"{path} does not say which architecture it holds: pass model=, an nn.Module of"
                " yours"
            )
        try:
            model = build(**card["model"])
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} names an architecture that cannot be built: {error}"
            ) from None
    elif not isinstance(model, nn.Module):
        model = model()
    _check_fit(path, model, weights)
    model.load_state_dict(weights)
    if "model" in card:
        model.card = card["model"]
    return model.to(device).eval()


def read_weights(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict]:
    """A flat name -> tensor dict and the card (empty for foreign files). Raises
    :class:`CheckpointError`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, device)
    if path.suffix not in (".pt", ".pth"):
        raise CheckpointError(
            f"{path} is of an unknown kind: weights come as .safetensors, .pt or .pth"
        )
    try:
        weights = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        if not path.read_bytes()[:4].startswith((b"\x80", b"PK\x03\x04")):
            raise CheckpointError(f"{path} is truncated or no torch file") from None
        raise CheckpointError(
            f"{path} is a pickle with code or whole objects in it, and loading it could run that"
            " code: ask for a state dict, best as .safetensors"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        raise CheckpointError(
            f"{path} is truncated or no torch file ({type(error).__name__})"
        ) from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path} holds no state dict: expected names with tensors")
    return {str(k).removeprefix("module."): v for k, v in weights.items()}, {}


def _check_fit(path: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    name = type(model).__name__
    missing, extra = (
        [k for k in wanted if k not in weights and k not in optional],
        [k for k in weights if k not in wanted],
    )
    if missing and extra:
        raise CheckpointError(
            f"{path} holds another architecture than {name}: it lacks {_some(missing)} and has"
            f" {_some(extra)} instead"
        )
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)}, which {name} needs")
    if extra:
        raise CheckpointError(f"{path} has {_some(extra)}, which {name} does not know")
    for key, value in wanted.items():
        if key in weights and weights[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(weights[key].shape)}, but {name} needs"
                f" {tuple(value.shape)} (another width, depth or number of classes?)"
            )
        if key in weights and not torch.isfinite(weights[key]).all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")
    for key in optional - weights.keys():
        weights[key] = wanted[key]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write(path: str | Path, tensors: dict[str, Tensor], card: dict) -> Path:
    # clone(): safetensors refuses tensors that share memory
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    return write_atomically(path, save(plain, metadata={CARD_KEY: json.dumps(card)}))


def _read_safetensors(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict]:
    card = read_card(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, card  # noqa: SIM118 (a safe_open cannot be iterated)


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
