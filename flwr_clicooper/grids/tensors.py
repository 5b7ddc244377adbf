"""Tensors in and out of Flower's ``ArrayRecord``, without needless copies.

Dtypes that NumPy knows use Flower's own ``.npy`` serialisation, so any Flower mod can
read them. Others (bfloat16) use the serialisation type ``clicooper.raw``: the bytes of
the tensor in row-major order, little-endian.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from copy import copy
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flwr_clicooper.errors import MessageError
from flwr_clicooper.split.specs import CROSSING

RAW = "clicooper.raw"
NPY = "numpy.ndarray"

_DTYPES = {
    (RAW if dtype is torch.bfloat16 else NPY, str(dtype).removeprefix("torch.")): dtype
    for dtype in CROSSING
}

# Decoded tensors are views of the message's bytes and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def encode(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of tensors by name; one copy of each."""
    return ArrayRecord({name: encode_tensor(tensor) for name, tensor in tensors.items()})


def encode_places(tensors: tuple[Tensor, ...] | Mapping[int, Tensor]) -> ArrayRecord:
    """Return a record of tensors that are named by their place."""
    items = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
    return encode({str(place): tensor for place, tensor in items})


def encode_tensor(tensor: Tensor) -> Array:
    """Return a tensor as Flower's ``Array``."""
    tensor = tensor.detach().cpu().contiguous()
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bfloat16:
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return Array("bfloat16", shape, RAW, data)
    array = tensor.numpy()
    head = _npy_header(str(array.dtype), shape)
    body = array.reshape(-1).view(np.uint8).data
    return Array(str(array.dtype), shape, NPY, b"".join((head, body)))


def decode(record: ArrayRecord, what: str) -> dict[str, Tensor]:
    """Return the tensors of a record as read-only views of its bytes.

    Raises
    ------
    MessageError
        An array's bytes do not agree with its declared dtype and shape.
    """
    return {name: decode_tensor(a, f"{what} {name!r}") for name, a in record.items()}


def decode_places(record: ArrayRecord, what: str) -> dict[int, Tensor]:
    """Return the tensors of a record that are named by their place.

    Raises
    ------
    MessageError
        A name is not a place, or as `decode`.
    """
    for name in record:
        if not name.isascii() or not name.isdigit() or str(int(name)) != name:
            raise MessageError(f"{what}: {name!r} is not the place of a tensor")
    return {
        int(k): v for k, v in sorted(decode(record, what).items(), key=lambda p: int(p[0]))
    }


def decode_tensor(array: Array, what: str) -> Tensor:
    """Return an ``Array`` as a read-only view of its bytes.

    Raises
    ------
    MessageError
        As `decode`.
    """
    dtype, shape = _DTYPES.get((array.stype, array.dtype)), tuple(array.shape)
    if dtype is None:
        raise MessageError(
            f"{what}: dtype {array.dtype!r} with serialisation {array.stype!r} is not known"
        )
    if any(size < 0 for size in shape):
        raise MessageError(f"{what}: {list(shape)} is not a shape")
    # Comparing with the header that must stand there parses nothing that came.
    head = _npy_header(array.dtype, shape) if array.stype == NPY else b""
    count = math.prod(shape)
    expected = len(head) + count * dtype.itemsize
    if len(array.data) != expected or array.data[: len(head)] != head:
        raise MessageError(
            f"{what}: the {len(array.data)} bytes are not those of "
            f"{array.dtype}{list(shape)}, which are {expected}"
        )
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    view = torch.frombuffer(array.data, dtype=dtype, offset=len(head), count=count)
    return view.reshape(shape)


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the one version 1.0 header that NumPy writes for a dtype and a shape."""
    stream = io.BytesIO()
    fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def snapshot(record: ArrayRecord) -> ArrayRecord:
    """Return a record of the same bytes that later changes to `record` leave as it is."""
    found = ArrayRecord()  # which takes no views of bytes when it is made, but here
    for name, array in record.items():
        found[name] = copy(array)
    return found


def raw_arrays(record: ArrayRecord) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    """Yield name, dtype, shape and row-major little-endian bytes of a record's arrays.

    Nothing is copied.

    Raises
    ------
    MessageError
        As `decode`.
    """
    for name, array in record.items():
        shape = tuple(array.shape)
        decode_tensor(array, repr(name))
        head = _npy_header(array.dtype, shape) if array.stype == NPY else b""
        yield name, array.dtype, shape, memoryview(array.data)[len(head) :]
