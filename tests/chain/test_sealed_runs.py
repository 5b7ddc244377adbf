"""What a relay sees and can do when tensors are sealed from party to party."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client, load_delivered
from flwr_clicooper.chain import sealing
from flwr_clicooper.errors import ClientError, CooperError
from flwr_clicooper.grids import frames
from flwr_clicooper.privacy.sealing import Introduction, introduce
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.trust import Party, Trust
from tests.chain.test_recovery import Saboteur
from tests.tasks import ConvTask, LinearTask, nodes, step_losses
from tests.test_exactness import ForgetfulGrid

OWNER, FIRST, SECOND, THIRD = 101, 102, 103, 104


def start(
    run_dir: Path,
    grid_class: Callable[..., LocalGrid] = LocalGrid,
    *,
    task: Any = None,
    mods: Any = (),
    standbys: int = 0,
    places: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Any:
    config = {"release": "clean", "num-rounds": 2, "batch-size": 32, "link": "mailbox"}
    config |= {"run-dir": str(run_dir), "microbatches": 2}
    config |= {k.replace("_", "-"): v for k, v in options.items()}
    app = cooper_client(task or LinearTask(3), mods=list(mods))
    grid = grid_class(app, places or nodes(3, standbys), config)
    return CooperStrategy.from_config(config).start(grid)


# -- what the relay sees ---------------------------------------------------------------


class Parties:
    """A mod that keeps every tensor that a party sends, before it is sealed."""

    def __init__(self) -> None:
        self.plain: list[bytes] = []

    def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        for record in reply.content.array_records.values():
            self.plain += [bytes(array.data) for array in record.values()]
        return reply


class Recorder(LocalGrid):
    """A relay that keeps every byte of every message."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[bytes] = []
        everything.append(self)

    def _serve(self, message: Message) -> Message:
        reply = super()._serve(message)
        self.seen += [b"".join(frames.encode(m)) for m in (message, reply)]
        return reply


everything: list[Recorder] = []

MODES = [
    {"release": "clean"},
    {"release": "clean", "schedule": "local", "microbatches": 1},
    {"release": "interactive"},
    {"release": "interactive", "label_side": "owner"},
    {"release": "local-dp", "epsilon": 4.0, "head": "random"},
]


def leaks(plain: list[bytes], seen: bytes) -> int:
    """Count tensors of which 16 bytes in a row appear in what was seen."""
    header = len(np.lib.format.MAGIC_PREFIX)  # every .npy begins alike: look behind it
    found = 0
    for data in plain:
        body = data[128 + header :]
        pieces = [body[i : i + 16] for i in range(0, len(body) - 16, 64)]
        # A run of equal bytes (zeros of a ReLU) says nothing.
        found += any(piece in seen for piece in pieces if len(set(piece)) > 8)
    return found


@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_the_relay_sees_no_tensor(options: dict[str, Any], tmp_path: Path) -> None:
    tails = 1 if options.get("label_side") == "owner" else 0
    for sealed in (True, False):
        parties = Parties()
        start(
            tmp_path / str(sealed),
            Recorder,
            task=LinearTask(3 + tails),
            mods=[parties],
            seal=sealed,
            **options,
        )
        seen = b"".join(everything.pop().seen)
        assert len(parties.plain) > 20
        assert (leaks(parties.plain, seen) == 0) is sealed


