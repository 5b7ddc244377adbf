"""Trainers that cheat in real training, and what catches each of them.

Three things may: the owner at delivery (or a neighbour before), which ends the run;
`verify_run`, from the run's files alone; and the audit, from what trainers open. Each test
lets the cheat pass as far as it gets, and says what stops it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from flwr_clicooper.chain import serve
from flwr_clicooper.chain.delivered import digest
from flwr_clicooper.chain.messages import WEIGHTS, Action, Header
from flwr_clicooper.chain.state import WorkerCache
from flwr_clicooper.chain.trainer import Trainer
from flwr_clicooper.chain.worker import Reply
from flwr_clicooper.errors import CooperError
from flwr_clicooper.grids.tensors import decode, encode
from flwr_clicooper.provenance.attestation import RoundStatement
from flwr_clicooper.provenance.audit import Point
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.verify import verify_run
from tests.chain.audited import EVERY, STEPS, WideTask, audit_one, wide_run

Weights = dict[str, Tensor]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Trainer]:
    """The trainers of the run, by stage."""
    monkeypatch.setattr(serve, "CACHE", WorkerCache())
    return {}


@pytest.fixture
def cheat(
    workers: dict[int, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Train with a cheater in one stage, or in all for 0; return the run's folder.

    Its evidence holds.
    """

    def run(kind: type[Trainer], stage: int = 1, trainers: int = 2, **options: Any) -> Path:

        def make(session: Any, store: Any, setup: Any) -> Trainer:
            cheats = stage in (0, setup["stage"])
            worker = (kind if cheats else Trainer)(session, store, setup)
            worker.others = workers  # type: ignore[attr-defined]
            workers[setup["stage"]] = worker
            return worker

        monkeypatch.setattr(serve, "Trainer", make)
        return wide_run(tmp_path, WideTask(trainers), trainers, **options)

    return run


def caught(run_dir: Path, task: WideTask, point: Point, what: str) -> None:
    """The owner took the segment and the evidence holds; the audit of these steps does not."""
    assert verify_run(run_dir).ok
    outcome = audit_one(run_dir, task, point)
    assert not outcome.passed
    assert what in outcome.what
    assert outcome.meaning
    honest = replace(point, segment=task.trainers if point.segment < task.trainers else 1)
    assert audit_one(run_dir, task, honest).passed


LAST = STEPS - STEPS % EVERY
"""The first of a round's last steps."""


# -- other weights than those that were trained ------------------------------------------


class Exchanging(Trainer):
    """Trains, and then puts other weights in the place of the trained ones."""

    marks = True

    def instead(self, round_: int) -> Weights:
        raise NotImplementedError

    def handle(self, action: Action, header: Header, message: Message) -> Reply:
        if action is Action.CLOSE_ROUND:
            weights, marking = self.instead(header.get("round", int)), self.marking
            complete = type(marking).complete

            def exchange() -> None:
                self.module.load_state_dict(weights or self.module.state_dict())
                if self.marks or not weights:
                    complete(marking)

            marking.complete = exchange  # type: ignore[method-assign]
        return super().handle(action, header, message)


class Stale(Exchanging):
    """Signs and delivers, after the last round, what the segment was after the first."""

    old: Weights

    def instead(self, round_: int) -> Weights:
        if round_ == 2:
            return self.old
        self.old = {k: v.clone() for k, v in self.module.state_dict().items()}
        return {}


class Random(Exchanging):
    """Signs and delivers weights that nobody trained."""

    def instead(self, round_: int) -> Weights:
        return {
            name: torch.randn_like(value) * value.std() if value.ndim > 1 else value
            for name, value in self.module.state_dict().items()
        }


class Copied(Exchanging):
    """Signs and delivers the segment of trainer 1, with which it colludes."""

    def instead(self, round_: int) -> Weights:
        others: Mapping[int, Trainer] = self.others  # type: ignore[attr-defined]
        return dict(others[1].module.state_dict())


WHERE = {Stale: (1, 2), Random: (1, 2), Copied: (2, 3)}
"""Who cheats, of how many trainers: a copy fits only among segments that are alike."""


