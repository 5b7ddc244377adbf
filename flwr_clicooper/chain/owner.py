"""The owner: the data, the head, in the U-shape the tail, and the delivered model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flwr_clicooper.chain.build import (
    build_segments,
    check_trainable,
    load_initial,
    outgoing_specs,
    propagate,
    trainers_for,
)
from flwr_clicooper.chain.delivered import (
    DeliveredModel,
    assemble,
    check_finite,
    digest,
    portable,
    save_model,
)
from flwr_clicooper.chain.held_out import held_out_metrics, measure
from flwr_clicooper.chain.messages import (
    ACTIVATIONS,
    GRADIENTS,
    LABELS,
    WEIGHTS,
    Action,
    Header,
    array_record,
)
from flwr_clicooper.chain.own_checkpoints import OwnCheckpoints
from flwr_clicooper.chain.owner_data import OwnerData
from flwr_clicooper.chain.owner_labels import OwnerLabels, label_key
from flwr_clicooper.chain.owner_release import OwnerRelease, bound_of
from flwr_clicooper.chain.owner_statements import OwnerStatements
from flwr_clicooper.chain.privacy_statement import statement_of
from flwr_clicooper.chain.private_head import check_per_record, check_random, check_specs
from flwr_clicooper.chain.records import Indices, all_rows
from flwr_clicooper.chain.release_store import ReleaseStore
from flwr_clicooper.chain.roles import run_folder
from flwr_clicooper.chain.stage import Stage, position_of
from flwr_clicooper.chain.state import StateStore
from flwr_clicooper.chain.worker import Reply, Session, Worker, initial_weights
from flwr_clicooper.errors import (
    DataError,
    DeliveryError,
    MessageError,
    SplitError,
)
from flwr_clicooper.grids.tensors import decode, decode_places, encode_places
from flwr_clicooper.privacy.class_scores import ClassScores
from flwr_clicooper.provenance.fields import canonical_digest
from flwr_clicooper.provenance.watermark import skip_reason
from flwr_clicooper.split.batches import Position
from flwr_clicooper.split.modules import keeping_modes, load_weights
from flwr_clicooper.split.specs import (
    Tensors,
    TensorSpec,
    check_tensors,
    describe,
)

CHUNK_BYTES = 16 * 2**20
"""Upper bound for the activations in one message of a release."""


class Owner(Worker):
    """Serves the messages of the owner."""

    def __init__(self, session: Session, store: StateStore, setup: dict[str, Any]) -> None:
        super().__init__(session, store, setup)
        self.segments = build_segments(session.task, session.config)
        needed = trainers_for(self.segments, session.config)
        if needed != setup["trainers"]:
            raise SplitError(
                f"the task's {len(self.segments)} segments need {needed} trainers with "
                f"label-side = {session.options.label_side!r}; {setup['trainers']} are here"
            )
        self.data = OwnerData(session.task, session.config, session.options.seed)
        self.train, self.test = self.data.train, self.data.test
        self.plan = session.batch_plan(self.train.records)
        self._batches: dict[Position, tuple[Tensors, Tensor]] = {}
        inputs, labels = self.data.first(self.train)
        self.inputs = [TensorSpec.of(x) for x in inputs]
        self._with_scores()
        self.specs = propagate(self.segments, self.inputs)
        if len(self.specs[-1]) != 1:
            raise SplitError(
                f"the last segment gives {describe(self.specs[-1])}; the loss takes one tensor"
            )
        self.scores = self.specs[-1][0]
        run_id, node = session.context.run_id, session.context.node_config
        self.labels = OwnerLabels(
            session.options,
            session.task.classifies,
            self.scores,
            lambda: label_key(session.options, run_id, node, self._resumed()),
        )
        self.label_spec = TensorSpec.of(self.labels.checked(labels, "training"))
        self.setup["data"] = self.data.check_same(setup.get("data", ""))
        self.head = self.segments[0]
        self.release = self._release()
        self.stages = self._trained_stages()
        if session.options.attest:
            self.statements = OwnerStatements(session.context, store.folder, 0)
            self.attestor = self.statements

    def _with_scores(self) -> None:
        """With `class-scores`, end the head with them."""
        classes = self.session.options.class_scores
        self.features, self.class_scores = self.segments[0], None
        if classes:
            cut = outgoing_specs(self.features, self.inputs, 0, "the data set")
            check_specs(cut, "class-scores")
            self.class_scores = ClassScores(cut[0].shape[0], classes)
            self.segments[0] = nn.Sequential(self.features, self.class_scores)

    def _resumed(self) -> str:
        """Return the run that this one resumes, if it does."""
        return str(self.setup.get("resume-run", ""))

    def _release(self) -> OwnerRelease:
        """Return what leaves before training; flip the labels, if they are to be flipped."""
        options, context = self.session.options, self.session.context
        store = ReleaseStore.of(options, context.run_id, self._resumed())
        self.labels.flip_all(store, self._true_labels)
        widest = max(sum(spec.nbytes for spec in cut) for cut in self.specs[:-1])
        return OwnerRelease(
            options,
            self.labels,
            store,
            partial(self._outputs, self.segments[0]),
            partial(self._outputs, self.features),
            self.class_scores,
            self.specs[0],
            records=self.train.records,
            chunk_records=max(1, CHUNK_BYTES // max(1, widest)),
            rounds=self.setup["rounds"],
        )

    def _trained_stages(self) -> list[Stage]:
        """Return the stages that the owner trains: the head, the tail, both or none."""
        stages = []
        if self.session.options.head_trains:
            cut, refetch = (self.inputs, self.specs[0]), self._inputs_of
            stages.append(self.make_stage(self.head, 0, cut, refetch=refetch))
        if self.session.options.label_side == "owner":
            index, cut = len(self.segments) - 1, (self.specs[-2], self.specs[-1])
            stages.append(self.make_stage(self.segments[-1], index, cut))
        return stages

    def start(self, message: Message) -> Reply:
        """Load initial weights; tell the relay what crosses each cut."""
        given = initial_weights(message)
        for index, segment in enumerate(self.segments):
            load_initial(segment, given, index)
        self._check_head()
        self._rehearse()
        header = Header.of(message)
        if "resume-run" in header and self.stages:
            run_id, round_ = header.get("resume-run", str), header.get("resume-round", int)
            OwnCheckpoints.of(self.session.options, run_id).restore(round_, self.stages)
        for stage in self.stages:
            index = stage.segment.index
            check_trainable(self.segments[index], stage.incoming, index, self.plan)
        local = self.session.options.schedule == "local"
        if local and len(self.scores.shape) != 1:
            raise SplitError(
                f"schedule = 'local' needs a model that gives one row of scores per record; "
                f"this one gives {self.scores}"
            )
        self.changes["head"] = self.head.state_dict()
        return {
            **self._terms(),
            "records": self.train.records,
            "held-out-records": self.test.records,
            "segments": len(self.segments),
            "scores": str(self.scores),
            "labels": str(self.label_spec),
            "chunk-records": self.release.chunk_records,
            "privacy": json.dumps(self._privacy(self.release.allowed)),
            **{f"cut-{i}": [str(s) for s in specs] for i, specs in enumerate(self.specs)},
        }, {}

    def _terms(self) -> dict[str, Any]:
        """Return what the job takes from the owner."""
        if self.attestor is None:
            return {}
        trained = self.segments[1 : self.setup["trainers"] + 1]
        self.setup["initial"] = [digest(segment.state_dict()) for segment in trained]
        return {"nonce": self.statements.nonce, "initial": self.setup["initial"]}

    def agreed(self) -> dict[str, Any]:
        """Return what the job must say, as the owner knows it, by field."""
        return super().agreed() | {
            "nonce": self.statements.nonce,
            "cuts": tuple(tuple(map(str, cut)) for cut in self.specs),
            "subject": canonical_digest(self._privacy(self.release.allowed)),
        }

    def _privacy(self, made: int) -> dict[str, Any]:
        return statement_of(self.release, made).as_json()

    def load(self) -> None:
        """Set head, tail and optimizers to what the store has."""
        load_weights(self.head, self.store.read("head"), "segment 0")
        super().load()

    def handle(self, action: Action, header: Header, message: Message) -> Reply:
        """Answer one message of the relay."""
        persist = header.optional("persist", False)
        match action:
            case Action.RELEASE:
                return self._released(header.get("chunk", int), header.get("release", int))
            case Action.FORWARD:
                return self._forward(header, message, persist=persist)
            case Action.BACKWARD:
                return self._backward(header, message, persist=persist)
            case Action.CLOSE_ROUND:
                for stage in self.stages:
                    self.changes |= stage.whole()
                own = OwnCheckpoints.of(self.session.options, self.session.context.run_id)
                own.close(header.get("round", int), self.stages)
                return {}, {}
            case Action.AGREE:
                initial = tuple(self.setup["initial"])
                return {"job": self.statements.agree_from(header, self.agreed(), initial)}, {}
            case Action.COLLECT:
                return self._collect(header, message)
            case Action.EVALUATE:
                return self._evaluate(header)
        raise MessageError(f"the owner does not answer {action}")

    def _rehearse(self) -> None:
        """Do what comes after training on two records now, while nothing can be lost."""
        inputs, labels = self.data.first(self.test, 2)
        found = [TensorSpec.of(x) for x in inputs]
        if found != self.inputs:
            raise DataError(
                f"the held-out set gives {describe(found)}, the training set "
                f"{describe(self.inputs)}"
            )
        for part in (self.train, self.test):
            if isinstance(part.dataset, TensorDataset):
                self.labels.checked(part.dataset.tensors[-1], part.name)
        labels = self.labels.checked(labels, "held-out")
        with keeping_modes(nn.ModuleList(self.segments)):
            measure(self.session.task, self._assembled(), inputs, labels, self.session.device)

    def _check_head(self) -> None:
        """Refuse a head under which the run's guarantee would not hold."""
        options = self.session.options
        if not options.private:
            return
        check_specs(self.specs[0], options.release)
        inputs, _ = self.data.first(self.train, 3)
        check_per_record(self.head, tuple(x.to(self.session.device) for x in inputs))
        if options.head == "random":
            check_random(self.session.task, self.session.config, self.features)

    def _assembled(self) -> DeliveredModel:
        """Return the delivered model: what it answers are true classes."""
        return assemble(self.segments, bound_of(self.session.options), self.labels.map)

    # -- data --------------------------------------------------------------------

    def _fetch(self, rows: Indices, purpose: tuple[int, ...]) -> tuple[Tensors, Tensor]:
        inputs, labels = self.data.fetch(rows, purpose)
        return inputs, self.labels.checked(labels, "training")

    def _held_out_batches(self) -> Iterator[tuple[Tensors, Tensor]]:
        for rows in all_rows(self.test.records, self.session.options.batch_size):
            inputs, labels = self.test.fetch(rows)
            yield inputs, self.labels.checked(labels, "held-out")

    def _true_labels(self) -> Tensor:
        rows = all_rows(self.train.records, self.session.options.batch_size)
        return torch.cat([self._fetch(some, (0, i))[1] for i, some in enumerate(rows)])

    def _outputs(
        self, head: nn.Module, rows: Indices, purpose: tuple[int, ...]
    ) -> tuple[Tensors, Tensor]:
        """Return what a head gives for records, and their true labels."""
        inputs, labels = self._fetch(rows, purpose)
        outputs = self.outputs_of(head, inputs)
        if head is self.head:
            what = f"segment 0: the head's activations of chunk {purpose[-1]} of the data set"
            check_tensors(outputs, self.specs[0], len(rows), what)
        return outputs, labels

    def _batch(self, at: Position) -> tuple[Tensors, Tensor]:
        """Return a micro-batch; the batch's other micro-batches are kept with it."""
        if at not in self._batches:
            here = (at.round, at.step)
            kept = {k: v for k, v in self._batches.items() if (k.round, k.step) == here}
            purpose = (at.round, at.step, at.microbatch)
            rows = self.plan.indices(at)
            inputs, labels = self._fetch(rows, purpose)
            self._batches = kept | {at: (inputs, self.labels.leaving(labels, rows))}
        return self._batches[at]

    def _inputs_of(self, at: Position) -> Tensors:
        return self._batch(at)[0]

    # -- activations that leave before training ------------------------------------

    def _released(self, chunk: int, release: int) -> Reply:
        if self.session.options.head_trains:
            raise MessageError("the head trains: its activations leave step by step")
        outputs, labels = self.release.chunk(chunk, release)
        records = {ACTIVATIONS: encode_places(outputs)}
        if self.session.options.label_side == "trainer":
            records[LABELS] = encode_places((labels,))
        return {}, records

    # -- interactive head, and the tail of the U-shape -----------------------------

    def _stage(self, header: Header) -> Stage:
        index = header.get("segment", int)
        for stage in self.stages:
            if stage.segment.index == index:
                return stage
        raise MessageError(f"the owner does not train segment {index}")

    def _forward(self, header: Header, message: Message, *, persist: bool) -> Reply:
        stage, at = self._stage(header), position_of(header)
        stage.check(at)
        if stage.segment.index == 0:
            outputs = stage.forward(at, {}, persist=persist)
            records = {ACTIVATIONS: encode_places(outputs)}
            if self.session.options.label_side == "trainer":
                records[LABELS] = encode_places((self._batch(at)[1],))
            return {}, records
        what = f"segment {stage.segment.index}: activations at {at}"
        inputs = decode_places(array_record(message, ACTIVATIONS), what)
        labels = self._batch(at)[1]
        loss, gradients = stage.loss_backward(at, inputs, labels, self._loss, persist=persist)
        return {"loss": loss}, {GRADIENTS: encode_places(gradients)}

    def _backward(self, header: Header, message: Message, *, persist: bool) -> Reply:
        stage, at = self._stage(header), position_of(header)
        what = f"segment {stage.segment.index}: gradients at {at}"
        gradients = decode_places(array_record(message, GRADIENTS), what)
        stage.backward(at, gradients, persist=persist)
        return {}, {}

    def _loss(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return self.session.task.loss(outputs[0], labels)

    # -- delivery ----------------------------------------------------------------

    def _collect(self, header: Header, message: Message) -> Reply:
        """Check a trainer's segment and keep it until all have come."""
        index = header.get("segment", int)
        if not 1 <= index <= self.setup["trainers"]:
            raise MessageError(f"no trainer delivers segment {index}")
        weights = decode(array_record(message, WEIGHTS), f"segment {index}")
        found = digest(weights)
        if found != header.get("digest", str):
            raise DeliveryError(
                f"segment {index} did not arrive as trainer {index} sent it: its SHA-256 "
                "is not the one that the trainer gave"
            )
        load_weights(self.segments[index], weights, f"delivered segment {index}")
        check_finite(weights, f"segment {index} of trainer {index}")
        self.changes[f"delivered-{index}"] = weights
        if self.attestor is None:
            return {}, {}
        skipped = skip_reason(self.segments[index])
        return self.statements.collect(header, message, weights, found, skipped), {}

    def _evaluate(self, header: Header) -> Reply:
        """Assemble the model, save it, and measure it on the held-out set."""
        for index in range(1, self.setup["trainers"] + 1):
            weights = self.store.read(f"delivered-{index}")
            load_weights(self.segments[index], weights, f"delivered segment {index}")
        self.release.fit()
        model = self._assembled()
        check_finite(model.state_dict(), "the assembled model")
        folder = run_folder(self.session.options, self.session.context.run_id)
        path = save_model(model, folder, portable(self.session.config))
        batches = self._held_out_batches()
        device = self.session.device
        metrics = held_out_metrics(self.session.task, model, batches, device)
        privacy = self._privacy(self.release.store.made("activations"))
        fields = {**metrics, "model": str(path), "privacy": json.dumps(privacy)}
        if self.attestor is not None:
            fields["delivery"] = self.statements.deliver(header, path, metrics, privacy)
        return fields, {}
