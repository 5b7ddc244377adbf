"""AttestationMod alone in somebody else's app."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_clicooper import LocalGrid
from flwr_clicooper.errors import EvidenceError, MessageError, OptionError, StateError
from flwr_clicooper.mods import AttestationMod
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.replies import ReplyStatement, verify_replies
from flwr_clicooper.provenance.streams import arrays_digest

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


class Place:
    """A node of its own, with a key, a file and an app that adds 1 to what it gets."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.key, self.file = folder / "key.pem", folder / "attestations.jsonl"
        if not self.key.exists():
            Identity.new().save(self.key)
        self.public = Identity.load(self.key).public
        self.calls = 0
        self.answer: RecordDict | Error | None = None
        self.mod = AttestationMod(identity=self.key, file=self.file, **options)
        self.app = ClientApp(mods=[self.mod])
        for register in (
            self.app.train(),
            self.app.train("more"),
            self.app.evaluate(),
            self.app.query("features"),
        ):
            register(self.handle)
        (self.context,) = LocalGrid(self.app, [{}], {}).contexts.values()

    def handle(self, message: Message, context: Context) -> Message:
        self.calls += 1
        record = message.content.array_records.get("arrays", ArrayRecord())
        added = ArrayRecord({name: Array(it.numpy() + 1) for name, it in record.items()})
        metrics = MetricRecord({"loss": 0.5, "num-examples": 1})
        answer = self.answer or RecordDict({"arrays": added, "metrics": metrics})
        return Message(answer, reply_to=message)

    def ask(self, content: RecordDict | None = None, kind: str = "train") -> Message:
        request = Message(content or arrays(x=VALUES), self.context.node_id, kind)
        return self.app(message=request, context=self.context)

    def statements(self) -> list[ReplyStatement]:
        return verify_replies(self.file, self.public) if self.file.exists() else []


def arrays(**values: Any) -> RecordDict:
    found = {name: it if isinstance(it, Array) else Array(it) for name, it in values.items()}
    return RecordDict({"arrays": ArrayRecord(found)})


def digest(values: np.ndarray, name: str = "x") -> str:
    data = values.tobytes()
    return arrays_digest([(name, str(values.dtype), values.shape, data)]).hex()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# -- what is said --------------------------------------------------------------------------


def test_the_reply_brings_a_statement_of_what_came_and_went(place: Place) -> None:
    reply = place.ask()
    text = reply.content.config_records["attestation"]["envelope"]
    assert place.file.read_text() == f"{text}\n"
    (said,) = place.statements()
    assert ReplyStatement.parse(Envelope.from_json(text).verify(place.public)) == said
    assert said.inputs == {"arrays": digest(VALUES)}
    assert said.outputs == {"arrays": digest(VALUES + 1)}
    assert said.message == "train"
    assert said.node == str(place.context.node_id)
    assert said.run == str(place.context.run_id)
    assert said.previous == ""
    assert sorted(said.versions) == ["flwr", "flwr-clicooper", "python"]
    assert np.array_equal(reply.content.array_records["arrays"]["x"].numpy(), VALUES + 1)
    assert reply.content.metric_records["metrics"]["loss"] == 0.5


def test_what_the_handler_gave_is_not_changed(place: Place) -> None:
    place.answer = arrays(x=VALUES)
    for _ in range(2):  # the same content again has no statement yet
        assert "attestation" in place.ask().content
    assert list(place.answer) == ["arrays"]


def test_only_the_asked_types_have_statements(tmp_path: Path) -> None:
    place = Place(tmp_path)
    kinds = ["train", "train.more", "evaluate", "query.features"]
    replies = [place.ask(kind=kind) for kind in kinds]
    assert ["attestation" in it.content for it in replies] == [True, True, False, False]
    place = Place(tmp_path, actions=["evaluate", "query.features"])
    replies = [place.ask(kind=kind) for kind in kinds]
    assert ["attestation" in it.content for it in replies] == [False, False, True, True]
    said = [it.message for it in place.statements()]
    assert said == ["train", "train.more", "evaluate", "query.features"]


