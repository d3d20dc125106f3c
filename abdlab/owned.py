"""A network of the user's own, or a stranger's: made by a name, an import path or
torchvision's, with weights from a file, and images where there are any.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from abdlab.checkpoint import read_card, read_weights
from abdlab.data import DATASETS, Dataset, pick_device, to_unit
from abdlab.errors import CheckpointError, did_you_mean
from abdlab.folders import IMAGE_SUFFIXES, decode
from abdlab.home import at_home, there
from abdlab.models import build, seeded

#: what a network of torchvision's is called by: torchvision:resnet18
TORCHVISION = "torchvision"
#: names of data sets that have no labels: none at all, or a folder of images
NONE, IMAGES = "none", "images"
#: what a preset's own values become when ``teacher.file`` names a stranger's weights, of
#: which nothing is known but what is said; attention would also copy what a trigger
#: excites, and asks for stages
UNSAID: dict[str, Any] = {
    "data.name": NONE,
    "attack.trigger": None,
    "teacher.model": None,
    "teacher.width": None,
    "zskt.attention": 0.0,
}


def is_foreign(name: str) -> bool:
    """Whether a network is none of this library's: "torchvision:NAME" or "module:Class".

    >>> is_foreign("torchvision:resnet18"), is_foreign("wrn-16-2")
    (True, False)
    """
    return ":" in name


def make_network(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    keywords: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    **built: Any,
) -> nn.Module:
    """An untrained network by name: a built-in one (:func:`abdlab.models.build`),
    "torchvision:NAME", or "module:Class", a class or function of the user's own.

    Args:
        classes, channels: for the first two; of the third the keywords say them.
        keywords: of torchvision's function, or of the class.
        mean, std: per channel. A foreign network that expects normalised images gets
            (image - mean) / std; the images stay in [0, 1].
        built: further keywords of :func:`abdlab.models.build` (width).

    Raises:
        ValueError: for a name that leads nowhere, or a class that cannot be made so.

    >>> net = make_network("torchvision:resnet18", classes=10)
    >>> net.fc.out_features
    10
    """
    keywords = dict(keywords or {})
    if not is_foreign(name):
        if keywords:
            raise ValueError(f"{name} is built in: it takes classes and channels, and no keywords")
        own = {k: v for k, v in {"mean": mean, "std": std, **built}.items() if v is not None}
        return build(name, classes=classes, channels=channels, seed=seed, **own)
    place, _, attribute = name.partition(":")
    with seeded(seed):
        if place == TORCHVISION:
            model = _torchvision(attribute, classes, keywords)
        else:
            model = _imported(name, place, attribute, keywords)
    if mean is not None or std is not None:
        model.register_forward_pre_hook(_Normalized(mean or (0.0,), std or (1.0,)))
    return model


class _Normalized:
    """A forward pre-hook that normalises images: the weights keep their names."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(v).float().view(1, -1, 1, 1) for v in (mean, std))

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        images, *rest = args
        return ((images - self.mean.to(images)) / self.std.to(images), *rest)


def _torchvision(name: str, classes: int, keywords: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name not in known:
        raise ValueError(did_you_mean("model of torchvision", name, known))
    if given := {"weights", "weights_backbone"} & keywords.keys():
        raise ValueError(f"{min(given)}= would download: teacher.file names the weights")
    try:
        return get_model(name, weights=None, **{"num_classes": classes, **keywords})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{TORCHVISION}:{name} cannot be made: {error}") from None


def _imported(path: str, place: str, attribute: str, keywords: dict[str, Any]) -> nn.Module:
    try:
        make = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the network {path} cannot be imported ({error}): start abdlab where {place}.py lies,"
            " or put its folder on PYTHONPATH"
        ) from None
    try:
        model = make(**keywords)
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be made with {keywords or 'no keywords'}: {type(error).__name__}:"
            f" {told}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path} makes a {type(model).__name__}, and no nn.Module")
    return model


