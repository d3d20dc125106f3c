"""A stranger's file of weights: what it is, where its state dicts lie, and their tensors,
mapped from the file. Nothing in it is ever run (see :mod:`abdlab.pickles`).
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abdlab import errors
from abdlab.errors import CheckpointError
from abdlab.pickles import Damaged, Lazy, Reader, Refused, Storage, interpret

_DIRECTORY = 16 * 2**20  # bytes of a zip file's table of contents
_LEGACY = 0x1950A86A20F9469CFC6C  # the number that files of torch < 1.6 begin with


class _Narrow(io.FileIO):
    """A file for zipfile, which would else hold any table of contents in memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > _DIRECTORY:
            raise zipfile.BadZipFile("its table of contents is too long")
        return super().read(size)


class TorchFile:
    """What ``torch.save`` (of any version since 0.4) wrote: ``tree`` holds plain values
    and :class:`Lazy` tensors, :meth:`tensor` maps one of these from the file.

    Raises:
        CheckpointError: in one sentence, for a file that is damaged, holds code or is
            of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            zipped = self._map[:4] == b"PK\x03\x04"
            self.tree = self._zipped() if zipped else self._legacy()
        except Refused as refused:
            name = shown(str(refused), ".")
            raise CheckpointError(
                f"{path} is a pickle with code or whole objects in it, and loading it could run"
                f" that code ({name}): ask for a state dict, best as .safetensors"
            ) from None
        except CheckpointError:
            raise
        except MemoryError:
            raise CheckpointError(
                f"{path} is damaged: it asks for more memory than there is"
            ) from None
        except Exception as error:  # a damaged file can fail at any step
            if kind := kind_of(path):
                raise CheckpointError(f"{path} {kind}") from None
            reason = str(error) if isinstance(error, Damaged) else type(error).__name__
            raise CheckpointError(f"{path} is truncated or no torch file ({reason})") from None

    def _zipped(self) -> Any:
        with _Narrow(self.path) as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or any(name.endswith("constants.pkl") for name in entries):
            raise Damaged("there is no data.pkl in it")
        home = pickles[0][: -len("data.pkl")]
        packed = [e for n, e in entries.items() if n.startswith(home) and e.compress_type]
        if packed:
            size = sum(entry.file_size for entry in packed)
            raise CheckpointError(
                f"{self.path} is a compressed archive, which torch.save never writes, and would"
                f" unfold to {size / 1e6:.0f} MB: ask for the file as torch.save wrote it"
            )
        for name, entry in entries.items():
            if name.startswith(f"{home}data/"):
                self._places[name[len(home) + 5 :]] = self._place(entry)
        if f"{home}byteorder" in entries:
            start, size = self._place(entries[f"{home}byteorder"])
            if self._map[start : start + min(size, 16)] != b"little":
                raise CheckpointError(
                    f"{self.path} was written by a big-endian machine: ask for it as .safetensors"
                )
        start, size = self._place(entries[pickles[0]])
        return interpret(Reader(self._map, start, start + size))

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Where an entry's bytes begin, and how many there are."""
        head = self._map[entry.header_offset : entry.header_offset + 30]
        if len(head) < 30 or head[:4] != b"PK\x03\x04" or entry.compress_size != entry.file_size:
            raise Damaged("its table of contents is wrong")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
        if start + entry.file_size > len(self._map):
            raise Damaged("its table of contents is wrong")
        return start, entry.file_size

    def _legacy(self) -> Any:
        """A file of torch < 1.6: five pickles, then the numbers; or one plain pickle."""
        reader = Reader(self._map, 0, len(self._map))
        first = interpret(reader)
        if first != _LEGACY:
            return first
        version, system = interpret(reader), interpret(reader)
        if version != 1001 or not system.get("little_endian"):
            raise Damaged("it is of an unknown version, or of a big-endian machine")
        storages: dict[str, Storage] = {}
        tree, keys = interpret(reader, storages), interpret(reader)
        for key in keys:
            (count,) = struct.unpack("<q", reader.read(8))
            kind = storages[key].dtype
            size = count * (kind.itemsize if kind else 1)
            if size < 0 or reader.at + size > reader.end:
                raise Damaged("it ends too early")
            self._places[key] = reader.at, size
            reader.at += size
        return tree

    def tensor(self, lazy: Lazy) -> Tensor:
        """A view of the file's own bytes (of a private copy, should somebody write)."""
        size, dtype = lazy.dtype.itemsize, lazy.dtype
        nbytes = lazy.storage.count * (lazy.storage.dtype.itemsize if lazy.storage.dtype else 1)
        start, there = self._places.get(lazy.storage.key, (0, -1))
        if nbytes > there:
            raise CheckpointError(
                f"{self.path} is truncated or no torch file (numbers are missing)"
            )
        if nbytes < size or 0 in lazy.shape:
            return torch.empty(lazy.shape, dtype=dtype)
        numbers: Any = self._map
        if start % size:
            numbers, start = bytearray(self._map[start : start + nbytes]), 0
        flat = torch.frombuffer(numbers, dtype=dtype, count=nbytes // size, offset=start)
        return flat.as_strided(lazy.shape, lazy.stride, lazy.offset)


def state_dicts(tree: Any) -> dict[str, dict[str, Any]]:
    """The state dicts in a file's tree by their path ("model", "nets.ema", "" for the
    tree itself): dicts by text with at least one tensor that is no single number.

    What optimisers keep is none, and a dict is one rather than those that it holds when
    it has more tensors than they.
    """
    seen: set[int] = set()

    def tensors(value: Mapping) -> int:
        return sum(isinstance(v, (Lazy, Tensor)) and len(v.shape) > 0 for v in value.values())

    def below(path: tuple[str, ...], value: Any) -> dict[str, dict]:
        if not isinstance(value, dict) or id(value) in seen:
            return {}
        seen.add(id(value))
        found: dict[str, dict] = {}
        if len(path) < 4:
            for key, inner in value.items():
                if "optim" not in key.lower():
                    found |= below((*path, key), inner)
        own = tensors(value)
        if own and own >= sum(map(tensors, found.values())):
            return {".".join(path): value}
        return found

    return below((), tree)


def kind_of(path: Path) -> str:
    """What a file that holds no state dict is, as the end of a sentence; empty when
    nobody knows.
    """
    if path.is_dir():
        return (
            "is a folder: name the one file of weights in it (a sharded or distributed checkpoint"
            " must be joined into one file first)"
        )
    with path.open("rb") as file:
        head = file.read(512)
    begins = head.lstrip().lower()
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "is an HDF5 file, as Keras writes it: save the weights as .safetensors"
    if head.startswith(b"\x93NUMPY"):
        return "is a numpy array: save the weights as .safetensors"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, quantised for other programs: ask for the weights as .safetensors"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd")):
        return "is a compressed file: unpack it first"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights themselves: fetch them with git lfs pull"
    if begins.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, perhaps the error of a download"
    if begins.startswith(b"{") and b"weight_map" in head:
        return "is the index of a sharded checkpoint: join its parts into one file first"
    if re.fullmatch(rb"..\0{6}\{\".*", head[:64], re.DOTALL) or head[8:10] == b'{"':
        return "is a safetensors file by another name: call it .safetensors"
    return ""


def _kind_of_zip(path: Path) -> str:
    try:
        with _Narrow(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # as damaged as its reader found it
        return ""
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        return "is a TorchScript program, code and weights in one: ask for a state dict"
    if "archive_format" in ends or "serialized_exported_program.json" in ends:
        return "is a program of torch.export: ask for a state dict"
    if any(end.endswith(".npy") for end in ends):
        return "is an archive of numpy arrays (.npz): save the weights as .safetensors"
    if "model.weights.h5" in ends:
        return "is a Keras model: save the weights as .safetensors"
    if "data.pkl" not in ends:
        return "is a zip archive without weights: unpack it first"
    return ""


def shown(name: str, separator: str = " ") -> str:
    """A name out of a stranger's file, fit for one line of text."""
    name = name.replace(" ", separator)
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 80 else f"{name[:77]}..."


def some(names: Collection[str]) -> str:
    """The first three names, each as it may be shown, and how many more there are."""
    return errors.some(names, lambda name: shown(str(name)))


def first_line(error: BaseException) -> str:
    """The first line of what an error says that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return shown(next((x for x in lines if x and not x.endswith(":")), type(error).__name__), " ")