def test_a_request_need_not_have_arrays(place: Place) -> None:
    place.answer = arrays(x=VALUES)
    place.ask(RecordDict({"config": ConfigRecord({"lr": 0.1})}))
    assert place.statements()[0].inputs == {}


def test_several_records_each_have_a_digest(tmp_path: Path) -> None:
    place = Place(tmp_path, record=["arrays", "state"])
    state = ArrayRecord({"x": Array(VALUES * 2)})
    place.answer = RecordDict({**arrays(x=VALUES), "state": state})
    place.ask()
    (said,) = place.statements()
    assert said.outputs == {"arrays": digest(VALUES), "state": digest(VALUES * 2)}
    assert sorted(said.inputs) == ["arrays"]


def test_errors_pass_as_they_are(place: Place) -> None:
    place.answer = Error(code=7, reason="busy")
    assert place.ask().error.reason == "busy"
    assert place.statements() == []


# -- digests of arrays ---------------------------------------------------------------------


def measured(tmp_path: Path, array: Array | np.ndarray) -> str:
    place = Place(tmp_path)
    place.answer = arrays(x=array)
    place.ask()
    return place.statements()[-1].outputs["arrays"]


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        np.float32(3),
        np.empty((0, 4), dtype=np.int64),
        np.array([[True, False]]),
        np.array([1 + 2j]),
        np.array(["a", "bc"]),
        VALUES.astype(np.float16),
    ],
    ids=str,
)
def test_the_header_is_no_part_of_it(tmp_path: Path, values: Any) -> None:
    values = np.asarray(values)
    assert measured(tmp_path, values) == digest(values)


def test_the_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    expected = digest(VALUES)
    for other in (
        np.asfortranarray(VALUES),
        VALUES.astype(">f4"),
        np.asfortranarray(VALUES.astype(">f4")),
        np.repeat(VALUES, 2, axis=1)[:, ::2],
    ):
        array = Array(other)
        assert measured(tmp_path, array) == expected
        lies = Array("int8", (1,), array.stype, array.data + b"more")  # as NumPy reads it
        assert measured(tmp_path, lies) == expected


def test_version_2_of_the_header_is_read(tmp_path: Path) -> None:
    from io import BytesIO

    file = BytesIO()
    np.lib.format.write_array(file, VALUES, version=(2, 0))
    array = Array("float32", (2, 3), "numpy.ndarray", file.getvalue())
    assert measured(tmp_path, array) == digest(VALUES)


def test_other_serialisations_count_as_they_travel(tmp_path: Path) -> None:
    array = Array("bfloat16", (2,), "clicooper.raw", b"abcd")
    expected = arrays_digest([("x", "bfloat16", (2,), b"abcd")]).hex()
    assert measured(tmp_path, array) == expected


def broken(data: bytes) -> Array:
    return Array("float32", (2, 3), "numpy.ndarray", data)


PICKLED = b"\x93NUMPY\x01\x00\x2e\x00{'descr': '|O', 'fortran_order': False, 'shape': ()}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY\x09\x00" + bytes(100),
        Array(VALUES).data[:-1],
        Array(VALUES).data[:20],
        Array(VALUES).data.replace(b"(2, 3)", b"(9, 9)"),
        Array(VALUES).data.replace(b"(2, 3)", b"(-1,3)"),
        Array(VALUES).data.replace(b"(2, 3)", b"(2,'')"),
        Array(VALUES).data.replace(b"<f4", b"<z9"),
        PICKLED + b"cposix\nsystem\n",
    ],
)
def test_an_array_that_cannot_be_read_is_named(place: Place, data: bytes) -> None:
    place.answer = arrays(x=broken(data))
    with pytest.raises(
        MessageError, match="train: 'arrays' in the reply: 'x' is not an array"
    ):
        place.ask()
    with pytest.raises(MessageError, match="train: 'arrays' in the request: 'x'"):
        place.ask(arrays(x=broken(data)))
    assert place.calls == 1
    assert place.statements() == []


# -- refused -------------------------------------------------------------------------------


