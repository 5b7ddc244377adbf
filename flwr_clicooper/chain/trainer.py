"""A trainer: one segment between two cuts."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from flwr_clicooper.chain.auxiliary import WithAuxiliary
from flwr_clicooper.chain.build import (
    build_segments,
    check_trainable,
    load_initial,
    outgoing_specs,
    trainers_for,
)
from flwr_clicooper.chain.delivered import digest
from flwr_clicooper.chain.marking import Marking
from flwr_clicooper.chain.messages import (
    ACTIVATIONS,
    ESCROW,
    GRADIENTS,
    LABELS,
    WATERMARK_KEY,
    WEIGHTS,
    Action,
    Header,
    array_record,
)
from flwr_clicooper.chain.records import check_labels
from flwr_clicooper.chain.stage import Changes, parse_specs, position_of
from flwr_clicooper.chain.state import StateStore
from flwr_clicooper.chain.trainer_statements import TrainerStatements, Work
from flwr_clicooper.chain.uploads import Uploads
from flwr_clicooper.chain.worker import Reply, Session, Worker, initial_weights
from flwr_clicooper.errors import MessageError, SplitError
from flwr_clicooper.grids.tensors import decode, decode_places, encode, encode_places
from flwr_clicooper.split.batches import Position
from flwr_clicooper.split.specs import Tensors, check_tensors, describe


class Trainer(Worker):
    """Serves the messages of one trainer."""

    def __init__(self, session: Session, store: StateStore, setup: dict[str, Any]) -> None:
        super().__init__(session, store, setup)
        options = session.options
        self.index: int = setup["stage"]
        self.who = f"segment {self.index}"
        self.local = options.schedule == "local"
        self.last = self.index == setup["trainers"] and options.label_side == "trainer"
        self.plan = session.batch_plan(setup["records"])
        incoming, self.outgoing = (
            parse_specs(setup["incoming"]),
            parse_specs(setup["outgoing"]),
        )
        self.label_spec = parse_specs([setup["labels"]])
        (self.scores,) = parse_specs([setup["scores"]])
        self.uploads = Uploads(
            store,
            self.plan.records,
            setup["chunk-records"],
            incoming,
            self.label_spec,
            self.who,
        )
        self.module = self._own_segment()
        trained: torch.nn.Module = self.module
        if self.local and not self.last:
            classes = self.scores.shape[0]
            trained = WithAuxiliary(self.module, self.outgoing, classes, options.seed)
        stored_inputs = self.local or (self.index == 1 and not options.head_trains)
        refetch = self._stored_inputs if stored_inputs else None
        cut = (incoming, self.outgoing)
        self.stage = self.make_stage(trained, self.index, cut, refetch=refetch)
        self.stages = [self.stage]
        if options.attest:
            self.statements = TrainerStatements(session.context, store.folder, self.index)
            self.attestor = self.statements
        self.marking = Marking(self.module, wanted=options.watermark)
        self.stage.before_step = self.marking.before_step

    def _own_segment(self) -> torch.nn.Module:
        segments = build_segments(self.session.task, self.session.config)
        needed = trainers_for(segments, self.session.config)
        if needed != self.setup["trainers"]:
            raise SplitError(
                f"trainer {self.index}'s task has segments for {needed} trainers, the "
                f"owner's for {self.setup['trainers']}: both must run the same app"
            )
        return segments[self.index]

    def start(self, message: Message) -> Reply:
        """Check that the segment fits its neighbours; load initial weights."""
        load_initial(self.module, initial_weights(message), self.index)
        giver = f"segment {self.index - 1}"
        found = outgoing_specs(self.module, self.stage.incoming, self.index, giver)
        if found != self.outgoing:
            raise SplitError(
                f"segment {self.index} gives {describe(found)} on trainer {self.index}, but "
                f"{describe(self.outgoing)} in the owner's task: both must run the same app"
            )
        check_trainable(self.stage.segment.module, self.stage.incoming, self.index, self.plan)
        return {"parameters": sum(p.numel() for p in self.module.parameters())}, {}

    def handle(self, action: Action, header: Header, message: Message) -> Reply:
        """Answer one message of the relay."""
        persist = header.optional("persist", False)
        match action:
            case Action.UPLOAD:
                self.changes |= self._upload(header, message)
                return {}, {}
            case Action.FORWARD:
                return self._forward(position_of(header), message, persist=persist)
            case Action.BACKWARD:
                return self._backward(position_of(header), message, persist=persist)
            case Action.LOCAL_EPOCH:
                return self._local_epoch(header.get("round", int))
            case Action.OUTPUTS:
                return self._outputs(header.get("chunk", int))
            case Action.AGREE:
                return self._agree(header), {}
            case Action.CLOSE_ROUND:
                self._note_state(Position(header.get("round", int), self.plan.steps, 0))
                self.marking.complete()
                self.changes |= self.stage.whole()
                return {}, {ESCROW: encode(self.stage.escrow())}
            case Action.ATTEST:
                return self._attest(header), {}
            case Action.RESTORE:
                what = f"{self.who}: checkpoint"
                self.stage.restore(decode(array_record(message, ESCROW), what))
                self.changes |= self.stage.whole()
                return {}, {}
            case Action.DELIVER:
                weights = self.module.state_dict()
                records = {WEIGHTS: encode(weights)}
                if self.attestor is not None and (key := self.statements.disclosed()):
                    data = torch.frombuffer(bytearray.fromhex(key), dtype=torch.uint8)
                    records[WATERMARK_KEY] = encode({"key": data})
                return {"digest": digest(weights)}, records
        raise MessageError(f"a trainer does not answer {action}")

    # -- what is signed ----------------------------------------------------------

    def _agree(self, header: Header) -> dict[str, Any]:
        work = Work(self._digest(), skipped=self.marking.skipped)
        signed = self.statements.start(header, self.agreed(), work)
        self.marking.use(self.statements.kept.key)
        return signed

    def _attest(self, header: Header) -> dict[str, Any]:
        bits, matches = self.marking.found()
        work = Work(
            self._digest(), *self.stage.take_work(), bits, matches, self.marking.skipped
        )
        signed = self.statements.finish_round(header, work)
        self.marking.use(self.statements.kept.key)
        return signed

    def _digest(self) -> str:
        return digest(self.module.state_dict())

    def _note_state(self, at: Position) -> None:
        """Commit to the state before a step from which, or up to which, an audit repeats."""
        every = self.session.options.audit_every
        if every and (at.step % every == 0 or at.step == self.plan.steps):
            self.statements.note_state(at, self.stage.escrow())

    def load(self) -> None:
        """Set segment, optimizer and the round's watermark to what the store has."""
        super().load()
        if self.attestor is not None:
            self.marking.use(self.attestor.kept.key)

    def _upload(self, header: Header, message: Message) -> Changes:
        parts = self.uploads.accept(header, message)
        for name, tensors in parts.items():
            if name.startswith(LABELS) and tensors is not None:
                self._checked(tensors["0"])
        return parts

    # -- lockstep ----------------------------------------------------------------

    def _forward(self, at: Position, message: Message, *, persist: bool) -> Reply:
        if at.microbatch == 0:  # before BatchNorm and the like change with the first pass
            self._note_state(at)
        inputs: dict[int, Tensor] = {}
        if self.stage.refetch is None:
            what = f"{self.who}: activations at {at}"
            inputs = decode_places(array_record(message, ACTIVATIONS), what)
        if not self.last:
            outputs = self.stage.forward(at, inputs, persist=persist)
            return {}, {ACTIVATIONS: encode_places(outputs)}
        loss, gradients = self.stage.loss_backward(
            at, inputs, self._labels(at, message), self._loss, persist=persist
        )
        records = {GRADIENTS: encode_places(gradients)} if self.stage.input_grads else {}
        return {"loss": loss}, records

    def _backward(self, at: Position, message: Message, *, persist: bool) -> Reply:
        what = f"{self.who}: gradients at {at}"
        gradients = decode_places(array_record(message, GRADIENTS), what)
        back = self.stage.backward(at, gradients, persist=persist)
        return {}, ({GRADIENTS: encode_places(back)} if self.stage.input_grads else {})

    def _labels(self, at: Position, message: Message) -> Tensor:
        if not self.session.options.head_trains:
            return self.uploads.labels(self.plan.indices(at))
        what, records = f"{self.who}: labels at {at}", len(self.plan.indices(at))
        given = decode_places(array_record(message, LABELS), what)
        check_tensors(tuple(given.values()), self.label_spec, records, what)
        return self._checked(given[0])

    def _checked(self, labels: Tensor) -> Tensor:
        classifies = self.session.task.classifies
        return check_labels(labels, self.scores, "uploaded") if classifies else labels

    def _loss(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return self.session.task.loss(outputs[0], labels)

    def _stored_inputs(self, at: Position) -> Tensors:
        return self.uploads.activations(self.plan.indices(at))

    # -- local schedule ----------------------------------------------------------

    def _local_epoch(self, round_: int) -> Reply:
        """Train one epoch on the stored inputs, without anybody's gradients."""
        total = 0.0
        for at in self.plan.positions(round_):
            labels = self.uploads.labels(self.plan.indices(at))
            value, _ = self.stage.loss_backward(at, {}, labels, self._loss, persist=False)
            total += value
        self.changes |= self.stage.whole()
        return {"loss": total / self.plan.steps}, {}

    def _outputs(self, chunk: int) -> Reply:
        """Return what the trained segment gives for one chunk of its inputs."""
        inputs = self.uploads.activations(self.uploads.chunk_rows(chunk))
        return {}, {ACTIVATIONS: encode_places(self.outputs_of(self.module, inputs))}
