"""A pickle read as data: no function that it names is looked up, so that none can run.

A pickle is a little program that builds objects. :func:`interpret` follows it with a
stack of plain values: the few names that state dicts need have a meaning here (a tensor
becomes a :class:`Lazy`, which says where its numbers lie), others beside them are known
to be data, and any other name is refused.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: bytes that the interpreted objects of one file may take: a file of a few bytes for
#: each object could fill a memory otherwise
BUDGET = 128 * 2**20
_PER_STEP = 120  # bytes that one step of a pickle can leave behind, besides its text
_LONGEST = 96 * 2**20  # bytes of one text or array outside of the tensors
_KEPT = 2**16  # bytes of the longest text that is kept


class Refused(ValueError):
    """A pickle names something that is no data; the name is the message."""


class Damaged(ValueError):
    """A file that is not whole, or not what it seems."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: ``count`` of ``dtype``, or of bytes when that is
    None.
    """

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True)
class Lazy:
    """A tensor whose numbers are still in the file."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Name(str):
    """What a pickle's global stands for: its name, "module name"."""

    __slots__ = ()


class _Bag(dict):
    """An object that is nothing but its attributes, as argparse's Namespace."""


class _Data:
    """Some value that no weight needs."""

    def __repr__(self) -> str:
        return "data"


DATA = _Data()

_STORAGES: dict[str, torch.dtype | None] = {
    f"{module} {kind}Storage": dtype
    for module in ("torch", "torch.cuda")
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
} | {"torch.storage UntypedStorage": None}

_DTYPES = {f"torch {n}": v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}


def _tensor(storage, offset, size, stride, grad=False, hooks=None, metadata=None) -> Lazy:
    return _tensor_of(storage, offset, size, stride, grad, hooks, storage.dtype, metadata)


def _tensor_of(storage, offset, size, stride, grad, hooks, dtype, metadata=None) -> Lazy:
    dtype = dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype]
    shape, stride = tuple(size), tuple(stride)
    numbers = (offset, *shape, *stride)
    if metadata or len(shape) != len(stride) or len(shape) > 32:
        raise Damaged("a tensor of an unknown kind")
    if storage.dtype not in (None, dtype):
        raise Damaged("a tensor of an unknown kind")
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise Damaged("a tensor with a shape that is no shape")
    there = storage.count if storage.dtype else storage.count // dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    # an expanded tensor repeats its numbers; one that repeats them without end is a trap
    if 0 not in shape and (last >= there or math.prod(shape) > max(there, 2**20)):
        raise Damaged(f"a tensor of shape {shape} claims more numbers than the file holds")
    return Lazy(storage, dtype, shape, stride, offset)


def _typed(function, kind, arguments, state) -> Any:
    return _call(function, arguments)


def _pairs(*items) -> dict:
    made: dict = {}
    for pair in items[0] if items and isinstance(items[0], list) else []:
        _put(made, *pair)
    return made


_BUILTINS = ("builtins", "__builtin__")
_NUMPY = tuple(f"numpy.{core}.{m}" for core in ("core", "_core") for m in ("multiarray", "numeric"))


def _names(modules: tuple[str, ...], names: str) -> list[str]:
    return [f"{module} {name}" for module in modules for name in names.split()]


#: names of values that no weight needs
_UNUSED = [
    *_names(_BUILTINS, "set frozenset complex bytes bytearray range xrange slice"),
    *_names(_NUMPY, "scalar _reconstruct _frombuffer"),
    *_names(("pathlib",), "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    *_names(("datetime",), "datetime date time timedelta timezone"),
    *("torch device", "numpy dtype", "_codecs encode", "PIL.Image Image"),
]

#: name -> what it makes of plain values
_CALLS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_UNUSED, lambda *_: DATA),
    "collections OrderedDict": _pairs,
    "collections defaultdict": lambda *_: {},
    "collections Counter": lambda *counts: counts[0] if counts else {},
    "argparse Namespace": lambda *_: _Bag(),
    "types SimpleNamespace": lambda *_: _Bag(),
    "torch Size": lambda items=(): tuple(items),
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of,
    "torch._utils _rebuild_parameter": lambda data, *_: data,
    "torch._utils _rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor _rebuild_from_type_v2": _typed,
}

