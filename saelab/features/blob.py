"""Packs arrays into one SQLite blob: `SLB`, a version byte, then zlib of header length, JSON header, raw bytes.

The header records the name, dtype and shape of every array, so a blob can be read without any other file; no pickle.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping

import numpy as np

from saelab.errors import StoreError

_MAGIC = b"SLB\x01"
_DTYPES = {"<f4", "<f8", "<i4", "<i8", "|u1"}


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Pack arrays of float32/64, int32/64 or uint8 into one compressed, self-describing blob."""
    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {name: [array.dtype.str, list(array.shape)] for name, array in ready.items()}
    text = json.dumps(header).encode()
    body = struct.pack("<I", len(text)) + text + b"".join(array.tobytes() for array in ready.values())
    return _MAGIC + zlib.compress(body, 6)


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a blob written by `pack_arrays`. Raises `StoreError` for a damaged blob or one of another version."""
    if data[:4] != _MAGIC:
        raise StoreError(f"A stored blob starts with {data[:4]!r}, expected {_MAGIC!r}: collect the features again.")
    try:
        body = zlib.decompress(data[4:])
        (length,) = struct.unpack_from("<I", body)
        header = json.loads(body[4 : 4 + length])
        return _read_arrays(body, 4 + length, header)
    except (zlib.error, struct.error, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"A stored blob is damaged ({error}): collect the features again.") from error


def _read_arrays(body: bytes, offset: int, header: dict) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (dtype, shape) in header.items():
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}")
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(body, dtype=dtype, count=count, offset=offset).reshape(shape)
        offset += count * np.dtype(dtype).itemsize
    return arrays
