"""Tensors in and out of Flower's ``ArrayRecord``, without needless copies.

Dtypes that NumPy knows use Flower's own ``.npy`` serialisation, so any Flower mod can
read them. Others (bfloat16) use the serialisation type ``clicooper.raw``: the bytes of
the tensor in row-major order, little-endian.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flwr_clicooper.errors import MessageError

RAW = "clicooper.raw"
NPY = "numpy.ndarray"

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
        data = tensor.view(torch.uint8).numpy().tobytes()
        return Array("bfloat16", shape, RAW, data)
    array = tensor.numpy()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, np.lib.format.header_data_from_array_1_0(array)
    )
    body = memoryview(array).cast("B") if array.nbytes and array.ndim else array.tobytes()
    return Array(str(array.dtype), shape, NPY, b"".join((head.getvalue(), body)))


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
    return {int(k): v for k, v in sorted(decode(record, what).items(), key=lambda p: int(p[0]))}


def decode_tensor(array: Array, what: str) -> Tensor:
    """Return an ``Array`` as a read-only view of its bytes.

    Raises
    ------
    MessageError
        As `decode`.
    """
    dtype = getattr(torch, array.dtype, None)
    if not isinstance(dtype, torch.dtype) or array.stype not in (RAW, NPY):
        raise MessageError(
            f"{what}: dtype {array.dtype!r} with serialisation {array.stype!r} is not known"
        )
    offset = _npy_offset(array, what) if array.stype == NPY else 0
    count = 1
    for size in array.shape:
        count *= size
    if any(size < 0 for size in array.shape) or len(array.data) != offset + count * dtype.itemsize:
        raise MessageError(
            f"{what}: {len(array.data) - offset} bytes came for "
            f"{array.dtype}{list(array.shape)}"
        )
    if count == 0:
        return torch.empty(array.shape, dtype=dtype)
    view = torch.frombuffer(array.data, dtype=dtype, offset=offset, count=count)
    return view.reshape(array.shape)


def _npy_offset(array: Array, what: str) -> int:
    """Check an ``.npy`` header against the array's fields; return where its data begin."""
    stream = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise MessageError(f"{what}: the bytes are not a version 1.0 .npy file") from error
    if shape != tuple(array.shape) or fortran or dtype != np.dtype(array.dtype):
        raise MessageError(
            f"{what}: the .npy header does not agree with {array.dtype}{list(array.shape)}"
        )
    return stream.tell()
