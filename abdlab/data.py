"""Data sets as tensors on the device: one image tensor and one label tensor per split.

Images are float32 NCHW in [0, 1]; labels are int64. Nothing here normalises: models do
that inside.
"""

from __future__ import annotations

import csv
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abdlab.augment import augment, deliver, new_seed, random_views, resized_crops
from abdlab.errors import did_you_mean, some
from abdlab.folders import decode, read_folder
from abdlab.home import at_home

__all__ = [
    "DATASETS",
    "Dataset",
    "augment",
    "deliver",
    "load",
    "new_seed",
    "pick_device",
    "random_views",
    "resized_crops",
    "to_unit",
]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device that ``"auto"`` means here: CUDA where there is one, then Apple's MPS,
    else the CPU.
    """
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
        classes: the class names, in label order; a run's config can record them, so
            that a change of the folder's classes is noticed.
        mean, std: per channel, of the training images in [0, 1]; for the model's own
            normalisation.
        shift: the largest random shift in pixels that keeps a label true (padding with
            zeros).
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
        """The first ``train`` and ``test`` images (the splits are already in random
        order).
        """
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
        name: ``digits`` is embedded in scikit-learn and needs no file. ``folder:PATH``
            reads PATH/train/CLASS/* and PATH/test/CLASS/*, subfolders included, as
            three channels (see :mod:`abdlab.folders` for deep grey, EXIF and alpha). A
            warning says how many files were left out, and why.
        root: where torchvision keeps (or downloads) CIFAR-10 and GTSRB. It, and PATH,
            lie below :func:`abdlab.home.home` when relative.
        size: resize to size x size pixels; by default 16 for digits, 32 for the others.
        download: let torchvision download what is missing or damaged. It unpacks over
            what is there, and only an archive whose checksum is right; a download that
            fails leaves what was unpacked alone.

    Raises:
        ValueError: for an unknown name, an image that cannot be decoded, a class without
            images, or classes that do not fit.
        FileNotFoundError: when files are missing or damaged and ``download`` is false,
            or the download fails; it says which.

    >>> load("digits", device="cpu").shape
    (1, 16, 16)
    """
    device = pick_device(device)
    kind, _, path = name.partition(":")
    if kind not in DATASETS:
        raise ValueError(did_you_mean("data set", kind, DATASETS))
    if kind == "folder" and not path:
        raise ValueError(
            "folder: needs a path, as in folder:data/cifar10 (with train/CLASS/* and test/CLASS/*)"
        )
    reader, shift, flip = DATASETS[kind]
    train, test, classes = reader(at_home(path or root), size, download)
    for split, (images, _) in {"train": train, "test": test}.items():
        if len(images) == 0:
            raise ValueError(f"{name} has no images in its {split} split")
    (train_images, train_labels), (test_images, test_labels) = (
        (to_unit(x), y) for x, y in (train, test)
    )
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


#: the digits' rows for training and, the last :data:`DIGITS_TEST`, for testing: what
#: scikit-learn's ``train_test_split(range(1797), test_size=500, random_state=0,
#: stratify=labels)`` gave
DIGITS_SPLIT, DIGITS_TEST = Path(__file__).with_name("digits_split.npy"), 500


def _digits(root: Path, size: int | None, download: bool):
    table = _digits_table()
    images = torch.from_numpy(table[:, :-1].reshape(-1, 8, 8) / 16).float().unsqueeze(1)
    size = size or 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).clamp_(
        0, 1
    )
    labels = torch.from_numpy(table[:, -1]).long()
    rows = torch.from_numpy(np.load(DIGITS_SPLIT).astype(np.int64))
    train, test = rows[:-DIGITS_TEST], rows[-DIGITS_TEST:]
    return (images[train], labels[train]), (images[test], labels[test]), [str(i) for i in range(10)]


