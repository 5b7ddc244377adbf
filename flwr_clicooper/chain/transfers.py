"""Chunks of activations and labels on their way: the release, and outputs between trainers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import INFO
from typing import Any

from flwr.common.logger import log

from flwr_clicooper.chain.messages import ACTIVATIONS, LABELS, Action
from flwr_clicooper.chain.progress import size
from flwr_clicooper.chain.relay import Records, Relay, required, short
from flwr_clicooper.chain.sealing import for_taker
from flwr_clicooper.options import Options


@dataclass
class Transfers:
    """Brings whole sets of activations from one party to another, a chunk at a time.

    Attributes
    ----------
    relay : Relay
        Who sends.
    options : Options
        The run's options.
    owner : int
        The owner's node.
    trainers : list of int
        The trainers' nodes, in order.
    chunks : int
        Messages that a whole set takes.
    """

    relay: Relay
    options: Options
    owner: int
    trainers: list[int]
    chunks: int

    @property
    def label_takers(self) -> list[int]:
        """Who gets the labels: the last trainer, or all when each trains alone."""
        return self.trainers if self.options.schedule == "local" else self.trainers[-1:]

    def release(self, release: int = 0) -> None:
        """Bring the owner's activations to trainer 1 and its labels to who needs them.

        Parameters
        ----------
        release : int
            The round that a fresh release is for; 0 for the only one.
        """
        started = time.monotonic()
        owned = self.options.label_side == "owner"
        for chunk in range(self.chunks):
            fields = {"chunk": chunk, "release": release}
            _, given = self.relay.ask(self.owner, Action.RELEASE, fields)
            activations = required(given, ACTIVATIONS, self.relay.names[self.owner])
            self._upload(self.owner, self.trainers[0], fields, {ACTIVATIONS: activations})
            if not owned:
                self._upload_labels(given, fields)
        seconds, total = time.monotonic() - started, size(self.relay.traffic.total_bytes)
        if release:
            log(INFO, "Released for round %d in %.1f s; %s so far", release, seconds, total)
            return
        after = "stays for the loss" if owned else "may go offline until delivery"
        log(INFO, "Released once: %s in %.1f s. The owner %s.", total, seconds, after)

    def hand_over(self, round_: int, giver: int, taker: int) -> None:
        """Bring what a trained segment gives to the next trainer."""
        for chunk in range(self.chunks):
            fields = {"round": round_, "chunk": chunk}
            _, given = self.relay.ask(giver, Action.OUTPUTS, fields)
            outputs = required(given, ACTIVATIONS, self.relay.names[giver])
            self._upload(giver, taker, fields, {ACTIVATIONS: outputs})

    def _upload_labels(self, given: Records, fields: Mapping[str, Any]) -> None:
        """Send the labels to all that need them; sealed, each gets its own."""
        for taker in self.label_takers:
            name = for_taker(LABELS, short(self.relay.names[taker]))
            labels = given.get(name) or required(given, LABELS, self.relay.names[self.owner])
            self._upload(self.owner, taker, fields, {LABELS: labels})

    def _upload(
        self, giver: int, taker: int, fields: Mapping[str, Any], records: Records
    ) -> None:
        for record in records.values():
            self.relay.count(giver, taker, record)
        self.relay.ask(taker, Action.UPLOAD, fields, records, persist=True)
