"""What crosses a cut: shapes and dtypes without the batch dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_clicooper.errors import MessageError, SplitError

Tensors = tuple[Tensor, ...]

CROSSING = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool}
)
"""Dtypes that can cross a cut."""

_PATTERN = re.compile(r"(?P<dtype>[a-z0-9]+)\[(?P<shape>[0-9, ]*)\]")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a record: its dtype and its shape without the batch dimension.

    Its text form is what messages and errors show, for example ``float32[16, 14, 14]``.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the spec of a batch."""
        return cls(tensor.dtype, tuple(tensor.shape[1:]))

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Return the spec that ``str(spec)`` gave.

        Raises
        ------
        MessageError
            The text is not a spec.
        """
        match = _PATTERN.fullmatch(text)
        dtype = getattr(torch, match["dtype"], None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise MessageError(f"{text!r} is not a tensor spec such as 'float32[16, 14, 14]'")
        sizes = [s for s in match["shape"].replace(" ", "").split(",") if s]
        return cls(dtype, tuple(int(s) for s in sizes))

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """Bytes per record."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def example(self, records: int) -> Tensor:
        """Return a batch of zeros of this spec."""
        return torch.zeros((records, *self.shape), dtype=self.dtype)


def describe(specs: Sequence[TensorSpec]) -> str:
    """Return the text form of everything that crosses a cut."""
    return " and ".join(map(str, specs))


def as_tensors(value: object, who: str) -> Tensors:
    """Return a module's output as a tuple of tensors.

    Raises
    ------
    SplitError
        The value is neither a tensor nor a tuple or list of tensors, or a tensor
        has no batch dimension.
    """
    found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for item in found:
        if not isinstance(item, Tensor) or item.dim() == 0:
            kind = "a tensor without a batch dimension"
            kind = kind if isinstance(item, Tensor) else type(item).__name__
            raise SplitError(
                f"{who} returns {kind}; a segment returns one tensor or a tuple of "
                "tensors whose first dimension is the batch"
            )
        if item.dtype not in CROSSING:
            dtype = str(item.dtype).removeprefix("torch.")
            raise SplitError(
                f"{who} returns {dtype}, which cannot cross a cut; allowed are "
                f"{', '.join(sorted(str(d).removeprefix('torch.') for d in CROSSING))}"
            )
    return found


def check_tensors(
    tensors: Sequence[Tensor], specs: Sequence[TensorSpec], records: int, what: str
) -> None:
    """Refuse tensors that are not ``records`` rows of ``specs``, or not finite.

    Raises
    ------
    MessageError
        The text says which of ``what`` is wrong and what was expected.
    """
    if len(tensors) != len(specs):
        raise MessageError(f"{what}: {len(tensors)} tensors came, {len(specs)} are expected")
    for tensor, spec in zip(tensors, specs, strict=True):
        check_tensor(tensor, spec, records, what)


def check_tensor(tensor: Tensor, spec: TensorSpec, records: int, what: str) -> None:
    """Refuse one tensor that is not ``records`` rows of ``spec``, or not finite.

    Raises
    ------
    MessageError
        As `check_tensors`.
    """
    if tensor.dim() == 0 or TensorSpec.of(tensor) != spec or len(tensor) != records:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise MessageError(
            f"{what}: {dtype}{list(tensor.shape)} came, "
            f"{records} records of {spec} are expected"
        )
    if not is_finite(tensor):
        raise MessageError(
            f"{what}: a value is NaN or infinite. Lower the learning rate, or check the "
            "data and the segment that produced it"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, in one pass and without a temporary."""
    if tensor.numel() == 0 or not (tensor.is_floating_point()):
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
