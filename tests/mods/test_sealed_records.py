"""Records in seals: what holds their data on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from flwr_clicooper.errors import SealError
from flwr_clicooper.grids.tensors import decode_tensor, encode_tensor
from flwr_clicooper.mods.sealed_records import RecordSealer
from flwr_clicooper.privacy.sealing import KeyRing, introduce

PLACE = (1, 2)
NAMES = ("owner", "trainer 1")


def sealers() -> tuple[RecordSealer, RecordSealer]:
    (one, one_key), (two, two_key) = (
        introduce("7", name, "ed25519:text", lambda content: bytes(64)) for name in NAMES
    )
    return (
        RecordSealer(KeyRing(one, one_key, {NAMES[1]: two})),
        RecordSealer(KeyRing(two, two_key, {NAMES[0]: one})),
    )


@pytest.mark.parametrize(("whole", "holder"), [(True, bytes), (False, memoryview)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_data_is_held_as_it_came(whole: bool, holder: type, dtype: torch.dtype) -> None:
    owner, trainer = sealers()
    tensor = torch.arange(60_000).reshape(100, 600).to(dtype)
    record = ArrayRecord({"0": encode_tensor(tensor)})
    sealed = owner.seal("activations", record, NAMES[1], PLACE, whole=whole)
    opened = trainer.open("activations", sealed, NAMES[0], PLACE, "activations")
    assert type(sealed["0"].data) is type(opened["0"].data) is holder
    assert opened["0"].stype == record["0"].stype
    assert opened["0"].data == record["0"].data
    assert torch.equal(decode_tensor(opened["0"], "activations"), tensor)
    if dtype != torch.bfloat16:
        assert np.array_equal(opened["0"].numpy(), tensor.numpy())


def test_opening_changes_nothing_in_what_came() -> None:
    owner, trainer = sealers()
    record = ArrayRecord({"0": Array(np.ones(5000, np.float32))})
    sealed = owner.seal("escrow", record, NAMES[1], PLACE, whole=False, counted=False)
    before = bytes(sealed["0"].data)
    for _ in range(2):
        opened = trainer.open("escrow", sealed, NAMES[0], PLACE, "escrow", counted=False)
        assert opened["0"].data == record["0"].data
    assert sealed["0"].data == before


def test_a_changed_view_is_refused_by_name() -> None:
    owner, trainer = sealers()
    record = ArrayRecord({"0": Array(np.ones(5000, np.float32))})
    sealed = owner.seal("activations", record, NAMES[1], PLACE, whole=False)
    sealed["0"].data[100] ^= 1
    with pytest.raises(SealError, match="activations at 1 from owner to trainer 1 does not"):
        trainer.open("activations", sealed, NAMES[0], PLACE, "activations at 1")