def test_what_the_relay_sees_does_not_correlate_with_tensors(tmp_path: Path) -> None:
    pairs: list[tuple[bytes, bytes]] = []

    class Pairs(Parties):
        def __call__(self, message: Message, context: Context, call_next: Any) -> Message:
            reply = super().__call__(message, context, call_next)
            self.last = [
                bytes(a.data) for r in reply.content.array_records.values() for a in r.values()
            ]
            return reply

    parties = Pairs()

    class Watching(LocalGrid):
        def _serve(self, message: Message) -> Message:
            parties.last: list[bytes] = []
            reply = super()._serve(message)
            if not reply.has_error() and message.metadata.message_type == "train.release":
                records = reply.content.array_records
                told = [bytes(a.data) for r in records.values() for a in r.values()]
                pairs.extend(zip(parties.last, told, strict=True))
            return reply

    start(tmp_path, Watching, mods=[parties])
    assert pairs
    for plain, sealed in pairs:
        assert len(sealed) == len(plain) + 28
        a = np.frombuffer(plain, np.uint8).astype(float)
        b = np.frombuffer(sealed[12:-16], np.uint8).astype(float)
        # Independent bytes: within 5 standard errors, a false alarm in 1.7 million runs.
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_training_is_the_same_as_unsealed(tmp_path: Path) -> None:
    sealed = start(tmp_path / "a", seal=True)
    plain = start(tmp_path / "b", seal=False)
    assert step_losses(sealed.run_dir) == step_losses(plain.run_dir)


@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_keys_and_counters_survive_a_new_process_per_message(
    options: dict[str, Any], tmp_path: Path
) -> None:
    class NewProcess(ForgetfulGrid):
        def _serve(self, message: Message) -> Message:
            sealing._CACHE.clear()
            return super()._serve(message)

    tails = 1 if options.get("label_side") == "owner" else 0
    result = start(tmp_path, NewProcess, task=LinearTask(3 + tails), **options)
    assert result.model


def test_keys_are_in_files_that_others_cannot_read(tmp_path: Path) -> None:
    modes = []

    class Look(ForgetfulGrid):
        def _serve(self, message: Message) -> Message:
            reply = super()._serve(message)
            paths = [*tmp_path.rglob("seal.json"), *tmp_path.rglob("ring-*.json")]
            modes.extend(path.stat().st_mode & 0o777 for path in paths)
            return reply

    result = start(tmp_path, Look)
    assert set(modes) == {0o600}
    assert not [run for run, _ in sealing._CACHE if str(run) == result.run_dir.name]
    assert not list(tmp_path.rglob("seal.json"))
    assert not list(tmp_path.rglob("ring-*.json"))
    assert result.model


# -- what the relay can do -------------------------------------------------------------


class Relay(LocalGrid):
    """A relay that changes one request, the first for which `change` returns one."""

    change: Callable[[Message, list[Message]], Message | None]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.past: list[Message] = []
        self.done = False

    def _serve(self, message: Message) -> Message:
        given = message
        if not self.done:
            changed = type(self).change(message, self.past)
            self.done = changed is not None
            given = changed or message
        self.past.append(message)
        return super()._serve(given)


def relay(change: Callable[[Message, list[Message]], Message | None]) -> type[Relay]:
    return type("Changed", (Relay,), {"change": staticmethod(change)})


def is_forward(message: Message, node: int, round_: int = 1, step: int = 1) -> bool:
    fields = message.content.config_records["clicooper"]
    here = (message.metadata.message_type, message.metadata.dst_node_id)
    return here == ("train.forward", node) and (fields["round"], fields["step"]) == (
        round_,
        step,
    )


def with_record(message: Message, name: str, record: ArrayRecord) -> Message:
    message.content[name] = record
    return message


def activations(message: Message) -> ArrayRecord:
    return message.content.array_records["activations"]


def past_forward(past: list[Message], node: int) -> Iterator[Message]:
    for message in past:
        action = message.metadata.message_type
        if (action, message.metadata.dst_node_id) == ("train.forward", node):
            yield message