def _digits_table() -> np.ndarray:
    """(1797, 65): 64 pixels from 0 to 16, then the label, as scikit-learn ships them.

    Read without importing scikit-learn, which takes a second, where its file is found.
    """
    found = find_spec("sklearn")
    for folder in found.submodule_search_locations if found else ():
        file = Path(folder) / "datasets/data/digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _cifar10(root: Path, size: int | None, download: bool):
    from torchvision.datasets import CIFAR10

    class Whole(CIFAR10):
        def _check_integrity(
            self,
        ):  # torchvision's own forgets batches.meta, so that download=True would not bring it back
            return not _cifar10_faults(root)

    splits = []
    for train in (True, False):
        split = _whole(
            "CIFAR-10",
            CIFAR10.base_folder,
            root,
            download,
            lambda train=train: Whole(str(root), train=train, download=download),
            lambda: _cifar10_faults(root),
        )
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        splits.append((_resize(images, size or 32), torch.tensor(split.targets)))
    return *splits, split.classes


def _cifar10_faults(root: Path) -> list[str]:
    """What keeps ``root`` from holding CIFAR-10 as torchvision knows it, one phrase per
    fault; empty when all is there.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder, archive = root / CIFAR10.base_folder, root / CIFAR10.filename
    sums = {
        **dict(CIFAR10.train_list + CIFAR10.test_list),
        CIFAR10.meta["filename"]: CIFAR10.meta["md5"],
    }
    missing = [name for name in sums if not (folder / name).is_file()]
    damaged = [
        name
        for name in sums
        if name not in missing and not check_integrity(folder / name, sums[name])
    ]
    faults = [f"{some(damaged)} in {folder.name}: the md5 sum is wrong"] if damaged else []
    if missing:
        faults.insert(
            0,
            (
                f"{folder.name} lacks {some(missing)}"
                if folder.is_dir()
                else f"there is no {folder.name} in it"
            ),
        )
    if faults and archive.is_file():
        whole = check_integrity(archive, CIFAR10.tgz_md5)
        faults.append(
            f"{archive.name} is {'not unpacked' if whole else 'half-downloaded or damaged'}"
        )
    return faults


#: GTSRB's class folders, in label order
_SIGNS = tuple(f"{label:05d}" for label in range(43))


def _gtsrb(root: Path, size: int | None, download: bool):
    from torchvision.datasets import GTSRB

    base, splits = root / "gtsrb", []

    class Whole(GTSRB):
        def _check_exists(
            self,
        ):  # torchvision's own takes the folder for the whole, also after half an unpacking
            return not _gtsrb_faults(base, self._split)

    for name in ("train", "test"):
        split = _whole(
            "GTSRB",
            base.name,
            root,
            download,
            lambda name=name: Whole(str(root), split=name, download=download),
            lambda name=name: _gtsrb_faults(base, name),
        )
        files = [path for path, _ in split._samples]
        if name == "train":
            # torchvision numbers the training folders that it finds: a strange one
            # would shift all later labels
            strange = sorted({Path(path).parent.name for path in files} - set(_SIGNS))
            if strange:
                raise ValueError(
                    f"{base / 'GTSRB/Training'} has folders that are no class of GTSRB:"
                    f" {some(strange)} (the classes are {_SIGNS[0]} to {_SIGNS[-1]}; move the"
                    " others elsewhere)"
                )
        labels = torch.tensor(
            [int(Path(p).parent.name) if name == "train" else label for p, label in split._samples]
        )
        mend = "delete that file and pass download=True"
        splits.append(_shuffled(decode(files, size or 32, base, name, mend), labels))
    return *splits, [str(i) for i in range(len(_SIGNS))]


def _gtsrb_faults(base: Path, split: str) -> list[str]:
    """What keeps ``base`` from holding one split of GTSRB, one phrase per fault; empty
    when all is there.
    """
    images = base / ("GTSRB/Training" if split == "train" else "GTSRB/Final_Test/Images")
    if not images.is_dir():
        archives = [
            path
            for path in sorted(base.glob("*.zip"))
            if ("Training" in path.name) == (split == "train")
        ]
        states = {
            path.name: "not unpacked" if zipfile.is_zipfile(path) else "half-downloaded or damaged"
            for path in archives
        }
        found = images.relative_to(base.parent)
        return [
            f"there is no {found} in it",
            *(f"{name} is {state}" for name, state in states.items()),
        ]
    return (
        _training_faults(images)
        if split == "train"
        else _test_faults(images, base / "GT-final_test.csv")
    )


def _training_faults(folder: Path) -> list[str]:
    absent = [name for name in _SIGNS if not (folder / name).is_dir()]
    faults = (
        [f"{len(absent)} of the 43 class folders are not in {folder.name}: {some(absent)}"]
        if absent
        else []
    )
    for name in sorted(set(_SIGNS) - set(absent)):
        there, table = _pictures(folder / name), folder / name / f"GT-{name}.csv"
        if not there:
            faults.append(f"the class folder {name} holds no .ppm image")
        elif table.is_file():  # the archive's own list of the folder
            lost = sorted({row.get("Filename") or "" for row in _rows(table)[1]} - there - {""})
            faults += (
                [f"{table.name} lists images that are not there: {some(lost)}"] if lost else []
            )
    return faults


def _test_faults(folder: Path, table: Path) -> list[str]:
    if not table.is_file():
        return [f"there is no {table.name}, which holds the labels of the test images"]
    columns, rows = _rows(table)
    if not {"Filename", "ClassId"} <= columns:
        return [f"{table.name} must have the columns Filename and ClassId, separated by semicolons"]
    for line, row in enumerate(rows, start=2):
        label = (row["ClassId"] or "").strip()
        if not row["Filename"] or not label.isdecimal() or int(label) >= len(_SIGNS):
            return [
                f"line {line} of {table.name} must have a Filename and a ClassId from 0 to 42, not"
                f" {row['Filename']!r} and {label!r}"
            ]
    listed, there = {row["Filename"] for row in rows}, _pictures(folder)
    faults = []
    if listed - there:
        faults.append(
            f"{table.name} lists images that are not there: {some(sorted(listed - there))}"
        )
    if there - listed:
        faults.append(
            f"{table.name} lists {len(listed & there)} of {len(there)} test images and lacks"
            f" {some(sorted(there - listed))}"
        )
    return faults


def _pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".ppm"}


def _rows(table: Path) -> tuple[set[str], list[dict[str, str | None]]]:
    """Columns and rows of one of GTSRB's tables; none where it is no text."""
    try:
        with table.open(newline="") as handle:
            reader = csv.DictReader(handle, delimiter=";", skipinitialspace=True)
            return set(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError):
        return set(), []


