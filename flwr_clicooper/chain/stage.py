"""One segment at work in the chain: checks what comes in, computes, and stores.

Used by trainers for their segment and by the owner for the head and the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flwr_clicooper.chain.messages import Header
from flwr_clicooper.chain.state import StateStore
from flwr_clicooper.errors import MessageError
from flwr_clicooper.split.batches import BatchPlan, Position
from flwr_clicooper.split.segment import Flight, Loss, Segment
from flwr_clicooper.split.specs import Tensors, TensorSpec, check_tensor, check_tensors

OPTIMIZER_REST = "optimizer-rest"
Changes = dict[str, Mapping[str, Tensor] | None]
Refetch = Callable[[Position], Tensors]


@dataclass
class Stage:
    """A segment with its place in the chain.

    Attributes
    ----------
    segment : Segment
        What computes.
    plan : BatchPlan
        Sizes and order of batches.
    incoming, outgoing : list of TensorSpec
        What crosses the cuts before and after it.
    giver : str
        Who gives the inputs, for errors.
    input_grads : bool
        Whether the party before it wants gradients.
    lr_factor : callable
        Multiple of the learning rate at a position.
    refetch : callable or None
        Where the inputs come from when no message brings them; they are then not
        stored with a flight.
    before_step : callable or None
        Called with the gradients of a batch in place.
    steps, records : int
        Optimizer steps, and records in them, since `take_work`.
    changes : dict
        Parts of the state that changed since the last `take_changes`.
    optimizer_rest : str
        What the optimizer keeps besides tensors, as JSON.
    """

    segment: Segment
    plan: BatchPlan
    incoming: list[TensorSpec]
    outgoing: list[TensorSpec]
    giver: str
    input_grads: bool
    lr_factor: Callable[[Position], float]
    refetch: Refetch | None = None
    before_step: Callable[[Position], None] | None = None
    steps: int = 0
    records: int = 0
    changes: Changes = field(default_factory=dict)
    optimizer_rest: str = "null"

    @property
    def name(self) -> str:
        """The prefix of this stage's parts in the state."""
        return f"segment-{self.segment.index}"

    # -- one micro-batch ---------------------------------------------------------

    def inputs(self, at: Position, tensors: Mapping[int, Tensor]) -> Tensors:
        """Return the checked inputs of a micro-batch, from the message or refetched.

        Raises
        ------
        MessageError
            A tensor is not what must come.
        """
        values = self.refetch(at) if self.refetch else tuple(tensors.values())
        what = f"segment {self.segment.index}: activations from {self.giver} at {at}"
        check_tensors(values, self.incoming, len(self.plan.indices(at)), what)
        return values

    def forward(
        self, at: Position, tensors: Mapping[int, Tensor], *, persist: bool
    ) -> Tensors:
        """Run a forward pass; return the outputs."""
        self.check(at)
        inputs = self.inputs(at, tensors)
        outputs = self.segment.forward(
            at, inputs, input_grads=self.input_grads, keep_buffers=persist
        )
        if persist:
            flight = self.segment.flights[at.microbatch]
            stored = {f"buffer/{k}": v for k, v in flight.buffers.items()}
            if self.refetch is None:
                stored |= {f"input/{i}": x for i, x in enumerate(inputs)}
            self.changes[f"{self.name}-flight-{at.microbatch}"] = stored
            self.changes[f"{self.name}-buffers"] = self.segment.buffers()
        return outputs

    def backward(
        self, at: Position, tensors: Mapping[int, Tensor], *, persist: bool
    ) -> dict[int, Tensor]:
        """Run a backward pass, and the optimizer step after a batch's last one."""
        self.check(at)
        records = len(self.plan.indices(at))
        index = self.segment.index
        what = f"segment {index}: gradient from segment {index + 1} at {at}"
        for place, tensor in tensors.items():
            if place >= len(self.outgoing):
                raise MessageError(f"{what}: there is no output {place}")
            check_tensor(tensor, self.outgoing[place], records, what)
        self._restore_inputs(at)
        gradients = self.segment.backward(at, dict(tensors), input_grads=self.input_grads)
        if persist:
            self.changes[f"{self.name}-flight-{at.microbatch}"] = None
        self._finish(at, persist=persist)
        return gradients

    def loss_backward(
        self,
        at: Position,
        tensors: Mapping[int, Tensor],
        labels: Tensor,
        loss: Loss,
        *,
        persist: bool,
    ) -> tuple[float, dict[int, Tensor]]:
        """Run forward, loss and backward on the last segment; step after a batch's last."""
        self.check(at)
        inputs = self.inputs(at, tensors)
        if len(labels) != len(inputs[0]):
            raise MessageError(
                f"segment {self.segment.index}: {len(labels)} labels came for "
                f"{len(inputs[0])} records at {at}"
            )
        weight = self.plan.weight(at)
        value, gradients = self.segment.loss_backward(
            at, inputs, labels, loss, weight, input_grads=self.input_grads
        )
        self._finish(at, persist=persist)
        return value * weight, gradients

    def check(self, at: Position) -> None:
        """Refuse a position that the run does not have."""
        if not self.plan.has(at):
            raise MessageError(f"segment {self.segment.index}: the run has no {at}")

    def _finish(self, at: Position, *, persist: bool) -> None:
        """Step after a batch's last backward pass, which is in order of micro-batches."""
        if at.microbatch == self.plan.parts(at.step) - 1:
            if self.before_step is not None:
                self.before_step(at)
            self.segment.step(self.lr_factor(at))
            self.steps += 1
            self.records += self.plan.batch_records(at.step)
            if persist:
                self.changes |= self.whole()
        elif persist:
            self.changes[f"{self.name}-gradients"] = self.segment.gradients()
            self.changes[f"{self.name}-buffers"] = self.segment.buffers()

    # -- state -------------------------------------------------------------------

    def whole(self) -> Changes:
        """Return the parts of a stage between two batches."""
        tensors, rest = self.segment.optimizer_state()
        self.optimizer_rest = rest
        return {
            f"{self.name}-weights": self.segment.tensors(),
            f"{self.name}-optimizer": tensors,
            f"{self.name}-gradients": None,
            f"{self.name}-buffers": None,
        }

    def escrow(self) -> dict[str, Tensor]:
        """Return all that another party needs to go on between two batches."""
        tensors, rest = self.segment.optimizer_state()
        found = {f"weights/{k}": v for k, v in self.segment.tensors().items()}
        found |= {f"optimizer/{k}": v for k, v in tensors.items()}
        data = torch.frombuffer(bytearray(rest.encode()), dtype=torch.uint8)
        return found | {OPTIMIZER_REST: data}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `escrow` gave.

        Raises
        ------
        MessageError
            It is not of this segment.
        """
        weights = _under("weights/", tensors)
        own = self.segment.tensors()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in own.items()}:
            raise MessageError(
                f"segment {self.segment.index}: the checkpoint is of another segment"
            )
        if OPTIMIZER_REST not in tensors:
            raise MessageError(f"segment {self.segment.index}: the checkpoint is not whole")
        rest = bytes(tensors[OPTIMIZER_REST].numpy()).decode()
        self.segment.load_tensors(weights)
        self.segment.load_optimizer_state(_own(_under("optimizer/", tensors)), rest)

    def take_work(self) -> tuple[int, int]:
        """Return and forget how many optimizer steps were made, and on how many records."""
        done, self.steps, self.records = (self.steps, self.records), 0, 0
        return done

    def take_changes(self) -> Changes:
        """Return and forget what changed."""
        changes, self.changes = self.changes, {}
        return changes

    def facts(self) -> dict[str, Any]:
        """Return the part of the state that is JSON."""
        work = [self.steps, self.records]
        return {f"{self.name}-optimizer": self.optimizer_rest, f"{self.name}-work": work}

    def load(self, store: StateStore, facts: Mapping[str, Any]) -> None:
        """Set the segment to what the store has, in the middle of a batch too."""
        segment, parts = self.segment, store.manifest.parts
        segment.load_tensors(store.read(f"{self.name}-weights"))
        self.optimizer_rest = facts[f"{self.name}-optimizer"]
        self.steps, self.records = facts[f"{self.name}-work"]
        segment.load_optimizer_state(
            _own(store.read(f"{self.name}-optimizer")), self.optimizer_rest
        )
        if f"{self.name}-buffers" in parts:
            segment.load_buffers(store.read(f"{self.name}-buffers"))
        if f"{self.name}-gradients" in parts:
            segment.load_gradients(_own(store.read(f"{self.name}-gradients")))
        prefix = f"{self.name}-flight-"
        for part in parts:
            if part.startswith(prefix):
                stored = store.read(part)
                inputs = [k for k in stored if k.startswith("input/")]
                inputs.sort(key=lambda k: int(k.removeprefix("input/")))
                buffers = {
                    k.removeprefix("buffer/"): v
                    for k, v in stored.items()
                    if k.startswith("buffer/")
                }
                flight = Flight(tuple(stored[k] for k in inputs), buffers, stored=True)
                segment.flights[int(part.removeprefix(prefix))] = flight

    def _restore_inputs(self, at: Position) -> None:
        """Fetch the inputs of a flight that was stored without them."""
        flight = self.segment.flights.get(at.microbatch)
        if flight is not None and flight.outputs is None and self.refetch is not None:
            flight.inputs = self.refetch(at)


def position_of(header: Header) -> Position:
    """Return the position that a message is for.

    Raises
    ------
    MessageError
        A number is missing.
    """
    return Position(*(header.get(name, int) for name in ("round", "step", "microbatch")))


def parse_specs(texts: Sequence[str]) -> list[TensorSpec]:
    """Return specs from a message's header."""
    return [TensorSpec.parse(text) for text in texts]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, since what is mapped from a file must not be modified."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