def flip(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    array = activations(message)["0"]
    data = bytearray(array.data)
    data[len(data) // 2] ^= 1
    changed = Array(array.dtype, tuple(array.shape), array.stype, bytes(data))
    return with_record(message, "activations", ArrayRecord({"0": changed}))


def cut(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    array = activations(message)["0"]
    changed = Array(array.dtype, tuple(array.shape), array.stype, bytes(array.data[:-1]))
    return with_record(message, "activations", ArrayRecord({"0": changed}))


def unsealed(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    forged = Array(np.zeros((16, 8), np.float32))
    return with_record(message, "activations", ArrayRecord({"0": forged}))


def stripped(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    return with_record(message, "activations", ArrayRecord())


def repeated(message: Message, past: list[Message]) -> Message | None:
    """The activations of the step before, at this step."""
    if not is_forward(message, SECOND):
        return None
    before = list(past_forward(past, SECOND))[-1]
    return with_record(message, "activations", activations(before))


def earlier_round(message: Message, past: list[Message]) -> Message | None:
    """The whole message of an earlier round, under this state's version."""
    if not is_forward(message, SECOND, round_=2):
        return None
    before = next(m for m in past_forward(past, SECOND) if is_forward(m, SECOND))
    version = message.content.config_records["clicooper"]["version"]
    message.content = before.content
    message.content.config_records["clicooper"]["version"] = version
    return message


def redirected(message: Message, past: list[Message]) -> Message | None:
    """What was sealed for trainer 2, to trainer 3."""
    if not is_forward(message, THIRD):
        return None
    before = list(past_forward(past, SECOND))[-1]
    return with_record(message, "activations", activations(before))


def reflected(message: Message, past: list[Message]) -> Message | None:
    """Its own activations to trainer 2, as a gradient."""
    fields = message.content.config_records["clicooper"]
    action, node = message.metadata.message_type, message.metadata.dst_node_id
    if (action, node, fields.get("step")) != ("train.backward", SECOND, 1):
        return None
    before = list(past_forward(past, THIRD))[-1]
    return with_record(message, "gradients", activations(before))


def moved(message: Message, past: list[Message]) -> Message | None:
    """The right activations under another step."""
    if not is_forward(message, SECOND):
        return None
    message.content.config_records["clicooper"]["step"] = 2
    return message


def reshaped(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    array = activations(message)["0"]
    changed = Array(array.dtype, tuple(reversed(array.shape)), array.stype, bytes(array.data))
    return with_record(message, "activations", ArrayRecord({"0": changed}))


def renumbered(message: Message, past: list[Message]) -> Message | None:
    if not is_forward(message, SECOND):
        return None
    array = activations(message)["0"]
    mark, number, inner = array.stype.split(":")
    stype = f"{mark}:{int(number) + 1}:{inner}"
    changed = Array(array.dtype, tuple(array.shape), stype, bytes(array.data))
    return with_record(message, "activations", ArrayRecord({"0": changed}))


CHANGES = [
    (flip, "does not open: it was changed on its way"),
    (cut, "does not open: it was changed on its way"),
    (unsealed, "from trainer 1 is not sealed"),
    (stripped, "from segment 1 .* 0 tensors came"),
    (repeated, "does not open"),
    (earlier_round, "is replayed"),
    (redirected, "does not open"),
    (reflected, "does not open"),
    (moved, "does not open"),
    (reshaped, "does not open"),
    (renumbered, "does not open"),
]


@pytest.mark.parametrize(
    ("change", "message"), CHANGES, ids=lambda x: getattr(x, "__name__", "")
)
def test_what_a_relay_changes_is_refused_by_name(
    change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        start(tmp_path, relay(change))
    assert caught.value.refused
    assert "trainer" in str(caught.value)


class Dropping(LocalGrid):
    """A relay that answers one request itself, so that a trainer never sees it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dropped = False
        self.reply: Message | None = None

    def _serve(self, message: Message) -> Message:
        # Trainer 1's work is passed off as trainer 2's, once.
        if is_forward(message, SECOND) and not self.dropped:
            self.dropped = True
            version = message.content.config_records["clicooper"]["version"]
            from flwr_clicooper.chain.messages import answer

            fields = {"version": version, "seconds": 0.0}
            return answer(message, fields, {"activations": activations(message)})
        return super()._serve(message)


def test_a_message_that_is_left_out_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"does not open|is missing before it"):
        start(tmp_path, Dropping)


def test_two_messages_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    later: list[ArrayRecord] = []

    def swap(message: Message, past: list[Message]) -> Message | None:
        fields = message.content.config_records["clicooper"]
        if message.metadata.message_type != "train.upload" or "labels" in message.content:
            return None
        later.append(activations(message))
        fields["chunk"] = 1
        return message

    with pytest.raises(ClientError, match="does not open"):
        start(tmp_path, relay(swap))


# -- who is who ------------------------------------------------------------------------


def with_trust(folder: Path, listed: dict[str, Identity]) -> list[dict[str, Any]]:
    """Node configs with identities, and a trust file of the listed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    places = nodes(3)
    names = ["owner", "trainer-1", "trainer-2", "trainer-3"]
    for place, name in zip(places, names, strict=True):
        identity = Identity.new()
        identity.save(folder / f"{name}.pem")
        stage = place.get("stage", 0)
        public = listed.get(name, identity).public
        Trust.add(folder / "trust.toml", Party(name, place["role"], public, stage))
        place["identity-key"] = str(folder / f"{name}.pem")
        place["trust-file"] = str(folder / "trust.toml")
    return places


def test_a_chain_whose_parties_are_all_listed_trains(tmp_path: Path) -> None:
    assert start(tmp_path / "runs", places=with_trust(tmp_path / "keys", {})).model


def test_a_trainer_whose_key_is_not_listed_is_refused(tmp_path: Path) -> None:
    places = with_trust(tmp_path / "keys", {"trainer-2": Identity.new()})
    with pytest.raises(ClientError, match="trainer 2"):
        start(tmp_path / "runs", places=places)


class Impostor(LocalGrid):
    """A relay that introduces itself as trainer 2 to the others."""

    def _serve(self, message: Message) -> Message:
        if message.metadata.message_type == "train.meet":
            fields = message.content.config_records["clicooper"]
            if message.metadata.dst_node_id != SECOND:
                own = Identity.new()
                run = str(message.metadata.run_id)
                forged, _ = introduce(run, "trainer 2", str(own.public), own.sign)
                given: Any = fields["introductions"]
                fields["introductions"] = [*given[:2], forged.to_json(), *given[3:]]
        return super()._serve(message)


def test_a_relay_in_the_middle_is_refused_with_a_trust_file(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"train\.meet.*trainer"):
        start(tmp_path / "runs", Impostor, places=with_trust(tmp_path / "keys", {}))


def test_a_key_is_pinned_at_first_sight_and_another_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = with_trust(tmp_path / "keys", {})
    for place in places:
        del place["trust-file"]
    start(tmp_path / "runs", places=places)
    assert "no trust-file says who the others are" in caplog.text
    caplog.clear()
    start(tmp_path / "runs", places=places)
    assert "no trust-file" not in caplog.text
    Path(places[2]["identity-key"]).unlink()
    Identity.new().save(Path(places[2]["identity-key"]))
    with pytest.raises(ClientError, match="trainer"):
        start(tmp_path / "runs", places=places)


def changed_introduction(change: Callable[[dict[str, Any]], None]) -> type[LocalGrid]:
    class Forging(LocalGrid):
        def _serve(self, message: Message) -> Message:
            if message.metadata.message_type == "train.meet":
                fields = message.content.config_records["clicooper"]
                texts: Any = fields["introductions"]
                second = json.loads(texts[2])
                change(second)
                fields["introductions"] = [*texts[:2], json.dumps(second), *texts[3:]]
            return super()._serve(message)

    return Forging


def other_key(introduction: dict[str, Any]) -> None:
    introduction["key"] = "11" * 32


def other_nonce(introduction: dict[str, Any]) -> None:
    introduction["nonce"] = "22" * 16


def other_run(introduction: dict[str, Any]) -> None:
    introduction["run"] = "1"


def other_party(introduction: dict[str, Any]) -> None:
    introduction["party"] = "trainer 9"


@pytest.mark.parametrize("change", [other_key, other_nonce, other_run, other_party])
def test_a_forged_introduction_is_refused(change: Any, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"train\.meet") as caught:
        start(tmp_path, changed_introduction(change))
    assert caught.value.refused


def test_an_introduction_left_out_is_refused(tmp_path: Path) -> None:
    class Silent(LocalGrid):
        def _serve(self, message: Message) -> Message:
            if message.metadata.message_type == "train.meet":
                fields = message.content.config_records["clicooper"]
                given: Any = fields["introductions"]
                fields["introductions"] = given[:3]
            return super()._serve(message)

    with pytest.raises(ClientError, match="did not introduce owner and its peers"):
        start(tmp_path, Silent)


@pytest.mark.parametrize("name", ["identity-key", "trust-file"])
def test_a_path_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    places = nodes(3)
    places[1][name] = 7
    with pytest.raises(CooperError, match=f"node-config '{name}' is 7; allowed is a path"):
        start(tmp_path, places=places)


# -- escrow ----------------------------------------------------------------------------


def test_the_relays_checkpoint_is_sealed_and_a_resumed_run_opens_it(tmp_path: Path) -> None:
    task = ConvTask(middle=2)
    parties = Parties()
    with pytest.raises(ClientError):
        start(tmp_path, task=task, mods=[Saboteur(2), parties])
    (first,) = tmp_path.iterdir()
    stored = b"".join(p.read_bytes() for p in (first / "checkpoints").rglob("*.pb"))
    assert len(stored) > 1000
    assert leaks(parties.plain, stored) == 0
    result = start(tmp_path, task=task, resume=str(first))
    whole = start(tmp_path / "whole", task=task)
    ours, theirs = (load_delivered(r.run_dir, task).state_dict() for r in (result, whole))
    for name, value in ours.items():
        assert np.allclose(value.numpy(), theirs[name].numpy(), rtol=0, atol=1e-6)


def test_a_standby_gets_the_checkpoint_from_the_owner(tmp_path: Path) -> None:
    result = start(tmp_path, task=ConvTask(middle=2), mods=[Saboteur(2)], standbys=1)
    text = (result.run_dir / "metrics.jsonl").read_text()
    assert '"kind": "hand-over"' in text


def test_a_swapped_checkpoint_is_refused(tmp_path: Path) -> None:
    task = ConvTask(middle=2)
    with pytest.raises(ClientError):
        start(tmp_path, task=task, mods=[Saboteur(2)])
    (first,) = tmp_path.iterdir()
    (folder,) = (first / "checkpoints").glob("round-*")
    one, two = folder / "segment-1.pb", folder / "segment-2.pb"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(ClientError, match=r"escrow at round 1 from trainer 1.* does not open"):
        start(tmp_path, task=task, resume=str(first))


def test_without_the_owners_keys_a_checkpoint_stays_closed(tmp_path: Path) -> None:
    task = ConvTask(middle=2)
    with pytest.raises(ClientError):
        start(tmp_path, task=task, mods=[Saboteur(2)])
    (first,) = tmp_path.iterdir()
    for path in (first / "owner-checkpoints").glob("ring-*.json"):
        path.unlink()
    with pytest.raises(ClientError, match="the owner has no keys to the checkpoint"):
        start(tmp_path, task=task, resume=str(first))


def test_introductions_are_new_in_each_run(tmp_path: Path) -> None:
    seen: list[Introduction] = []

    class Look(LocalGrid):
        def _serve(self, message: Message) -> Message:
            reply = super()._serve(message)
            fields = reply.content.config_records["clicooper"]
            if "introduction" in fields:
                seen.append(Introduction.from_json(str(fields["introduction"])))
            return reply

    for _ in range(2):
        start(tmp_path, Look)
    assert len({i.key for i in seen}) == len({i.nonce for i in seen}) == len(seen) == 8