def test_a_reply_without_the_record_is_refused(place: Place) -> None:
    place.answer = RecordDict({"other": ArrayRecord()})
    with pytest.raises(MessageError, match="train: the reply has no 'arrays' to attest"):
        place.ask()
    place.answer = RecordDict({"arrays": ConfigRecord({"x": 1})})
    with pytest.raises(MessageError, match="'arrays' in the reply is a ConfigRecord"):
        place.ask()
    place.answer = RecordDict({**arrays(x=VALUES), "attestation": ConfigRecord()})
    with pytest.raises(MessageError, match="has a record 'attestation' already"):
        place.ask()
    assert place.statements() == []


@pytest.mark.parametrize(
    "options",
    [
        {"record": ""},
        {"record": ()},
        {"record": ("a", 7)},
        {"actions": ()},
        {"actions": ("fit",)},
        {"actions": ("train", "query.")},
        {"actions": ("train.a.b",)},
        {"actions": ("train ",)},
        {"actions": (7,)},
    ],
)
def test_wrong_options_are_refused_when_the_mod_is_made(options: Any) -> None:
    with pytest.raises(OptionError, match="must be"):
        AttestationMod(identity="none", **options)


def test_one_action_may_be_a_text() -> None:
    assert AttestationMod(identity="none", actions="query.features").actions == (
        "query.features",
    )


def test_nothing_is_trained_without_a_key_and_a_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.key.chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        place.ask()
    place.key.unlink()
    with pytest.raises(StateError, match=r"identity key .* cannot be read"):
        place.ask()
    place = Place(tmp_path)
    place.file.mkdir()
    with pytest.raises(StateError, match="cannot be opened"):
        place.ask()
    assert place.calls == 0


def test_a_tampered_file_is_neither_continued_nor_believed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for _ in range(3):
        place.ask()
    lines = place.file.read_text().splitlines(keepends=True)
    place.file.write_text(lines[0] + lines[2])
    with pytest.raises(EvidenceError, match="line 2: it does not follow the line before"):
        place.statements()
    place.file.write_text("".join(lines)[:-10])
    for again in (place, Place(tmp_path)):
        before = again.calls
        with pytest.raises(EvidenceError, match="is cut off; remove what there is"):
            again.ask()
        assert again.calls == before
    place.key.unlink()
    place.file.write_text("".join(lines))
    with pytest.raises(EvidenceError, match="lacks the signature"):
        Place(tmp_path).ask()  # with a new key


# -- restarts, and at the same time --------------------------------------------------------


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(3):
        Place(tmp_path).ask()  # another run each, with another context
    found = Place(tmp_path).statements()
    assert len({it.run for it in found}) == 3
    lines = (tmp_path / "attestations.jsonl").read_text().splitlines()
    digests = [Envelope.from_json(line).digest for line in lines]
    assert [it.previous for it in found] == ["", *digests[:-1]]


def test_two_messages_at_once_do_not_fork_the_chain(tmp_path: Path) -> None:
    places = [Place(tmp_path) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: places[number % 3].ask(), range(30)))
    found = places[0].statements()
    assert len(found) == 30
    assert len({it.previous for it in found}) == 30


def test_stock_federated_averaging_takes_the_replies(tmp_path: Path) -> None:
    places = [Place(tmp_path) for _ in range(2)]
    grid = LocalGrid(places[0].app, [{}, {}], {})
    initial = ArrayRecord({"x": Array(VALUES)})
    strategy = FedAvg(min_available_nodes=2, fraction_evaluate=0.0)
    result = strategy.start(grid, initial, num_rounds=2)
    assert np.array_equal(result.arrays["x"].numpy(), VALUES + 2)
    found = places[0].statements()
    assert len(found) == 4
    assert len({it.node for it in found}) == 2
    for step, said in enumerate(found):
        assert said.inputs == {"arrays": digest(VALUES + step // 2)}
        assert said.outputs == {"arrays": digest(VALUES + step // 2 + 1)}


def test_no_pytorch_is_imported(tmp_path: Path) -> None:
    code = (
        "from flwr_clicooper.mods import AttestationMod\n"
        "AttestationMod(identity='key.pem')\n"
        "import sys\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
