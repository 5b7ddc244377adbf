"""A segment built once more, to repeat steps of its training as the job says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flwr_clicooper.chain.build import build_optimizer, build_segments, trainers_for
from flwr_clicooper.chain.marking import Marking
from flwr_clicooper.chain.records import check_labels
from flwr_clicooper.chain.stage import OPTIMIZER_REST, Stage, parse_specs
from flwr_clicooper.errors import EvidenceError, SplitError
from flwr_clicooper.options import Options, task_config
from flwr_clicooper.provenance.attestation import Job
from flwr_clicooper.split.batches import BatchPlan, Position
from flwr_clicooper.split.segment import Segment
from flwr_clicooper.split.specs import Tensors
from flwr_clicooper.task import SplitTask

Given = tuple[str, Position, Mapping[int, Tensor]]
"""A stream, where in it, and what a step gave there, by place."""


@dataclass(frozen=True)
class Source:
    """Where the tensors of a micro-batch come from."""

    inputs: Callable[[Position], Tensors]
    gradients: Callable[[Position], dict[int, Tensor]]
    labels: Callable[[Position], Tensor]


class Repetition:
    """One trainer's segment, optimizer and order of batches.

    All of it follows from the task and the job; of the evidence come only tensors.

    Parameters
    ----------
    task : SplitTask
        The verifier's own copy of the run's task.
    job : Job
        What all parties agreed on.
    index : int
        The segment.

    Raises
    ------
    SplitError
        The task is not that of the job.
    OptionError
        The job's options are none.
    """

    def __init__(self, task: SplitTask, job: Job, index: int) -> None:
        given = {**job.options, **job.task, "num-rounds": job.rounds}
        self.options = options = Options.from_config(given)
        self.config = task_config(given, {})
        self.task = task
        segments = build_segments(task, self.config)
        trainers = trainers_for(segments, self.config)
        if trainers != job.trainers:
            raise SplitError(
                f"{type(task).__name__} has segments for {trainers} trainers, the job has "
                f"{job.trainers}: it is not the run's task"
            )
        self.module = segments[index]
        self.plan = plan = BatchPlan(
            job.records,
            options.batch_size,
            options.microbatches,
            options.seed,
            options.shuffle,
        )
        self.rounds = job.rounds
        self.last = index == job.trainers and options.label_side == "trainer"
        stored = index == 1 and not options.head_trains
        chunked = {"activations-in": stored, "labels-in": not options.head_trains}
        self.uploaded = {stream for stream, whole in chunked.items() if whole}
        (self.scores,) = parse_specs(job.cuts[-1])
        optimizer = build_optimizer(task, self.module, self.config)
        self.stage = Stage(
            Segment(self.module, optimizer, index=index, seed=options.seed),
            plan,
            parse_specs(job.cuts[index - 1]),
            parse_specs(job.cuts[index]),
            giver=f"segment {index - 1}",
            input_grads=not stored,
            lr_factor=self._lr_factor,
        )
        self.marking = Marking(self.module, wanted=options.watermark)
        self.stage.before_step = self.marking.before_step
        self.fresh = {name: tensor.clone() for name, tensor in self.stage.escrow().items()}

    def settings(self, state: Mapping[str, Tensor]) -> Any:
        """Return the settings of the optimizer in a state, one per parameter group.

        Raises
        ------
        EvidenceError
            The state has none.
        """
        try:
            rest = json.loads(bytes(state[OPTIMIZER_REST].numpy()))
            return rest and rest["param_groups"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise EvidenceError("the state has no settings of an optimizer") from None

    def agreed_settings(self, round_: int, step: int) -> Any:
        """Return the settings that the optimizer must have before a step."""
        groups = self.settings(self.fresh)
        done = (round_ - 1) * self.plan.steps + step
        if not groups or not done:
            return groups
        before = Position((done - 1) // self.plan.steps + 1, (done - 1) % self.plan.steps, 0)
        factor = self._lr_factor(before)
        return [
            {**group, "initial_lr": group["lr"], "lr": group["lr"] * factor}
            for group in groups
        ]

    def step(self, source: Source, round_: int, step: int) -> Iterator[Given]:
        """Repeat one optimizer step; yield what the segment gives to its neighbours."""
        stage = self.stage
        for microbatch in range(self.plan.parts(step)):
            at = Position(round_, step, microbatch)
            inputs = dict(enumerate(source.inputs(at)))
            if self.last:
                labels = self._checked(source.labels(at))
                _, back = stage.loss_backward(at, inputs, labels, self._loss, persist=False)
            else:
                outputs = stage.forward(at, inputs, persist=False)
                yield "activations-out", at, dict(enumerate(outputs))
                back = stage.backward(at, source.gradients(at), persist=False)
            if stage.input_grads:
                yield "gradients-out", at, back

    def _lr_factor(self, at: Position) -> float:
        return self.task.lr_factor(self.plan.progress(at, self.rounds), self.config)

    def _loss(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return self.task.loss(outputs[0], labels)

    def _checked(self, labels: Tensor) -> Tensor:
        """Return labels as a trainer uses them."""
        if self.options.head_trains and self.task.classifies:
            return check_labels(labels, self.scores, "opened")
        return labels
