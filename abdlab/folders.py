"""Folders of image files as classes, files and tensors: what is read, what is left out,
and a cache of what was decoded.

An image file becomes three channels of bytes, the way a viewer shows it:

- 16-bit, 32-bit and floating-point grey is scaled from its own white to 255;
- EXIF rotation is applied;
- what is transparent is black, like the zeros that random shifts move in;
- of an animation the first picture counts.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from abdlab.errors import some

#: what torchvision's folder reader takes; GIF, TGA and rarer names of the same formats
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".gif", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)

#: the decoders that may see a file: another one would start a program (EPS)
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "TGA")

#: folders that operating systems and tools put beside a user's own
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "__pycache__",
        "lost+found",
        "system volume information",
        "$recycle.bin",
        "@eadir",
        "#recycle",
    }
)

_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "icon\r"))
_DECODING = 2  # a new number whenever the same file becomes other bytes: old caches are void
_DAY = 24 * 3600


def read_folder(root: Path) -> tuple[list[str], dict[str, tuple[list[str], list[int]]]]:
    """The classes below ROOT/train, and the image files and labels of both splits.

    A class is a folder that is neither hidden nor a system's own; its images may lie in
    folders below it. One warning says how many files were left out, and why.

    Returns:
        (class names in label order, {"train" or "test": (files, labels)}).

    Raises:
        FileNotFoundError: a split is no folder.
        ValueError: a class has no images, or only the test split has it.
    """
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"{root / split} is not a folder: folder:PATH needs PATH/train/CLASS/* and"
                " PATH/test/CLASS/*"
            )
    classes = _class_names(root / "train")
    tested = _class_names(root / "test")
    strange = [name for name in tested if name not in classes]
    if strange:
        raise ValueError(f"{root / 'test'} has classes that train/ has not: {', '.join(strange)}")
    left: Counter[str] = Counter()
    splits: dict[str, tuple[list[str], list[int]]] = {}
    for split, names in (("train", classes), ("test", tested)):
        files, labels, empty = [], [], []
        for name in names:
            found = sorted(_images(root / split / name, left))
            files += map(str, found)
            labels += [classes.index(name)] * len(found)
            empty += [] if found else [name]
        if empty and files:
            raise ValueError(
                f"{root / split} has classes without images: {some(empty)} (fill these folders, or"
                " take them away)"
            )
        splits[split] = files, labels
        _count_outside(root / split, left)
    _say_what_was_left(root, left, [name for name in classes if name not in tested])
    return classes, splits


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not _is_hidden(p.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | _SYSTEM_FILES


def _images(folder: Path, left: Counter[str]) -> Iterator[Path]:
    """The image files below a folder; the others are counted in ``left`` by reason."""

    def unreadable(error: OSError):
        raise ValueError(f"{error.filename} cannot be read ({error.strerror})") from error

    seen = set()  # links may lead back
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        for name in [name for name in folders if _is_hidden(name)]:
            folders.remove(name)
            left["in hidden or system folders"] += _files_below(Path(place, name))
        for file in (Path(place, name) for name in files):
            if _is_hidden(file.name):
                left["hidden"] += 1
            elif file.suffix.lower() not in IMAGE_SUFFIXES:
                left[f"of the kind {file.suffix.lower() or 'without a suffix'}"] += 1
            elif not file.is_file():
                left["links to nothing"] += 1
            else:
                yield file


def _count_outside(split: Path, left: Counter[str]) -> None:
    """Count what lies in a split's folder and in none of its classes."""
    for path in split.iterdir():
        if path.is_dir():
            if _is_hidden(path.name):
                left["in hidden or system folders"] += _files_below(path)
        else:
            left["hidden" if _is_hidden(path.name) else "in no class folder"] += 1


