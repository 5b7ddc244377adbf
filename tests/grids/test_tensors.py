from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_clicooper.errors import MessageError
from flwr_clicooper.grids.tensors import (
    decode,
    decode_places,
    decode_tensor,
    encode,
    encode_places,
    encode_tensor,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 99),
)
def test_what_is_encoded_is_decoded(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 9).to(dtype)
    found = decode_tensor(encode_tensor(tensor), "x")
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bfloat16])
def test_other_flower_mods_can_read_and_write_the_arrays(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert np.array_equal(encode_tensor(tensor).numpy(), tensor.numpy())
    assert torch.equal(decode_tensor(Array(tensor.numpy()), "x"), tensor)


def test_views_with_strides_travel_as_their_values() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()[1:]
    assert torch.equal(decode_tensor(encode_tensor(tensor), "x"), tensor)


def test_decoding_copies_nothing() -> None:
    array = encode_tensor(torch.arange(1000.0))
    first, second = decode_tensor(array, "x"), decode_tensor(array, "x")
    assert first.data_ptr() == second.data_ptr()


def test_places_are_kept_also_when_some_are_missing() -> None:
    tensors = {10: torch.ones(1), 2: torch.zeros(1)}
    assert list(decode_places(encode_places(tensors), "x")) == [2, 10]


@pytest.mark.parametrize("name", ["a", "-1", "01", "1.0", "", "٣"])
def test_names_that_are_no_places_are_refused(name: str) -> None:
    with pytest.raises(MessageError, match="not the place"):
        decode_places(encode({name: torch.ones(1)}), "x")


def test_fortran_order_and_other_npy_versions_are_refused() -> None:
    import io

    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    with pytest.raises(MessageError, match="are not those of"):
        decode_tensor(Array(array), "x")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(3.0), version=(2, 0))
    with pytest.raises(MessageError, match="are not those of"):
        decode_tensor(Array("float64", (3,), "numpy.ndarray", stream.getvalue()), "x")


def test_objects_are_refused_before_anything_is_unpickled() -> None:
    import io

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": (1,)}
    )
    data = stream.getvalue() + b"x" * 8
    with pytest.raises(MessageError):
        decode_tensor(Array("object", (1,), "numpy.ndarray", data), "x")
    with pytest.raises(MessageError):
        decode_tensor(Array("float64", (1,), "numpy.ndarray", data), "x")


@settings(max_examples=300)
@given(position=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_damaged_bytes_give_a_tensor_of_the_declared_shape_or_a_named_error(
    position: int, byte: int, cut: int
) -> None:
    array = encode_tensor(torch.arange(20.0).reshape(4, 5))
    data = bytearray(array.data)
    data[position % len(data)] = byte
    damaged = Array(array.dtype, array.shape, array.stype, bytes(data[: len(data) - cut]))
    try:
        tensor = decode(ArrayRecord({"x": damaged}), "record")["x"]
    except MessageError as error:
        assert "record 'x'" in str(error)
    else:
        assert tensor.shape == (4, 5)
        assert tensor.dtype == torch.float32
        assert cut == 0
