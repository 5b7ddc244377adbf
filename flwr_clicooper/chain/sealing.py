"""Sealing in the chain: the relay carries tensors that only their receiver can open.

A mod around every handler of owner and trainers. At setup each party introduces itself
with a key for this run; `train.meet` brings everybody the others' introductions. From then
on each array is sealed for the party that it goes to, and bound to who sends it, what it
is, which step it belongs to and its number on its way, so nothing can be changed, left
out, repeated, put elsewhere or sent to another party without being refused.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from flwr_clicooper.chain.identity import check_peers, own_identity
from flwr_clicooper.chain.messages import (
    ACTIVATIONS,
    ESCROW,
    HEADER,
    INTRODUCTION,
    INTRODUCTIONS,
    LABELS,
    WATERMARK_KEY,
    WEIGHTS,
    Action,
    Header,
    answer,
    array_record,
)
from flwr_clicooper.chain.roles import OWN_FOLDER, OWNER, run_folder, state_folder
from flwr_clicooper.errors import SealError, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.mods.sealed_records import RecordSealer
from flwr_clicooper.options import Options
from flwr_clicooper.privacy.sealing import Introduction, KeyRing, Order, introduce

FILE = "seal.json"
_POSITION = ("round", "step", "microbatch", "release", "chunk")
_BETWEEN_TRAINER_AND_OWNER = frozenset({ESCROW, WEIGHTS, WATERMARK_KEY})
_AT_REST = frozenset({ESCROW})
"""Records that may be opened later, and more than once."""
_OPEN = frozenset({Action.HELLO, Action.LIVE, Action.FINISH})


def party(place: int, trainers: int) -> str:
    """Return the party at a place of the model: 0 and N + 1 are the owner's."""
    return f"trainer {place}" if 1 <= place <= trainers else OWNER


@dataclass
class Sealer:
    """One party's keys and counters in one run.

    Attributes
    ----------
    records : RecordSealer
        The keys, and the numbers of what goes and comes.
    stage, trainers : int
        The party's place, 0 for the owner, and the length of the chain.
    to_all : bool
        Whether labels go to all trainers, not only to the last.
    handled : int
        Messages so far; tells which copy of this is the newest.
    """

    records: RecordSealer
    stage: int
    trainers: int
    to_all: bool
    handled: int = 0

    def receivers(self, name: str, segment: int) -> list[str]:
        """Return who gets a record that a segment's holder sends."""
        if name in _BETWEEN_TRAINER_AND_OWNER:
            return [OWNER]
        if name == LABELS:
            first = 1 if self.to_all else self.trainers
            return [party(i, self.trainers) for i in range(first, self.trainers + 1)]
        step = 1 if name == ACTIVATIONS else -1
        return [party(segment + step, self.trainers)]

    def sender(self, name: str, segment: int) -> str:
        """Return who must have sent a record that a segment's holder gets."""
        if name in _BETWEEN_TRAINER_AND_OWNER:
            return party(segment, self.trainers) if self.stage == 0 else OWNER
        if name == LABELS:
            return OWNER
        step = -1 if name == ACTIVATIONS else 1
        return party(segment + step, self.trainers)

    def seal(self, message: Message, header: Header, segment: int, *, whole: bool) -> None:
        """Seal all arrays of a reply in place.

        Parameters
        ----------
        header : Header
            Of the request: which step the reply belongs to.
        segment : int
            The segment that this party answers for.
        whole : bool
            Whether Flower itself carries the message, which takes only ``bytes``.
        """
        for name, record in list(message.content.array_records.items()):
            takers = self.receivers(name, segment)
            del message.content[name]
            for taker in takers:
                one = name if len(takers) == 1 else for_taker(name, taker)
                message.content[one] = self.records.seal(
                    name,
                    record,
                    taker,
                    _place(header),
                    whole=whole,
                    counted=name not in _AT_REST,
                )

    def open(self, message: Message, header: Header, segment: int) -> Message:
        """Return a request with all arrays opened.

        Raises
        ------
        SealError
            One is not sealed, was changed, or is not the next of its kind.
        """
        opened = copy.copy(message)
        opened.content = RecordDict(dict(message.content))
        for name, record in message.content.array_records.items():
            giver = self.sender(name, segment)
            what = f"{name} at {_in_words(header)}"
            opened.content[name] = self.records.open(
                name, record, giver, _place(header), what, counted=name not in _AT_REST
            )
        return opened

    # -- files -------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write it to a file that only its owner may read."""
        fields = {
            "ring": self.records.ring.to_json().decode(),
            "stage": self.stage,
            "trainers": self.trainers,
            "to-all": self.to_all,
            "expected": self.records.order.expected,
            "sent": self.records.sent,
            "handled": self.handled,
        }
        write_atomically(folder / FILE, json.dumps(fields).encode(), durable=False)

    @classmethod
    def load(cls, folder: Path) -> Sealer:
        """Return what `save` wrote.

        Raises
        ------
        StateError
            It is missing or damaged.
        """
        try:
            fields = json.loads((folder / FILE).read_text())
            ring = KeyRing.from_json(fields["ring"].encode())
            records = RecordSealer(ring, Order(fields["expected"]), fields["sent"])
            place = (fields["stage"], fields["trainers"], fields["to-all"])
            return cls(records, *place, fields["handled"])
        except (OSError, ValueError, TypeError, LookupError, SealError) as error:
            raise StateError(f"the keys in {folder / FILE} are missing or damaged") from error


