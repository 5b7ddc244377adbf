"""End-to-end encryption of arrays between ClientApps, as a Flower mod."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from logging import WARNING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log

from flwr_clicooper.errors import OptionError, SealError, TrustError
from flwr_clicooper.mods.sealed_records import RecordSealer, is_sealed
from flwr_clicooper.options import node_path
from flwr_clicooper.privacy.sealing import Introduction, KeyRing, Order, check, introduce
from flwr_clicooper.provenance.keys import Identity, PublicIdentity, verify
from flwr_clicooper.provenance.trust import Trust

RECORD = "clicooper.seal"
_INTRODUCTIONS = "introductions"


class SealMod:
    """Seals records of replies for other clients, and opens what they sealed for this one.

    Every reply carries the client's introduction in a ``ConfigRecord`` named
    ``clicooper.seal``. The ServerApp passes these on with `passed_on`, together with the
    sealed records, which it cannot read. So the first exchange, of whatever message, only
    introduces the clients to each other.

    The node config says who a client is: ``party`` (its name), ``identity-key`` (see
    ``clicooper keygen``; without one its identity is for this run only) and ``trust-file``
    (without one, keys are taken as they first come in a run, with a warning).

    Parameters
    ----------
    to : mapping of str to str
        Which party opens a record of a reply, such as ``{"embeddings": "bank"}``.

    Raises
    ------
    OptionError
        ``to`` is not a mapping of names.
    """

    def __init__(self, to: Mapping[str, str] | None = None) -> None:
        self.to = dict(to or {})
        if not all(isinstance(text, str) and text for text in (*self.to, *self.to.values())):
            raise OptionError("'to' must map names of records to names of parties")

    def __call__(
        self, message: Message, context: Context, call_next: ClientAppCallable
    ) -> Message:
        """Open what comes, call the app, seal what goes.

        Raises
        ------
        SealError
            What came was changed, left out or is for another party; or nobody introduced
            the party that a reply is for.
        TrustError
            A key is not one that the trust file lists for a party.
        """
        sealer = _restored(context)
        header = message.content.config_records.get(RECORD, ConfigRecord())
        _meet(sealer, header, context)
        reply = call_next(_opened(sealer, message, header), context)
        if not reply.has_error():
            self._seal(sealer, reply)
        _keep(sealer, context)
        return reply

    def _seal(self, sealer: RecordSealer, reply: Message) -> None:
        own = sealer.ring.own
        said = ConfigRecord({_INTRODUCTIONS: [own.to_json()]})
        for name, taker in self.to.items():
            if name in reply.content.array_records:
                record = reply.content.array_records[name]
                reply.content[name] = sealer.seal(name, record, taker, ())
                said[name] = own.party
        reply.content[RECORD] = said


def passed_on(*replies: Message) -> ConfigRecord:
    """Return what a ServerApp adds to its next messages, as their ``clicooper.seal`` record.

    Parameters
    ----------
    *replies : Message
        Of clients with a `SealMod`. Records that are passed on keep their names.

    Raises
    ------
    SealError
        Two replies have a sealed record of the same name: give each client its own.
    """
    introductions: list[str] = []
    givers: dict[str, str] = {}
    for reply in replies:
        header = reply.content.config_records.get(RECORD, ConfigRecord())
        introductions += _texts(header)
        for name, giver in header.items():
            if name != _INTRODUCTIONS and givers.setdefault(name, str(giver)) != giver:
                raise SealError(f"two parties sealed a record named {name!r}")
    return ConfigRecord({_INTRODUCTIONS: sorted(set(introductions)), **givers})


def _opened(sealer: RecordSealer, message: Message, header: ConfigRecord) -> Message:
    sealed = {n: r for n, r in message.content.array_records.items() if is_sealed(r)}
    if not sealed:
        return message
    opened = copy.copy(message)
    opened.content = RecordDict(dict(message.content))
    for name, record in sealed.items():
        giver = header.get(name)
        if not isinstance(giver, str):
            raise SealError(f"{name} came sealed, but {RECORD!r} does not say by whom")
        opened.content[name] = sealer.open(name, record, giver, (), name)
    return opened


def _meet(sealer: RecordSealer, header: ConfigRecord, context: Context) -> None:
    """Take the keys of parties that were introduced; a known party keeps its key."""
    own, peers = sealer.ring.own, dict(sealer.ring.peers)
    for text in _texts(header):
        peer = Introduction.from_json(text)
        if peer.party == own.party and peer != own:
            raise SealError(f"another party introduces itself as {own.party}")
        if peer == own or peers.get(peer.party) == peer:
            continue
        if peer.party in peers:
            raise SealError(f"{peer.party} has another key than before in this run")
        check(peer, own.run, peer.party, verify)
        _check_trusted(peer, context)
        peers[peer.party] = peer
    if peers != sealer.ring.peers:
        sealer.ring = sealer.ring.with_peers(peers)


def _check_trusted(peer: Introduction, context: Context) -> None:
    path, key = (
        node_path(context.node_config, "trust-file"),
        PublicIdentity.parse(peer.identity),
    )
    if path is None:
        log(
            WARNING,
            "no trust-file says who %s is; its key %s is taken as it came. A server that "
            "lies about keys would not be noticed",
            peer.party,
            key.fingerprint,
        )
    elif not any(p.name == peer.party and p.key == key for p in Trust.load(path).parties):
        raise TrustError(
            f"the key with fingerprint {key.fingerprint} is not the one that {path} lists for "
            f"{peer.party!r}"
        )


def _restored(context: Context) -> RecordSealer:
    """Return the client's keys and counters in this run, or new ones."""
    run = str(context.run_id)
    if RECORD in context.state.config_records:
        state = context.state.config_records[RECORD]
        ring = KeyRing.from_json(bytes(state["ring"]))  # type: ignore[arg-type]
        if ring.own.run == run:
            numbers = json.loads(str(state["numbers"]))
            return RecordSealer(ring, Order(numbers["expected"]), numbers["sent"])
    party = context.node_config.get("party")
    if not isinstance(party, str) or not party:
        raise OptionError(f"node-config 'party' is {party!r}; allowed is the client's name")
    path = node_path(context.node_config, "identity-key")
    identity = Identity.load(path) if path else Identity.new()
    own, private = introduce(run, party, str(identity.public), identity.sign)
    return RecordSealer(KeyRing(own, private, {}))


def _keep(sealer: RecordSealer, context: Context) -> None:
    numbers = {"expected": sealer.order.expected, "sent": sealer.sent}
    ring = sealer.ring.to_json()
    context.state[RECORD] = ConfigRecord({"ring": ring, "numbers": json.dumps(numbers)})


def _texts(header: ConfigRecord) -> Iterable[str]:
    texts = header.get(_INTRODUCTIONS, [])
    if not isinstance(texts, list):
        raise SealError(f"{_INTRODUCTIONS!r} of {RECORD!r} is not a list")
    return [str(text) for text in texts]
