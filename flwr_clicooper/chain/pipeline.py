"""One optimizer step through the chain, several micro-batches in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from flwr_clicooper.chain.messages import ACTIVATIONS, GRADIENTS, LABELS, Action, Header
from flwr_clicooper.chain.relay import Records, Relay, required
from flwr_clicooper.chain.schedule import Operation, Pass, stage_order
from flwr_clicooper.errors import CooperError


@dataclass(frozen=True)
class Seat:
    """A segment that trains, and the node that holds it.

    Attributes
    ----------
    segment : int
        Index of the segment in the model.
    node_id : int
        Who holds it; the owner may hold two.
    """

    segment: int
    node_id: int


@dataclass
class _Step:
    """What is ready and what remains of one optimizer step."""

    queues: list[deque[Operation]]
    activations: dict[tuple[int, int], ArrayRecord] = field(default_factory=dict)
    gradients: dict[tuple[int, int], ArrayRecord] = field(default_factory=dict)
    labels: dict[int, ArrayRecord] = field(default_factory=dict)
    loss: float = 0.0


class Pipeline:
    """Drives forward and backward passes through the seats of a chain.

    Parameters
    ----------
    relay : Relay
        Who sends.
    seats : sequence of Seat
        The segments that train, in order.
    order : str
        ``gpipe`` or ``1f1b``.
    """

    def __init__(self, relay: Relay, seats: Sequence[Seat], order: str) -> None:
        self.relay = relay
        self.seats = seats
        self.order = order

    def step(self, round_: int, step: int, microbatches: int) -> float:
        """Run one optimizer step; return its loss.

        A pass is sent as soon as its input is there and its node is free, in each
        stage's own order. So the result does not depend on who is fast.
        """
        count = len(self.seats)
        orders = [stage_order(self.order, s, count, microbatches) for s in range(count)]
        state = _Step([deque(order) for order in orders])
        sent: dict[str, tuple[int, Operation]] = {}
        while any(state.queues) or sent:
            # Later stages first: a node that holds two segments frees memory first.
            for stage in reversed(range(count)):
                operation = self._next(state, stage)
                if operation is not None:
                    message_id = self._send(state, stage, operation, round_, step)
                    sent[message_id] = (stage, operation)
            if not sent:
                raise CooperError(f"no pass of round {round_}, step {step} can go on")
            for message_id, header, records in self.relay.receive():
                stage, operation = sent.pop(message_id)
                self._take(state, stage, operation, header, records)
        return state.loss

    def _next(self, state: _Step, stage: int) -> Operation | None:
        """Return the stage's next operation if its input is there and its node free."""
        queue = state.queues[stage]
        if not queue or self.seats[stage].node_id in self.relay.busy:
            return None
        key = (stage, queue[0].microbatch)
        if queue[0].kind is Pass.BACKWARD:
            ready = key in state.gradients
        else:
            ready = stage == 0 or key in state.activations
        return queue.popleft() if ready else None

    def _send(
        self, state: _Step, stage: int, operation: Operation, round_: int, step: int
    ) -> str:
        key, seat = (stage, operation.microbatch), self.seats[stage]
        records: dict[str, ArrayRecord] = {}
        giver = None
        if operation.kind is Pass.BACKWARD:
            records[GRADIENTS] = state.gradients.pop(key)
            giver = self.seats[stage + 1]
        elif stage > 0:
            records[ACTIVATIONS] = state.activations.pop(key)
            giver = self.seats[stage - 1]
        if giver is not None:
            for record in records.values():
                self.relay.count(giver.node_id, seat.node_id, record)
        if operation.kind is Pass.LOSS and operation.microbatch in state.labels:
            records[LABELS] = state.labels.pop(operation.microbatch)
            self.relay.count(self.seats[0].node_id, seat.node_id, records[LABELS])
        action = Action.BACKWARD if operation.kind is Pass.BACKWARD else Action.FORWARD
        fields = {
            "segment": seat.segment,
            "round": round_,
            "step": step,
            "microbatch": operation.microbatch,
        }
        return self.relay.send(seat.node_id, action, fields, records)

    def _take(
        self, state: _Step, stage: int, operation: Operation, header: Header, records: Records
    ) -> None:
        who = self.relay.names[self.seats[stage].node_id]
        microbatch = operation.microbatch
        if operation.kind is Pass.FORWARD:
            record = required(records, ACTIVATIONS, who)
            state.activations[stage + 1, microbatch] = record
            if LABELS in records:
                state.labels[microbatch] = records[LABELS]
            return
        if operation.kind is Pass.LOSS:
            state.loss += header.get("loss", float)
        if stage > 0:
            state.gradients[stage - 1, microbatch] = required(records, GRADIENTS, who)