@pytest.mark.parametrize("kind", WHERE)
def test_other_weights_with_a_watermark_of_their_own_are_for_the_audit(
    kind: type[Exchanging], cheat: Callable[..., Path]
) -> None:
    stage, trainers = WHERE[kind]
    run_dir = cheat(kind, stage, trainers)
    what = f"segment {stage} after round 2 is not what its last steps and its watermark give"
    caught(run_dir, WideTask(trainers), Point(stage, 2, LAST), what)


@pytest.mark.parametrize("kind", WHERE)
def test_without_the_watermark_the_owner_does_not_take_them(
    kind: type[Exchanging], cheat: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "marks", False)
    what = r"segment (\d) does not carry trainer \1's watermark"
    with pytest.raises(CooperError, match=what):
        cheat(kind, *WHERE[kind])


def test_other_weights_than_those_that_were_signed_the_owner_does_not_take(
    cheat: Callable[..., Path],
) -> None:
    class Delivering(Stale):
        def handle(self, action: Action, header: Header, message: Message) -> Reply:
            if action is not Action.DELIVER:
                return Trainer.handle(self, action, header, message)
            _, records = super().handle(action, header, message)
            weights = {k: v + 1 for k, v in self.module.state_dict().items()}
            return {"digest": digest(weights)}, {**records, WEIGHTS: encode(weights)}

    with pytest.raises(CooperError, match="segment 1 is not the one that trainer 1 signed"):
        cheat(Delivering)


# -- other steps than those that were agreed on ------------------------------------------


class Stepping(Trainer):
    """Answers every message, and steps in a way of its own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made = 0
        self.honest_step = self.stage.segment.step
        self.stage.segment.step = self.own_step  # type: ignore[method-assign]

    def own_step(self, lr_factor: float) -> None:
        raise NotImplementedError

    def no_step(self) -> None:
        assert self.stage.segment.optimizer is not None
        self.stage.segment.optimizer.zero_grad()


class Halving(Stepping):
    """Skips every second optimizer step, and says that it made it."""

    def own_step(self, lr_factor: float) -> None:
        self.made += 1
        if self.made % 2:
            self.honest_step(lr_factor)
        else:
            self.no_step()


class Counting(Halving):
    """Skips every second optimizer step, and says so."""

    def own_step(self, lr_factor: float) -> None:
        super().own_step(lr_factor)
        if self.made % 2 == 0:
            self.stage.steps -= 1


class Marking(Stepping):
    """Makes no step at all; its segment carries the watermark at the end of each round."""

    def own_step(self, lr_factor: float) -> None:
        self.no_step()


class Adding(Stepping):
    """Takes a step on data of its own after each that was agreed on."""

    def own_step(self, lr_factor: float) -> None:
        self.honest_step(lr_factor)
        with torch.random.fork_rng():
            own = torch.randn(12, *self.stage.incoming[0].shape)
            self.module(own).square().mean().backward()
        self.honest_step(lr_factor)


class Slow(Trainer):
    """Has an optimizer with another learning rate."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.stage.segment.optimizer is not None
        self.stage.segment.optimizer.param_groups[0]["lr"] = 0.001


class SecretlySlow(Stepping):
    """Steps with another learning rate than its optimizer says afterwards."""

    def own_step(self, lr_factor: float) -> None:
        self.honest_step(lr_factor / 50)
        assert self.stage.segment.optimizer is not None
        for group in self.stage.segment.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor


class Pushing(Trainer):
    """Puts into its optimizer's momentum, between two rounds, where it wants to get."""

    def _attest(self, header: Header) -> dict[str, Any]:
        signed = super()._attest(header)
        assert self.stage.segment.optimizer is not None
        for state in self.stage.segment.optimizer.state.values():
            state["momentum_buffer"].mul_(-3)
        return signed


class Hiding(Trainer):
    """Begins with a momentum that it brought along."""

    def _agree(self, header: Header) -> dict[str, Any]:
        optimizer = self.stage.segment.optimizer
        assert optimizer is not None
        for parameter in self.module.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
        return super()._agree(header)


class Babbling(Trainer):
    """Trains as agreed, and gives the next trainer something else than it computed."""

    def _forward(self, at: Any, message: Message, *, persist: bool) -> Reply:
        fields, records = super()._forward(at, message, persist=persist)
        told = {name: decode(record, name) for name, record in records.items()}
        return fields, {
            name: encode({place: value * 0.9 for place, value in tensors.items()})
            for name, tensors in told.items()
        }


