"""What owner and trainer have in common: a node in a run, its stages and its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message
from torch import nn

from flwr_clicooper.chain.attestor import STREAMS, Attestor
from flwr_clicooper.chain.build import build_optimizer, device_of
from flwr_clicooper.chain.messages import WEIGHTS, Action, Header
from flwr_clicooper.chain.roles import Role, role_of, state_folder
from flwr_clicooper.chain.stage import Changes, Refetch, Stage
from flwr_clicooper.chain.state import StateStore
from flwr_clicooper.grids.tensors import decode
from flwr_clicooper.options import TASK_PREFIX, Options, task_config
from flwr_clicooper.split.batches import BatchPlan, Position
from flwr_clicooper.split.modules import keeping_modes
from flwr_clicooper.split.segment import Segment
from flwr_clicooper.split.specs import Tensors, TensorSpec, as_tensors
from flwr_clicooper.task import SplitTask

Reply = tuple[dict[str, Any], dict[str, ArrayRecord]]


@dataclass(frozen=True)
class Session:
    """A node in a run: the task, its configs, and where its files are."""

    task: SplitTask
    context: Context
    options: Options
    config: dict[str, Any]
    role: Role
    device: torch.device

    @classmethod
    def of(cls, task: SplitTask, context: Context) -> Session:
        """Return the session of a context.

        Raises
        ------
        OptionError, RoleError
            An option of the run or the node is not allowed.
        """
        return cls(
            task,
            context,
            Options.from_config(context.run_config),
            task_config(context.run_config, context.node_config),
            role_of(context.node_config),
            device_of(context.node_config),
        )

    @property
    def key(self) -> tuple[int, int]:
        """What the process cache knows this node by."""
        return self.context.run_id, self.context.node_id

    def store(self, run_id: int | str = "", node_id: int = 0) -> StateStore:
        """Return the node's state on disk; or that of another run, or of an earlier node."""
        run_id, node_id = run_id or self.context.run_id, node_id or self.context.node_id
        return StateStore(state_folder(self.options, self.context, run_id, node_id))

    def batch_plan(self, records: int) -> BatchPlan:
        """Return the public order of the run's batches."""
        o = self.options
        return BatchPlan(records, o.batch_size, o.microbatches, o.seed, o.shuffle)


class Worker(ABC):
    """A party of the chain, alive in this process.

    Parameters
    ----------
    session : Session
        The node and the run.
    store : StateStore
        The node's files.
    setup : dict
        What the relay said at setup, as JSON values.
    """

    def __init__(self, session: Session, store: StateStore, setup: dict[str, Any]) -> None:
        self.session = session
        self.store = store
        self.setup = setup
        self.stages: list[Stage] = []
        self.plan: BatchPlan
        self.changes: Changes = {}
        self.attestor: Attestor | None = None

    @abstractmethod
    def handle(self, action: Action, header: Header, message: Message) -> Reply:
        """Answer one message."""

    @abstractmethod
    def start(self, message: Message) -> Reply:
        """Check and build everything at setup; the first state is stored after it."""

    def agreed(self) -> dict[str, Any]:
        """Return what the job must say, as this party knows it, by field."""
        own = self.session.context.run_config.items()
        return {
            "options": self.session.options.agreed(),
            "task": {k: v for k, v in own if k.startswith(TASK_PREFIX)},
            "rounds": self.setup["rounds"],
            "records": self.plan.records,
        }

    def facts(self) -> dict[str, Any]:
        """Return what the state's manifest keeps."""
        facts: dict[str, Any] = {"setup": self.setup}
        for stage in self.stages:
            facts |= stage.facts()
        if self.attestor is not None:
            facts |= self.attestor.facts()
        return facts

    def outputs_of(self, module: nn.Module, inputs: Tensors) -> Tensors:
        """Return what a module gives in eval mode, computed batch by batch, on the CPU."""
        size, device = self.session.options.batch_size, self.session.device
        module = module.to(device)
        parts = []
        with torch.no_grad(), keeping_modes(module):
            module.eval()
            for start in range(0, len(inputs[0]), size):
                rows = [x[start : start + size].to(device) for x in inputs]
                given = as_tensors(module(*rows), type(module).__name__)
                parts.append([output.cpu() for output in given])
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def make_stage(
        self,
        module: nn.Module,
        index: int,
        cut: tuple[list[TensorSpec], list[TensorSpec]],
        *,
        refetch: Refetch | None = None,
    ) -> Stage:
        """Return a trainable segment on this node's device, in its place.

        Parameters
        ----------
        cut : (list of TensorSpec, list of TensorSpec)
            What crosses the cuts before and after it.
        refetch : callable, optional
            Where the inputs come from when no message brings them; nobody before it then
            wants gradients.
        """
        session = self.session
        module = module.to(session.device)
        optimizer = build_optimizer(session.task, module, session.config)
        seed, device = session.options.seed, session.device
        segment = Segment(module, optimizer, index=index, seed=seed, device=device)
        return Stage(
            segment,
            self.plan,
            *cut,
            giver=f"segment {index - 1}" if index else "the data set",
            input_grads=refetch is None,
            lr_factor=self.lr_factor,
            refetch=refetch,
        )

    def lr_factor(self, at: Position) -> float:
        """Return the task's multiple of the learning rate at a position."""
        progress = self.plan.progress(at, self.setup["rounds"])
        return self.session.task.lr_factor(progress, self.session.config)

    def load(self) -> None:
        """Set the stages to what the store has."""
        manifest = self.store.manifest
        for stage in self.stages:
            stage.load(self.store, manifest.facts)
        if self.attestor is not None:
            parts = [part for part in manifest.parts if part.startswith(STREAMS)]
            self.attestor.load(manifest.facts, {p: self.store.read(p) for p in parts})

    def commit(self, version: int, *, durable: bool) -> None:
        """Write what changed."""
        changes, self.changes = self.changes, {}
        for stage in self.stages:
            changes |= stage.take_changes()
        if self.attestor is not None:
            changes |= self.attestor.take_changes()
        self.store.commit(version, changes, self.facts(), durable=durable)


def initial_weights(message: Message) -> Mapping[str, torch.Tensor]:
    """Return the weights that a setup message brings, if any."""
    records = message.content.array_records
    return decode(records[WEIGHTS], "initial weights") if WEIGHTS in records else {}