#: names that stand for types and are never called
_TYPES = {
    *_names(_BUILTINS, "int long float str unicode bool dict list tuple"),
    *_names(("numpy",), "ndarray float64 float32 float16 int64 int32 uint8 bool_ str_"),
    *_names(("torch",), "Tensor"),
    *_names(("torch.nn.parameter",), "Parameter Buffer"),
}


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function not in _CALLS:
        raise Refused(str(function) if isinstance(function, _Name) else "a call of a value")
    return _CALLS[function](*arguments)


def _global(name: str) -> Any:
    if name in _DTYPES:
        return _DTYPES[name]
    if name not in _CALLS and name not in _STORAGES and name not in _TYPES:
        raise Refused(name)
    return _Name(name)


def _put(target: Any, key: Any, value: Any) -> None:
    """Only what has a text for its key can be a weight, or lead to one."""
    if isinstance(target, dict) and type(key) is str:
        target[key] = value


def _storage(pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        is_module = isinstance(pid, tuple) and pid and pid[0] == "module"
        raise Refused("the source code of a module" if is_module else "a reference to another file")
    _, kind, key, _, count, *view = pid
    if not isinstance(kind, _Name) or kind not in _STORAGES or type(key) is not str:
        raise Damaged("a storage of an unknown kind")
    if type(count) is not int or count < 0 or (view and view[0] is not None):
        raise Damaged("a storage of an unknown kind")
    return Storage(key, _STORAGES[kind], count)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = frozenset(
    op.name
    for op in pickletools.opcodes
    if op.arg and len(op.stack_after) == 1 and not op.stack_before and not op.name.startswith("EXT")
) - {"GLOBAL", "PERSID", "INST", *_GETS}


def interpret(stream: Reader, storages: dict[str, Storage] | None = None) -> Any:
    """The value that one pickle stands for: numbers, texts, lists, tuples, dicts (those
    of their entries whose key is a text), :class:`Lazy` tensors and :data:`DATA`. The
    storages that it names are put into ``storages``.

    Raises:
        Refused: for a name that is no data.
        Damaged, ValueError, IndexError, KeyError, TypeError: for a pickle that is not
            whole or makes no sense.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    spent = 0

    def marked() -> list[Any]:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    for op, arg, _ in pickletools.genops(stream):
        name = op.name
        spent += _PER_STEP
        if name in _LITERALS:
            if isinstance(arg, (str, bytes, bytearray)) and len(arg) > _KEPT:
                arg = DATA
            spent += sys.getsizeof(arg)
            stack.append(arg)
        elif name in _PUTS:
            memo[arg] = stack[-1]
        elif name in _GETS:
            stack.append(memo[arg])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            if len(items) != count:
                raise IndexError("a tuple of too few values")
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "TUPLE":
            items = tuple(marked())
            stack.append(items)  # marked() has put another stack in place
        elif name in ("LIST", "FROZENSET"):
            items = marked()
            stack.append(items)
        elif name == "DICT":
            items, made = marked(), {}
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(made, key, value)
            stack.append(made)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], key, value)
        elif name == "SETITEMS":
            items = marked()
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(stack[-1], key, value)
        elif name == "APPEND":
            value = stack.pop()
            if isinstance(stack[-1], list):
                stack[-1].append(value)
        elif name in ("APPENDS", "ADDITEMS"):
            items = marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(_global(arg))
        elif name == "STACK_GLOBAL":
            what, module = stack.pop(), stack.pop()
            stack.append(_global(f"{module} {what}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Bag) and isinstance(state, dict):
                stack[-1].update(state)
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
            if storages is not None:
                storages[stack[-1].key] = stack[-1]
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                stack = marks.pop()
        elif name == "POP_MARK":
            marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(arg if name == "INST" else f"the pickle step {name}")
        if spent > BUDGET:
            raise Damaged("there is more than 128 MB of objects beside its tensors")
    raise Damaged("the pickle has no end")


class Reader:
    """A part of a mapped file as a stream, which hands out no longer piece than a text
    or array beside weights can be.
    """

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self.data, self.at, self.end = data, start, end

    def read(self, count: int) -> bytes:
        if count > _LONGEST:
            raise Damaged(f"one value outside of its tensors takes {count / 1e6:.0f} MB")
        piece = self.data[self.at : min(self.at + count, self.end)]
        self.at += len(piece)
        return piece

    def readline(self) -> bytes:
        stop = self.data.find(b"\n", self.at, min(self.end, self.at + _KEPT))
        return self.read((stop + 1 if stop >= 0 else min(self.end, self.at + _KEPT)) - self.at)
