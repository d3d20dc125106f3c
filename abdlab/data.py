"""Data sets as tensors on the device: one image tensor and one label tensor per split.

Images are float32 NCHW in [0, 1]; labels are int64. Nothing here normalises: models do that inside.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.errors import did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device that ``"auto"`` means here: CUDA where there is one, then Apple's MPS, else the CPU."""
    if str(device) != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data set, on one device.

    Attributes:
        name: what :func:`load` was asked for.
        train_images, test_images: float32 (N, C, H, W) in [0, 1].
        train_labels, test_labels: int64 (N,).
        classes: the class names, in label order.
        mean, std: per channel, of the training images in [0, 1]; for the model's own normalisation.
        shift: the largest random shift in pixels that keeps a label true (padding with zeros).
        flip: whether a mirrored image keeps its label (never for digits or signs).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.train_images.shape[1:])

    def subset(self, train: int | None = None, test: int | None = None) -> Dataset:
        """The first ``train`` and ``test`` images (the splits are already in random order)."""
        return Dataset(
            **{
                **self.__dict__,
                "train_images": self.train_images[:train],
                "train_labels": self.train_labels[:train],
                "test_images": self.test_images[:test],
                "test_labels": self.test_labels[:test],
            }
        )


def load(
    name: str,
    root: str | Path = "data",
    *,
    size: int | None = None,
    download: bool = False,
    device: str | torch.device = "auto",
) -> Dataset:
    """Load ``digits``, ``cifar10``, ``gtsrb`` or ``folder:PATH`` whole onto the device.

    Args:
        name: ``digits`` is embedded in scikit-learn and needs no file. ``folder:PATH`` reads
            PATH/train/CLASS/* and PATH/test/CLASS/*.
        root: where torchvision keeps (or downloads) CIFAR-10 and GTSRB.
        size: resize to size x size pixels; by default 16 for digits, 32 for the others.
        download: let torchvision download what is missing.

    Raises:
        ValueError: for an unknown name, or a folder without the two splits.
        FileNotFoundError: when the files are not there and ``download`` is false.
    """
    device = pick_device(device)
    kind, _, path = name.partition(":")
    if kind not in DATASETS:
        raise ValueError(did_you_mean("data set", kind, DATASETS))
    if kind == "folder" and not path:
        raise ValueError("folder: needs a path, as in folder:data/cifar10 (with train/CLASS/* and test/CLASS/*)")
    reader, shift, flip = DATASETS[kind]
    train, test, classes = reader(Path(path) if path else Path(root), size, download)
    for split, (images, _) in {"train": train, "test": test}.items():
        if len(images) == 0:
            raise ValueError(f"{name} has no images in its {split} split")
    (train_images, train_labels), (test_images, test_labels) = ((to_unit(x), y) for x, y in (train, test))
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3))
    return Dataset(
        name=name,
        train_images=train_images.to(device),
        train_labels=train_labels.to(device),
        test_images=test_images.to(device),
        test_labels=test_labels.to(device),
        classes=tuple(classes),
        mean=tuple(round(v, 4) for v in mean.tolist()),
        std=tuple(round(max(v, 1e-3), 4) for v in std.tolist()),
        shift=shift,
        flip=flip,
    )


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; float images pass unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def _digits(root: Path, size: int | None, download: bool):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float().unsqueeze(1)
    size = size or 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).clamp_(0, 1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=500, random_state=0, stratify=bunch.target)
    return (images[train], labels[train]), (images[test], labels[test]), [str(i) for i in range(10)]


def _cifar10(root: Path, size: int | None, download: bool):
    from torchvision.datasets import CIFAR10

    splits = []
    for train in (True, False):
        try:
            split = CIFAR10(str(root), train=train, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"CIFAR-10 is missing or incomplete under {root}: pass download=True, or root= of an existing copy"
            ) from error
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        splits.append((_resize(images, size or 32), torch.tensor(split.targets)))
    return *splits, split.classes


def _gtsrb(root: Path, size: int | None, download: bool):
    from torchvision.datasets import GTSRB

    splits = []
    for name in ("train", "test"):
        try:
            split = GTSRB(str(root), split=name, download=download)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"GTSRB is missing or incomplete under {root}: pass download=True, or root= of an existing copy"
            ) from error
        files = [path for path, _ in split._samples]
        # torchvision numbers the training folders that it finds: an absent one would shift all later labels
        labels = torch.tensor([int(Path(p).parent.name) if name == "train" else label for p, label in split._samples])
        splits.append(_shuffled(_decode(files, size or 32, root / "gtsrb", name), labels))
    return *splits, [str(i) for i in range(43)]


def _folder(root: Path, size: int | None, download: bool):
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(f"{root / split} is not a folder: folder:PATH needs PATH/train/CLASS/* and PATH/test/CLASS/*")
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    strange = sorted({p.name for p in (root / "test").iterdir() if p.is_dir()} - set(classes))
    if strange:
        raise ValueError(f"{root / 'test'} has classes that train/ has not: {', '.join(strange)}")
    splits = []
    for split in ("train", "test"):
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (root / split / name).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files += map(str, found)
            labels += [label] * len(found)
        splits.append(_shuffled(_decode(files, size or 32, root, split), torch.tensor(labels)))
    return *splits, classes


def _decode(files: list[str], size: int, cache_root: Path, split: str) -> Tensor:
    """Decode image files once; later calls read the cached uint8 tensor beside them."""
    from PIL import Image, UnidentifiedImageError
    from tqdm.auto import tqdm

    stamp = hashlib.sha256(repr([(f, os.path.getsize(f), os.path.getmtime(f)) for f in files]).encode()).hexdigest()[:16]
    cache = cache_root / f".abdlab-{split}-{size}-{stamp}.npy"
    if cache.exists():
        return torch.from_numpy(np.load(cache, allow_pickle=False))
    out = np.empty((len(files), 3, size, size), np.uint8)
    for i, file in enumerate(tqdm(files, desc=f"decoding {split}", disable=len(files) < 2000)):
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
                if image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                out[i] = np.asarray(image).transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{file} is not a readable image: {error}") from error
    try:
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as handle:
            np.save(handle, out)
        partial.replace(cache)
    except OSError:
        pass  # a read-only folder: decoded again the next time
    return torch.from_numpy(out)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


#: name -> (reader, largest label-preserving shift in pixels, may be mirrored)
DATASETS: dict[str, tuple[Callable, int, bool]] = {
    "digits": (_digits, 1, False),
    "cifar10": (_cifar10, 4, True),
    "gtsrb": (_gtsrb, 2, False),
    "folder": (_folder, 4, True),
}


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by its own random offset (zeros move in) and mirror half of them.

    Args:
        images: (N, C, H, W).
        shift: up to this many pixels in each direction; 0 leaves positions alone.
        flip: mirror left-right with probability 1/2.
        generator: a CPU generator; its draws are moved to the images' device.

    Returns:
        (N, C, H, W), a new tensor when anything was asked for.
    """
    n, _, height, width = images.shape
    if shift:
        padded = F.pad(images, [shift] * 4)
        offset = torch.randint(0, 2 * shift + 1, (2, n), generator=generator).to(images.device)
        rows = offset[0, :, None] + torch.arange(height, device=images.device)
        cols = offset[1, :, None] + torch.arange(width, device=images.device)
        index = torch.arange(n, device=images.device)[:, None, None]
        # contiguous(): strides that look like channels_last would put the whole network in that format (see models.place)
        images = padded[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images
