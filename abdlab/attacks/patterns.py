"""What an optimised trigger carries: whole numbers as one string, so that a card stays
plain JSON.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib

import numpy as np
import torch
from torch import Tensor


def pack(levels: Tensor) -> str:
    """Whole numbers of any shape, -32767 to 32767, as one string: ``3x8x8:`` and the
    zlib-compressed int16 in base64.

    >>> unpack(pack(torch.tensor([[[1, 2]]]))).tolist()
    [[[1, 2]]]

    Raises:
        ValueError: for values outside that range or not finite.
    """
    if not (levels.abs() <= 32767).all():
        raise ValueError(
            "a pattern holds whole numbers from -32767 to 32767: one of these is larger or not"
            " finite"
        )
    data = levels.round().to(torch.int16).cpu().contiguous().numpy().astype("<i2").tobytes()
    return f"{'x'.join(map(str, levels.shape))}:{base64.b64encode(zlib.compress(data, 9)).decode()}"


def unpack(pattern: str) -> Tensor:
    """The whole numbers (int16) that :func:`pack` wrote.

    Raises:
        ValueError: when the string is none that :func:`pack` writes. It may come from a
            stranger's card: nothing is made from it that is larger than its own shape
            says, and no shape is believed beyond 2^24 numbers.
    """
    found = re.fullmatch(r"(\d{1,6}(?:x\d{1,6})*):([A-Za-z0-9+/=]*)", str(pattern))
    shape = [int(side) for side in found[1].split("x")] if found else []
    try:
        if not 0 < math.prod(shape) <= 2**24 or not shape:
            raise ValueError
        data = zlib.decompressobj().decompress(
            base64.b64decode(found[2], validate=True), 2 * math.prod(shape) + 1
        )
        return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).reshape(shape)
    except (ValueError, RuntimeError, binascii.Error, zlib.error):
        raise ValueError(
            f"this is no pattern as abdlab.attacks.optimize packs it: {str(pattern)[:24]!r}..."
        ) from None
