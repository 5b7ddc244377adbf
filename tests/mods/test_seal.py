"""SealMod alone in somebody else's app: two clients and a server that only passes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_clicooper import LocalGrid
from flwr_clicooper.errors import OptionError, SealError
from flwr_clicooper.grids.exchange import exchange
from flwr_clicooper.mods import SealMod, passed_on
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.trust import Party, Trust

CLINIC, BANK = 101, 102
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) * 1.37 + 5


def grid(places: list[dict[str, Any]] | None = None) -> LocalGrid:
    app = ClientApp(mods=[SealMod(to={"embeddings": "bank"})])

    @app.query("embeddings")
    def embeddings(message: Message, context: Context) -> Message:
        record = ArrayRecord({"rows": Array(VALUES)})
        return Message(RecordDict({"embeddings": record}), reply_to=message)

    @app.query("sum")
    def total(message: Message, context: Context) -> Message:
        if "embeddings" not in message.content:
            return Message(RecordDict(), reply_to=message)
        rows = message.content.array_records["embeddings"]["rows"].numpy()
        return Message(
            RecordDict({"s": ConfigRecord({"sum": float(rows.sum())})}), reply_to=message
        )

    return LocalGrid(app, places or [{"party": "clinic"}, {"party": "bank"}], {})


def ask(on: LocalGrid, node: int, action: str, content: RecordDict | None = None) -> Message:
    (reply,) = exchange(on, [Message(content or RecordDict(), node, f"query.{action}")], 60)
    return reply


def introduced(on: LocalGrid) -> RecordDict:
    """Return the content that brings the bank's introduction."""
    return RecordDict({"clicooper.seal": passed_on(ask(on, BANK, "sum"))})


def sent(on: LocalGrid, *more: Message) -> RecordDict:
    """Return what the server passes on from the clinic to the bank."""
    reply = ask(on, CLINIC, "embeddings", introduced(on))
    assert not reply.has_error(), reply.error.reason
    record = reply.content.array_records["embeddings"]
    return RecordDict({"embeddings": record, "clicooper.seal": passed_on(reply, *more)})


def test_the_receiver_reads_what_the_server_cannot() -> None:
    on = grid()
    content = sent(on)
    data = content.array_records["embeddings"]["rows"].data
    assert VALUES.tobytes()[:16] not in data
    reply = ask(on, BANK, "sum", content)
    assert reply.content.config_records["s"]["sum"] == pytest.approx(float(VALUES.sum()))


def test_nothing_leaves_before_the_receiver_is_known() -> None:
    reply = ask(grid(), CLINIC, "embeddings")
    assert reply.has_error()
    assert "clinic has no key for bank" in reply.error.reason


def refused(on: LocalGrid, content: RecordDict) -> str:
    reply = ask(on, BANK, "sum", content)
    assert reply.has_error()
    return reply.error.reason


def changed(content: RecordDict, **fields: Any) -> RecordDict:
    array = content.array_records["embeddings"]["rows"]
    parts = {"dtype": array.dtype, "shape": tuple(array.shape), "stype": array.stype}
    new = Array(**({"data": array.data} | parts | fields))
    return RecordDict({**content, "embeddings": ArrayRecord({"rows": new})})


def test_a_changed_byte_is_refused() -> None:
    on = grid()
    content = sent(on)
    data = bytearray(content.array_records["embeddings"]["rows"].data)
    data[20] ^= 1
    assert "embeddings from clinic to bank does not open" in refused(
        on, changed(content, data=bytes(data))
    )


def test_another_shape_is_refused() -> None:
    on = grid()
    assert "does not open" in refused(on, changed(sent(on), shape=(4, 3)))


def test_a_repeated_record_is_refused() -> None:
    on = grid()
    content = sent(on)
    ask(on, BANK, "sum", content)
    assert "is replayed" in refused(on, content)


def test_a_record_that_was_left_out_is_noticed() -> None:
    on = grid()
    sent(on)
    assert "is missing before it" in refused(on, sent(on))


def test_a_record_under_another_name_is_refused() -> None:
    on = grid()
    content = sent(on)
    header = content.config_records["clicooper.seal"]
    moved = RecordDict({"other": content["embeddings"], "clicooper.seal": header})
    assert "does not say by whom" in refused(on, moved)
    moved["clicooper.seal"] = ConfigRecord({**header, "other": "clinic"})
    assert "does not open" in refused(on, moved)


def test_a_record_is_not_sent_back_to_its_sender() -> None:
    on = grid()
    reply = ask(on, CLINIC, "sum", sent(on))
    assert reply.has_error()
    assert "no key for clinic" in reply.error.reason


def test_a_second_key_for_a_known_party_is_refused() -> None:
    on, other = grid(), grid()
    other.set_run(on.run)
    for context in other.contexts.values():
        context.run_id = on.run.run_id
    sent(on)
    reply = ask(on, CLINIC, "embeddings", introduced(other))
    assert "bank has another key than before in this run" in reply.error.reason


def test_an_introduction_of_another_run_is_refused() -> None:
    reply = ask(grid(), CLINIC, "embeddings", introduced(grid()))
    assert "the introduction of bank is of another run" in reply.error.reason


def listed(folder: Path, listed_bank: Identity | None = None) -> list[dict[str, Any]]:
    places = []
    for name in ("clinic", "bank"):
        identity = Identity.new()
        identity.save(folder / f"{name}.pem")
        public = (listed_bank if name == "bank" and listed_bank else identity).public
        Trust.add(folder / "trust.toml", Party(name, "trainer", public))
        paths = {"identity-key": f"{folder / name}.pem", "trust-file": f"{folder}/trust.toml"}
        places.append({"party": name, **paths})
    return places


def test_listed_parties_trust_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on = grid(listed(tmp_path))
    assert not ask(on, BANK, "sum", sent(on)).has_error()
    assert "no trust-file" not in caplog.text


def test_without_a_trust_file_a_key_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent(grid())
    assert "no trust-file says who bank is" in caplog.text


def test_a_key_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    on = grid(listed(tmp_path, listed_bank=Identity.new()))
    reply = ask(on, CLINIC, "embeddings", introduced(on))
    assert "is not the one that" in reply.error.reason
    assert "for 'bank'" in reply.error.reason


def test_a_client_needs_a_name() -> None:
    reply = ask(grid([{}, {"party": "bank"}]), CLINIC, "sum")
    assert "node-config 'party' is None; allowed is the client's name" in reply.error.reason


def test_to_must_map_names() -> None:
    with pytest.raises(OptionError, match="must map names"):
        SealMod(to={"embeddings": ""})


def test_two_records_of_one_name_are_refused() -> None:
    on = grid()
    one = ask(on, CLINIC, "embeddings", introduced(on))
    two = Message(RecordDict(), reply_to=one)
    two.content["clicooper.seal"] = ConfigRecord({"embeddings": "other"})
    with pytest.raises(SealError, match="two parties sealed"):
        passed_on(one, two)