def _files_below(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _say_what_was_left(root: Path, left: Counter[str], untested: list[str]) -> None:
    reasons = [f"{count} {why}" for why, count in left.most_common() if count]
    said = []
    if reasons:
        number = sum(left.values())
        shown = ", ".join(reasons[:6]) + (", and others" if len(reasons) > 6 else "")
        said.append(f"left out {number} file{'s' * (number > 1)} ({shown})")
    if untested:
        said.append(f"found no test images of {some(untested)}")
    if said:
        warnings.warn(
            f"{root}: {' and '.join(said)}", UserWarning, stacklevel=5
        )  # whoever called load


def decode(
    files: list[str],
    size: int,
    cache_root: Path,
    split: str,
    mend: str = "replace it, or take it away",
) -> Tensor:
    """Decode image files once; later calls read the cached tensor beside them.

    Args:
        files: paths of image files.
        size: height and width of the result, in pixels.
        cache_root: the folder of the cache. One that cannot be read is made anew, and
            older ones of the same split and size are removed.
        split: a name for the cache.
        mend: what to do about a bad file, for the error.

    Returns:
        uint8 (N, 3, size, size).

    Raises:
        ValueError: a file that cannot be decoded, by name.
    """
    stamp = hashlib.sha256(
        repr(
            [_DECODING]
            # relative: every launcher writes the same folder in its own way
            + [
                (os.path.relpath(f, cache_root), os.path.getsize(f), os.path.getmtime(f))
                for f in files
            ]
        ).encode()
    ).hexdigest()[:16]
    cache = cache_root / f".abdlab-{split}-{size}-{stamp}.npy"
    shape = (len(files), 3, size, size)
    cached = _cached(cache, shape)
    if cached is not None:
        return torch.from_numpy(cached)
    out = np.empty(shape, np.uint8)
    with warnings.catch_warnings():
        # up to twice as large an image as this warns of is read; beyond, it is an error
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for i, file in enumerate(tqdm(files, desc=f"decoding {split}", disable=len(files) < 2000)):
            out[i] = read_image(file, size, mend)
    _keep(out, cache, f".abdlab-{split}-{size}-*")
    return torch.from_numpy(out)


def _cached(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What the cache holds; None where there is none or it is damaged."""
    try:
        found = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _keep(out: np.ndarray, cache: Path, family: str) -> None:
    """Write the cache, whole or not at all, and remove what it replaces."""
    partial = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as handle:
            np.save(handle, out)
        partial.replace(cache)
        for old in cache.parent.glob(family):
            # another process may be writing its own part right now
            if old != cache and (old.suffix == ".npy" or time.time() - old.stat().st_mtime > _DAY):
                old.unlink(missing_ok=True)
    except OSError:
        pass  # a read-only folder or a full disk: decoded again the next time
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_image(
    file: str | Path, size: int, mend: str = "replace it, or take it away"
) -> np.ndarray:
    """One image file as uint8 (3, size, size), as a viewer shows it (see the module's
    text); resized bilinearly with anti-aliasing.

    Raises:
        ValueError: in one sentence, with the file's name, for what cannot be decoded or
            is larger than Pillow's limit (179 megapixels).
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            white = _white(image) if image.mode[0] in "IF" else None
            image = ImageOps.exif_transpose(image)
            image = _opaque(image) if white is None else _grey(image, *white)
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(
            f"{file} has more than {limit:.0f} megapixels, Pillow's limit against files that unfold"
            " without end: scale it down, or take it away"
        ) from None
    except Exception as error:  # decoders fail in every way on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not a readable image ({reason}): {mend}") from error
    if pixels.ndim == 2:
        return np.broadcast_to(pixels.round().clip(0, 255).astype(np.uint8), (3, size, size))
    return pixels.transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """An image of 8-bit channels as RGB, in front of black."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


def _white(image: Image.Image) -> tuple[float, bool]:
    """The number that stands for white in a grey image of more than 8 bits, and whether
    the file counts from white down to black.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        return 1.0, tags.get(262) == 0
    # PNG and PGM come as 16 bits; TIFF says how many it has, and 2 for signed
    bits = tags.get(258, (16,))[0]
    signed = tags.get(339, (1,))[0] == 2
    return float(2 ** (bits - signed) - 1), tags.get(262) == 0


def _grey(image: Image.Image, white: float, inverted: bool) -> Image.Image:
    """A grey image of more than 8 bits as floats from 0 to 255."""
    values = np.asarray(image)
    if image.mode == "I" and white == 2**32 - 1:
        values = values.view(np.uint32)
    unit = values.astype(np.float64) / white
    if not (unit.min() >= 0 and unit.max() <= 1):  # so also for NaN
        raise ValueError(
            f"its grey values run from {values.min():g} to {values.max():g}, where black is 0 and"
            f" white is {white:g}"
        )
    return Image.fromarray(((1 - unit if inverted else unit) * 255).astype(np.float32))