def told_by(path: str | Path, key: str | None = None) -> tuple[str | None, int | None, int | None]:
    """(architecture, classes, channels) as far as a file of weights tells them.

    A file of abdlab's says all on its card. Of others the last matrix has a row for each
    class, and the first kernel (out, in, height, width) takes the channels; None where
    there is no such tensor.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    path = at_home(path)
    card = read_card(path) if path.suffix.lower() == ".safetensors" else {}
    if isinstance(model := card.get("model"), dict):
        return model.get("name"), model.get("classes"), model.get("channels")
    weights, _ = read_weights(path, key=key)
    kernels = [v for v in weights.values() if v.ndim == 4]
    matrices = [(k, v) for k, v in weights.items() if v.ndim == 2]
    channels = kernels[0].shape[1] if kernels else None
    classes = None
    if path.suffix.lower() == ".safetensors":  # which sorts names
        biases = {k: v for k, v in weights.items() if v.ndim == 1}
        widths = {v.shape[1] for _, v in matrices}
        last = [
            v.shape[0]
            for k, v in matrices
            if len(biases.get(k.replace("weight", "bias"), v)) == len(v)
            and v.shape[0] not in widths
        ]
        classes = last[0] if len(set(last)) == 1 else None
    elif matrices:
        classes = matrices[-1][1].shape[0]
    return None, classes, channels if channels in (1, 3, 4) else None


def named_by(path: str | Path) -> nn.Module:
    """The untrained network that the card of a file of abdlab's names.

    Raises:
        CheckpointError: for a file that names none.
    """
    path = at_home(path)
    card = read_card(path) if path.suffix.lower() == ".safetensors" else {}
    if not isinstance(card.get("model"), dict):
        raise CheckpointError(
            f"{path} does not say which architecture it holds: set teacher.model, such as"
            " torchvision:resnet18, wrn-16-2 or my_model:TheirNet"
        )
    try:
        return build(**card["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} names an architecture that is not ours: {error}") from None


def file_stamp(path: str | Path) -> str:
    """The SHA-256 of a file, by which a run knows the weights that it was made from.

    Raises:
        CheckpointError: when it cannot be read.
    """
    try:
        with at_home(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None


def unlabelled(
    name: str,
    shape: Sequence[int],
    classes: int | Sequence[str],
    device: str | torch.device = "auto",
) -> Dataset:
    """A data set without labels, so that ACC is unknown: "none" has no image at all,
    "images:PATH" shows those in a folder (and below it) as test images.

    Args:
        shape: (C, H, W); images are resized to it. classes: how many, or their names.

    Raises:
        ValueError: for a folder without images.

    >>> data = unlabelled("none", (3, 32, 32), 4, "cpu")
    >>> data.shape, data.classes, len(data.test_images)
    ((3, 32, 32), ('0', '1', '2', '3'), 0)
    """
    device, shape = pick_device(device), tuple(shape)
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    kind, _, path = name.partition(":")
    empty = torch.zeros(0, *shape, device=device)
    shown = pictures(path, shape).to(device) if kind == IMAGES else empty
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Dataset(
        name=name,
        train_images=empty,
        train_labels=none,
        test_images=shown,
        test_labels=none,
        classes=names,
        mean=(0.5,) * shape[0],
        std=(0.25,) * shape[0],
        # nothing is known of what keeps a label: not even a mirror
        shift=1 if min(shape[1:]) < 24 else 2,
        flip=False,
    )


def pictures(path: str | Path, shape: Sequence[int]) -> Tensor:
    """The images in a folder and below it, float32 (N, C, H, W) in [0, 1], in the order
    of their names.

    Raises:
        ValueError: for a folder without images, or an image that cannot be decoded.
    """
    folder, (channels, height, width) = at_home(path).expanduser(), shape
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to read images from")
    files = image_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no image (.png, .jpg and other usual kinds)")
    found = to_unit(decode(files, max(height, width), folder, "images"))
    if height != width:
        found = torch.nn.functional.interpolate(
            found, size=(height, width), mode="bilinear", antialias=True
        ).clamp(0, 1)
    return found.mean(1, keepdim=True) if channels == 1 else found[:, :channels]


def size_told(path: str | Path, first: int = 64) -> list[int] | None:
    """[height, width] of the images in a folder and below it, where the ``first`` of
    them all have one size; else None. No pixel is read.
    """
    sizes = set()
    for file in image_files(path)[:first]:
        try:
            with Image.open(file) as image:
                sizes.add(image.size)
        except OSError:
            return None
    return [*sizes.pop()][::-1] if len(sizes) == 1 else None


def image_files(path: str | Path) -> list[str]:
    """The images in a folder and below it, in the order of their names."""
    folder = at_home(path).expanduser()
    return sorted(
        str(p)
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def images_named(text: str) -> str:
    """The data set that a person means by a name or by a folder: PATH with train/ and
    test/ is "folder:PATH", any other folder "images:PATH".

    >>> images_named("digits"), images_named("none")
    ('digits', 'none')

    Raises:
        ValueError: for neither.
    """
    if text in (*DATASETS, NONE) or ":" in text:
        return text
    folder = there(text)
    if not folder.is_dir():
        raise ValueError(f"{did_you_mean('data set', text, [*DATASETS, NONE])}, or a folder")
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    return f"{'folder' if split else IMAGES}:{folder}"


def check_shape(shape: Any, why: str) -> tuple[int, int, int]:
    """A (C, H, W) as settings hold it.

    Raises:
        ValueError: for anything else, in one sentence that begins with ``why``.
    """
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) != 3
        or not all(type(n) is int and 1 <= n <= 2048 for n in shape)
    ):
        raise ValueError(
            f"{why}: data.shape (--shape of the commands) is (channels, height, width), such as"
            f" [3, 32, 32], not {shape!r}"
        )
    return tuple(shape)


def layers_told(model: nn.Module) -> str:
    """A network in a few words: its class, its parameters, what it is made of.

    >>> layers_told(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    'Sequential, 20 parameters, 1 convolutions, 0 batch norms'
    """
    kinds = [*map(type, model.modules())]
    count = sum(p.numel() for p in model.parameters())
    convs = sum(issubclass(k, nn.modules.conv._ConvNd) for k in kinds)
    norms = sum(issubclass(k, nn.modules.batchnorm._BatchNorm) for k in kinds)
    name = type(model).__name__
    return f"{name}, {count:,} parameters, {convs} convolutions, {norms} batch norms"


__all__ = [
    "IMAGES",
    "NONE",
    "UNSAID",
    "check_shape",
    "file_stamp",
    "image_files",
    "images_named",
    "is_foreign",
    "layers_told",
    "make_network",
    "named_by",
    "pictures",
    "size_told",
    "told_by",
    "unlabelled",
]