def _whole(
    what: str,
    needs: str,
    root: Path,
    download: bool,
    read: Callable,
    faults: Callable[[], list[str]],
):
    """What ``read`` returns. Whatever goes wrong in torchvision's reading and
    downloading becomes one sentence with the fault.
    """
    try:
        return read()
    except (
        OSError,
        HTTPException,
        RuntimeError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
    ) as error:
        by_hand = f"root= of a folder that holds a whole {needs}"
        try:
            found = "; ".join(faults())
        except OSError as unreadable:
            found = str(unreadable)
        if not download:
            raise FileNotFoundError(
                f"{what} is missing or incomplete under {root} ({found or error}): pass"
                f" download=True, or {by_hand}"
            ) from error
        # torchvision's own sentences are RuntimeErrors, and say less than what is there
        # now
        reason = (
            found
            if isinstance(error, RuntimeError) and found
            else str(error) or type(error).__name__
        )
        raise FileNotFoundError(
            f"{what} could not be downloaded to {root} ({reason.splitlines()[0]}): try again, or"
            f" pass {by_hand}"
        ) from error


def _folder(root: Path, size: int | None, download: bool):
    classes, splits = read_folder(root)
    decoded = [
        _shuffled(decode(files, size or 32, root, split), torch.tensor(labels))
        for split, (files, labels) in splits.items()
    ]
    return *decoded, classes


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(
        images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
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
