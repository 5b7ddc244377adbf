"""The phases of a run: set-up, rounds, delivery, and the end."""

from __future__ import annotations

import json
import time
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from flwr_clicooper.chain.checkpoint import Checkpoint
from flwr_clicooper.chain.messages import (
    ESCROW,
    IDENTITY,
    INTRODUCTION,
    INTRODUCTIONS,
    WEIGHTS,
    Action,
    Header,
)
from flwr_clicooper.chain.notary import Notary, Terms
from flwr_clicooper.chain.pipeline import Pipeline, Seat
from flwr_clicooper.chain.progress import StepProgress, size
from flwr_clicooper.chain.relay import Records, Relay, required
from flwr_clicooper.chain.roster import Roster, find_owner
from flwr_clicooper.chain.rundir import RunFolder
from flwr_clicooper.chain.spent import Spent
from flwr_clicooper.chain.transfers import Transfers
from flwr_clicooper.grids.live import LiveGrid
from flwr_clicooper.options import Options
from flwr_clicooper.split.batches import BatchPlan

_GOODBYE = 5.0
"""Seconds to wait for a party to clean up after a failed run."""


class ChainRun:
    """One run of a chain, driven from the relay.

    Parameters
    ----------
    grid : Grid
        Any Flower grid.
    options : Options
        The run's options.
    roster : Roster
        Who is who.
    folder : RunFolder
        Where to write what happens.
    notary : Notary, optional
        Collects what the parties sign, with the option `attest`.
    """

    def __init__(
        self,
        grid: Grid,
        options: Options,
        roster: Roster,
        folder: RunFolder,
        notary: Notary | None = None,
    ) -> None:
        self.grid = grid
        self.options = options
        self.folder = folder
        self.notary = notary
        self.checkpoint = Checkpoint(folder.path)
        self.rounds = options.num_rounds
        self.roster = roster
        self.owner = roster.owner
        self.trainers = [roster.trainers[stage] for stage in sorted(roster.trainers)]
        self.standbys = roster.standbys
        self.names = roster.names()
        self.relay = Relay(grid, self.names, options.timeout)
        self.seats = self._seats()
        self.progress: StepProgress | None = None
        self.privacy: dict[str, Any] = {}
        self.spent = Spent(self.relay.traffic)

    def _seats(self) -> list[Seat]:
        seats = [Seat(stage, node) for stage, node in enumerate(self.trainers, start=1)]
        if self.options.head_trains:
            seats.insert(0, Seat(0, self.owner))
        if self.options.label_side == "owner":
            seats.append(Seat(len(self.trainers) + 1, self.owner))
        return seats

    # -- set-up ------------------------------------------------------------------

    def set_up(self, initial_arrays: ArrayRecord | None, start: Checkpoint) -> None:
        """Let every party build and check its part, the owner first.

        With a closed round in ``start``, everybody goes on from there.
        """
        self._common = {
            "trainers": len(self.trainers),
            "rounds": self.rounds,
            "options": json.dumps(self.options.agreed()),
            **_resume_fields(start),
        }
        self._initial = initial_arrays
        facts = self._set_up_owner()
        self.records = facts.get("records", int)
        chunks = -(-self.records // facts.get("chunk-records", int))
        self.transfers = Transfers(self.relay, self.options, self.owner, self.trainers, chunks)
        self._state_privacy(facts)
        options = self.options
        self.plan = BatchPlan(
            self.records,
            options.batch_size,
            options.microbatches,
            options.seed,
            options.shuffle,
        )
        cuts = [facts.texts(f"cut-{i}") for i in range(facts.get("segments", int))]
        held_out = facts.get("held-out-records", int)
        log(INFO, "The chain: %d training and %d held-out records", self.records, held_out)
        log(INFO, "\t%s: head, gives %s", self.relay.names[self.owner], " and ".join(cuts[0]))
        said = [facts, *self._set_up_trainers(facts, cuts)]
        self._introduce([each.optional(INTRODUCTION, "") for each in said])
        if start.round:
            self._restore(start)
        if self.notary is not None:
            initial, nonce = facts.texts("initial"), facts.get("nonce", str)
            privacy, keys = self.privacy, [each.get(IDENTITY, str) for each in said]
            terms = Terms(start.round, self.records, cuts, initial, nonce, privacy, keys)
            self.notary.agree(self.relay, self.owner, self.trainers, terms)
        if self.options.label_side == "trainer":
            takers = ", ".join(self.relay.names[n] for n in self.transfers.label_takers)
            log(INFO, "\tlabels go to %s", takers)
        if self.standbys:
            log(INFO, "\tstandby: %s", ", ".join(f"node {n}" for n in self.standbys))
        self.folder.parties(
            {
                "owner": str(self.owner),
                "trainers": [str(n) for n in self.trainers],
                "standbys": [str(n) for n in self.standbys],
            }
        )

    def _set_up_trainers(self, facts: Header, cuts: list[list[str]]) -> list[Header]:
        """Set the trainers up, in order; return what they say."""
        said = []
        for stage, node_id in enumerate(self.trainers, start=1):
            fields: dict[str, Any] = {
                **self._common,
                "stage": stage,
                "records": self.records,
                "chunk-records": facts.get("chunk-records", int),
                "incoming": cuts[stage - 1],
                "outgoing": cuts[stage],
                "labels": facts.get("labels", str),
                "scores": cuts[-1][0],
            }
            weights = _initial(self._initial, stage)
            reply, _ = self.relay.ask(node_id, Action.SETUP, fields, weights, persist=True)
            said.append(reply)
            log(
                INFO,
                "\t%s: segment %d, %s parameters, gives %s",
                self.relay.names[node_id],
                stage,
                f"{reply.get('parameters', int):,}",
                " and ".join(cuts[stage]),
            )
        return said

    def _introduce(self, introductions: list[str]) -> None:
        """Bring every party the keys of the others."""
        self._introductions = introductions
        if self.options.seal:
            everyone = [self.owner, *self.trainers]
            self.relay.ask_all(everyone, Action.MEET, {INTRODUCTIONS: introductions})

    def _restore(self, start: Checkpoint) -> None:
        """Give every trainer what its segment was after the last closed round.

        It was sealed for the owner, which seals it anew for who goes on with it.
        """
        for stage, node_id in enumerate(self.trainers, start=1):
            records = {ESCROW: start.part(stage)}
            fields = {"segment": stage, "round": start.round, **_resume_fields(start)}
            if self.options.seal:
                _, given = self.relay.ask(
                    self.owner, Action.RESEAL, fields, records, persist=True
                )
                records = {ESCROW: required(given, ESCROW, self.names[self.owner])}
            self.relay.ask(node_id, Action.RESTORE, fields, records, persist=True)

    def _state_privacy(self, said: Header) -> None:
        """Keep what the owner says that the run guarantees."""
        self.privacy = json.loads(said.get("privacy", str))
        self.folder.write_privacy(self.privacy)

    def _set_up_owner(self, **more: int) -> Header:
        """Set the owner up; return what it says of its data and of the model."""
        weights = {} if self._initial is None else {WEIGHTS: self._initial}
        facts, _ = self.relay.ask(
            self.owner, Action.SETUP, self._common | more, weights, persist=True
        )
        return facts

    # -- training ----------------------------------------------------------------

    def train_round(self, round_: int) -> dict[str, float]:
        """Train one epoch; return its metrics."""
        started = time.monotonic()
        self.spent.begin()
        train = self._local_round if self.options.schedule == "local" else self._lockstep_round
        loss = train(round_)
        self._close(round_)
        seconds = time.monotonic() - started
        metrics = {
            "loss": loss,
            "seconds": seconds,
            "samples-per-second": self.records / seconds,
        }
        traffic = self.relay.traffic
        self.folder.note(
            "round",
            round=round_,
            **metrics,
            messages=traffic.messages,
            redials=self.grid.redials() if isinstance(self.grid, LiveGrid) else 0,
            link_bytes=dict(traffic.link_bytes),
            parties=self.spent.end(seconds),
        )
        return metrics

    def _close(self, round_: int) -> None:
        """Let all that train store their state; keep what the trainers escrow."""
        everyone = sorted({seat.node_id for seat in self.seats})
        replies = self.relay.ask_all(everyone, Action.CLOSE_ROUND, {"round": round_})
        parts = {}
        for stage, node_id in enumerate(self.trainers, start=1):
            _, records = replies[node_id]
            parts[stage] = required(records, ESCROW, self.relay.names[node_id])
        if self.notary is not None:
            self.notary.close_round(self.relay, self.trainers, round_)
        self.checkpoint.close(round_, parts)

    def _lockstep_round(self, round_: int) -> float:
        pipeline = Pipeline(self.relay, self.seats, self.options.pipeline)
        if self.progress is None:
            self.progress = StepProgress(self.rounds, self.plan.steps, round_ - 1)
        total = 0.0
        for step in range(self.plan.steps):
            started, traffic = time.monotonic(), self.relay.traffic
            messages, sent = traffic.messages, traffic.total_bytes
            loss = pipeline.step(round_, step, self.plan.parts(step))
            records = self.plan.batch_records(step)
            total += loss * records
            self.folder.note(
                "step",
                round=round_,
                step=step,
                loss=loss,
                seconds=time.monotonic() - started,
                messages=traffic.messages - messages,
                bytes=traffic.total_bytes - sent,
            )
            self.progress.step(round_, step, loss, records, traffic.total_bytes)
        if round_ == self.rounds:
            self.progress.close()
        return total / self.records

    def _local_round(self, round_: int) -> float:
        """Each trainer trains an epoch, then hands its outputs to the next."""
        loss = 0.0
        for stage, node_id in enumerate(self.trainers, start=1):
            reply, _ = self.relay.ask(
                node_id, Action.LOCAL_EPOCH, {"round": round_}, persist=True
            )
            loss = reply.get("loss", float)
            log(
                INFO,
                "round %d/%d  trainer %d  loss %.4f  %s sent",
                round_,
                self.rounds,
                stage,
                loss,
                size(self.relay.traffic.total_bytes),
            )
            if stage < len(self.trainers):
                self.transfers.hand_over(round_, node_id, self.trainers[stage])
        return loss

    # -- delivery and the end ------------------------------------------------------

    def deliver(self) -> tuple[dict[str, float], str]:
        """Bring every segment to the owner, who assembles, measures and saves the model.

        Returns
        -------
        metrics : dict of str to float
            Held-out loss and, where the task has it, accuracy.
        model : str
            Path of the model on the owner's machine.
        """
        self._await_owner()
        for stage, node_id in enumerate(self.trainers, start=1):
            header, given = self.relay.ask(node_id, Action.DELIVER, {})
            weights = required(given, WEIGHTS, self.relay.names[node_id])
            self.relay.count(node_id, self.owner, weights)
            fields = {"segment": stage, "digest": header.get("digest", str)}
            if self.notary is not None:
                fields |= self.notary.for_collection(stage)
            taken, _ = self.relay.ask(self.owner, Action.COLLECT, fields, given, persist=True)
            if self.notary is not None:
                self.notary.countersigned(stage, taken)
        fields = self.notary.shown_to(self.owner) if self.notary else {}
        header, _ = self.relay.ask(self.owner, Action.EVALUATE, fields)
        if self.notary is not None:
            self.notary.delivered(header)
        metrics = {
            name: header.get(name, float) for name in ("accuracy", "loss") if name in header
        }
        self._state_privacy(header)
        self.folder.note("delivery", **metrics)
        return metrics, header.get("model", str)

    def _await_owner(self) -> None:
        """Wait until the owner is there: it may have gone offline after its release.

        An owner that comes back as another node is set up anew; its head never trained.
        """
        if any(seat.node_id == self.owner for seat in self.seats):
            return
        found = find_owner(self.grid, self.roster, self.options.owner_timeout)
        if found == self.owner:
            return
        log(INFO, "The owner is back as node %d", found)
        self.folder.note("owner-back", was=self.owner, now=found)
        was, self.owner = self.owner, found
        self.names[found] = f"owner (node {found})"
        facts = self._set_up_owner(replaces=was)
        self._introduce([facts.optional(INTRODUCTION, ""), *self._introductions[1:]])
        if self.notary is not None:
            self.notary.agree_again(self.relay, self.owner)

    def finish(self) -> None:
        """Let every party delete its state of the run.

        The model is delivered, so a party that cannot is a warning, not a failure.
        """
        for node_id in [self.owner, *self.trainers]:
            self._say_goodbye(node_id, self.relay.exchange.timeout, delivered=True)
        self.checkpoint.delete()

    def abandon(self) -> None:
        """After a failure: let every party that still answers delete its state."""
        if self.progress is not None:
            self.progress.close()
        self.relay.drain(_GOODBYE)  # who still works would write its state again
        for node_id in [self.owner, *self.trainers]:
            self._say_goodbye(node_id, _GOODBYE, delivered=False)

    def _say_goodbye(self, node_id: int, timeout: float, *, delivered: bool) -> None:
        try:
            relay = Relay(self.grid, self.relay.names, timeout)
            relay.ask(node_id, Action.FINISH, {"delivered": delivered})
        except Exception as error:  # nothing here may hide how the run itself ended
            log(WARNING, "%s may have kept its state: %s", self.relay.names[node_id], error)


def _resume_fields(start: Checkpoint) -> dict[str, str | int]:
    if not start.round:
        return {}
    return {"resume-run": start.run_id, "resume-round": start.round}


def _initial(arrays: ArrayRecord | None, segment: int) -> Records:
    """Return the initial weights of a segment, if they were given."""
    named = {} if arrays is None else dict(arrays.items())
    wanted = {k: v for k, v in named.items() if k.split(".", 1)[0] == str(segment)}
    return {WEIGHTS: ArrayRecord(wanted)} if wanted else {}