_CACHE: dict[tuple[int, int], Sealer] = {}


def seal_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Open what comes and seal what goes; a Flower mod for the ClientApp of the chain."""
    action = Action(message.metadata.message_type)
    options = Options.from_config(context.run_config)
    key = (context.run_id, context.node_id)
    if action is Action.FINISH:
        _CACHE.pop(key, None)  # a process may outlive many runs; their keys must not
    if action in _OPEN or not options.seal:
        return call_next(message, context)
    header = Header.of(message)
    persist = header.optional("persist", False)
    folder = state_folder(options, context, context.run_id, context.node_id)
    if action is Action.SETUP:
        reply = call_next(message, context)
        sealer = _introduced(header, context, options, folder)
        if HEADER in reply.content.config_records:  # else the relay says what is missing
            reply.content.config_records[HEADER][INTRODUCTION] = (
                sealer.records.ring.own.to_json()
            )
    else:
        sealer = _newest(key, folder, persisted=persist)
        if action is Action.MEET:
            reply = _meet(sealer, message, context)
        elif action is Action.RESEAL:
            reply = _reseal(sealer, message, options)
        else:
            reply = _through(sealer, message, context, call_next)
    sealer.handled += 1
    _CACHE[key] = sealer
    if persist and folder.is_dir():
        sealer.save(folder)
    return reply


def _through(
    sealer: Sealer, message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    header = Header.of(message)
    segment = header.optional("segment", sealer.stage)
    reply = call_next(sealer.open(message, header, segment), context)
    sealer.seal(reply, header, segment, whole=header.optional("persist", False))
    return reply


def _introduced(header: Header, context: Context, options: Options, folder: Path) -> Sealer:
    """Return the keys of a party that has just been set up; it knows nobody yet."""
    trainers = header.get("trainers", int)
    stage = header.optional("stage", 0)
    identity = own_identity(context.node_config, folder)
    own, private = introduce(
        str(context.run_id), party(stage, trainers), str(identity.public), identity.sign
    )
    ring = KeyRing(own, private, {})
    return Sealer(RecordSealer(ring), stage, trainers, to_all=options.schedule == "local")


def _meet(sealer: Sealer, message: Message, context: Context) -> Message:
    """Take the others' keys, if they are who they must be."""
    texts = Header.of(message).texts(INTRODUCTIONS)
    given = {i.party: i for i in map(Introduction.from_json, texts)}
    places = {OWNER: 0} | {party(i, sealer.trainers): i for i in range(1, sealer.trainers + 1)}
    own = sealer.records.ring.own
    if given.keys() != places.keys() or given[own.party] != own:
        raise SealError(f"the relay did not introduce {own.party} and its peers as they are")
    peers = {name: peer for name, peer in given.items() if name != own.party}
    check_peers(own.run, {name: (places[name], peer) for name, peer in peers.items()}, context)
    sealer.records.ring = sealer.records.ring.with_peers(peers)
    if sealer.stage == 0:
        options = Options.from_config(context.run_config)
        _rings(options, own.run).mkdir(parents=True, exist_ok=True, mode=0o700)
        path = _rings(options, own.run) / f"ring-{own.nonce.hex()}.json"
        write_atomically(path, sealer.records.ring.to_json())
    return answer(message, {})


def _reseal(sealer: Sealer, message: Message, options: Options) -> Message:
    """At the owner: open what a trainer escrowed in an earlier attempt, seal it for now."""
    header = Header.of(message)
    taker = party(header.get("segment", int), sealer.trainers)
    sealed, place = array_record(message, ESCROW), _place(header)
    what = f"{ESCROW} at {_in_words(header)}"
    refused = SealError(
        f"the owner has no keys to the checkpoint of {taker}; resume on its machine and with "
        "the run-dir of the first run"
    )
    for path in _rings(options, header.get("resume-run", str)).glob("ring-*.json"):
        earlier = RecordSealer(KeyRing.from_json(path.read_bytes()))
        try:
            record = earlier.open(ESCROW, sealed, taker, place, what, counted=False)
        except SealError as error:
            refused = error
            continue
        again = sealer.records.seal(ESCROW, record, taker, place, counted=False)
        return answer(message, {}, {ESCROW: again})
    raise refused


def _rings(options: Options, run_id: str) -> Path:
    """Return where the owner keeps the keys to what trainers escrow; gone after delivery."""
    return run_folder(options, run_id) / OWN_FOLDER


def _newest(key: tuple[int, int], folder: Path, *, persisted: bool) -> Sealer:
    """Return the party's keys and counters, from this process or from the file."""
    cached = _CACHE.get(key)
    if cached is not None and not persisted:
        return cached
    stored = Sealer.load(folder) if (folder / FILE).exists() else None
    if cached is None or (stored is not None and stored.handled >= cached.handled):
        if stored is None:
            raise StateError("this node has no keys for the run: it was not set up for it")
        return stored
    return cached


def for_taker(name: str, taker: str) -> str:
    """Return the name of a record that goes to several parties, each in its own seal."""
    return f"{name} for {taker}"


def _place(header: Header) -> list[int]:
    """Return what binds a record to its step; giver and taker get the same header fields."""
    return [header.optional(name, -1) for name in _POSITION]


def _in_words(header: Header) -> str:
    found = [(name, header.optional(name, -1)) for name in _POSITION]
    return ", ".join(f"{name} {value}" for name, value in found if value >= 0) or "delivery"
