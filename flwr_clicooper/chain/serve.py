"""Serving one message of the chain on versioned state."""

from __future__ import annotations

import json
import time

from flwr.app import Context, Message

from flwr_clicooper.chain.identity import keep_identity
from flwr_clicooper.chain.messages import IDENTITY, Action, Header, answer
from flwr_clicooper.chain.own_checkpoints import OwnCheckpoints
from flwr_clicooper.chain.owner import Owner
from flwr_clicooper.chain.release_store import ReleaseStore
from flwr_clicooper.chain.roles import OWNER
from flwr_clicooper.chain.state import WorkerCache
from flwr_clicooper.chain.trainer import Trainer
from flwr_clicooper.chain.worker import Reply, Session, Worker
from flwr_clicooper.errors import MessageError, OptionError
from flwr_clicooper.task import SplitTask

# These read the state; all others change it, and so its version.
_READING = frozenset({Action.RELEASE, Action.DELIVER, Action.EVALUATE})

# After these the state must survive a power cut, not only the end of the process.
_DURABLE = frozenset(
    {Action.SETUP, Action.AGREE, Action.UPLOAD, Action.CLOSE_ROUND, Action.ATTEST}
)

CACHE: WorkerCache[Worker] = WorkerCache()


def serve(task: SplitTask, action: Action, message: Message, context: Context) -> Message:
    """Answer a message of the chain.

    The header names the version of the state that the message is for, and whether
    another process may get the next one (`persist`).

    Raises
    ------
    CooperError
        The message, the options or the state are not as they must be.
    """
    started = time.perf_counter()
    session = Session.of(task, context)
    header = Header.of(message)
    if action is Action.FINISH:
        CACHE.drop(session.key)
        session.store().remove()
        if header.optional("delivered", False) and session.role.name == OWNER:
            OwnCheckpoints.of(session.options, session.context.run_id).delete()
            ReleaseStore.of(session.options, session.context.run_id).forget()
        return answer(message, {})
    version = header.get("version", int)
    if action is Action.SETUP:
        worker, reply = _set_up(session, header, message)
    else:
        worker = CACHE.take(session.key, version, lambda: _load(session, version))
        reply = worker.handle(action, header, message)
        if worker.attestor is not None:
            worker.attestor.note(action, header, message, reply[1])
            worker.attestor.kept.seconds += time.perf_counter() - started
    if action not in _READING:
        version += 1
        if header.get("persist", bool):
            worker.commit(version, durable=action in _DURABLE)
    CACHE.put(session.key, version, worker)
    fields, records = reply
    seconds = time.perf_counter() - started
    return answer(message, {**fields, "version": version, "seconds": seconds}, records)


def _set_up(session: Session, header: Header, message: Message) -> tuple[Worker, Reply]:
    if header.get("version", int) != 0:
        raise MessageError("setup comes first: its version must be 0")
    _check_agreement(session, header)
    # What a lost run, or this party as an earlier node of the run, left on this disk.
    if "resume-run" in header:
        session.store(header.get("resume-run", str)).remove()
    store = session.store()
    store.create()
    if "replaces" in header:
        earlier = session.store(node_id=header.get("replaces", int))
        keep_identity(earlier.folder, store.folder)
        earlier.remove()
    CACHE.revive(session.key)
    worker = _worker_class(session)(session, store, header.as_dict())
    reply = worker.start(message)
    for stage in worker.stages:
        worker.changes |= stage.whole()
    if worker.attestor is not None:
        reply[0][IDENTITY] = str(worker.attestor.identity.public)
    return worker, reply


def _check_agreement(session: Session, header: Header) -> None:
    """Refuse a relay whose options are not this node's."""
    relay = json.loads(header.get("options", str))
    for key, own in session.options.agreed().items():
        if relay.get(key) != own:
            raise OptionError(
                f"option {key!r} is {relay.get(key)!r} on the relay and {own!r} on this node; "
                "both must have the same run config"
            )


def _load(session: Session, version: int) -> Worker:
    store = session.store()
    store.open(version)
    worker = _worker_class(session)(session, store, store.manifest.facts["setup"])
    worker.load()
    return worker


def _worker_class(session: Session) -> type[Worker]:
    return Owner if session.role.name == OWNER else Trainer