NOT_GIVEN = "the state after step 2 is not what these inputs and the agreed learning rate give"


@pytest.mark.parametrize(
    ("kind", "point", "what"),
    [
        (Halving, Point(1, 1, 0), NOT_GIVEN),
        (Marking, Point(1, 1, 0), NOT_GIVEN),
        (Adding, Point(1, 1, 0), NOT_GIVEN),
        (SecretlySlow, Point(1, 1, 0), NOT_GIVEN),
        (Slow, Point(1, 1, 0), "'lr' is 0.001, not 0.05"),
        (
            Slow,
            Point(1, 2, EVERY),
            "before step 3 the optimizer of trainer 1 has other settings than agreed",
        ),
        (Pushing, Point(1, 2, 0), "does not begin with the optimizer's state"),
        (Hiding, Point(1, 1, 0), "round 1 of segment 1 does not begin with the optimizer's"),
        (Babbling, Point(1, 1, EVERY), "activations-out at step 3, micro-batch 0 is not"),
    ],
)
def test_steps_that_were_not_agreed_on_are_for_the_audit(
    kind: type[Trainer], point: Point, what: str, cheat: Callable[..., Path]
) -> None:
    caught(cheat(kind), WideTask(2), point, what)


def test_trainers_that_all_sign_steps_that_nobody_made_are_for_the_audit(
    cheat: Callable[..., Path],
) -> None:
    run_dir = cheat(Marking, stage=0)
    assert verify_run(run_dir).ok
    for segment in (1, 2):
        outcome = audit_one(run_dir, WideTask(2), Point(segment, 1, 0))
        assert (outcome.passed, NOT_GIVEN in outcome.what) == (False, True)


def test_steps_that_were_not_made_are_seen_in_the_statement(
    cheat: Callable[..., Path],
) -> None:
    with pytest.raises(AssertionError, match="steps and records") as found:
        cheat(Counting)
    assert "4 steps on 96 records; the job says 8" in str(found.value)


# -- somebody else's work ------------------------------------------------------------------


class Copying(Trainer):
    """Signs its predecessor's statement of the first round as its own."""

    kept_roots = False

    def _attest(self, header: Header) -> dict[str, Any]:
        signed = super()._attest(header)
        if header.get("round", int) > 1:
            return signed
        payload = Envelope.from_json(header.get("predecessor", str)).payload
        return {"statement": Envelope.sign(payload, self.statements.identity).to_json()}


class Retelling(Trainer):
    """Says of itself, in the first round, what its predecessor says of itself."""

    def _attest(self, header: Header) -> dict[str, Any]:
        signed = super()._attest(header)
        if header.get("round", int) > 1:
            return signed
        own = RoundStatement.parse(self.statements.kept.previous.encode())
        theirs = RoundStatement.parse(
            Envelope.from_json(header.get("predecessor", str)).payload
        )
        told = replace(own, roots=theirs.roots, subject=theirs.subject)
        self.statements.kept.previous = told.payload().decode()
        envelope = Envelope.sign(told.payload(), self.statements.identity)
        return {"statement": envelope.to_json()}


def test_the_next_trainer_does_not_go_on_from_a_copied_statement(
    cheat: Callable[..., Path],
) -> None:
    with pytest.raises(CooperError, match=r"trainer 3 .*not the one on segment 2 after"):
        cheat(Copying, 2, 3)


def test_the_next_trainer_does_not_go_on_from_a_retold_statement(
    cheat: Callable[..., Path],
) -> None:
    with pytest.raises(CooperError, match=r"trainer 2 signed other activations-out than"):
        cheat(Retelling, 2, 3)


def test_a_copied_statement_of_the_last_trainer_is_seen_by_the_owner(
    cheat: Callable[..., Path],
) -> None:
    with pytest.raises(CooperError, match="are not its last ones"):
        cheat(Copying, 2)


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        (Copying, {"complete", "order", "signatures", "chain in time"}),
        (Retelling, {"streams", "owner's streams"}),
    ],
)
def test_without_watermarks_verifying_sees_it(
    kind: type[Trainer], checks: set[str], cheat: Callable[..., Path]
) -> None:
    with pytest.raises(AssertionError) as found:
        cheat(kind, 2, watermark=False)
    for name in checks:
        assert f"name={name!r}" in str(found.value) or f'name="{name}"' in str(found.value)
