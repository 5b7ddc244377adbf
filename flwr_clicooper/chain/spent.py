"""How each party spent training: computing, on the link, or waiting for the others."""

from __future__ import annotations

from collections import Counter

from flwr_clicooper.chain.relay import Traffic


class Spent:
    """Seconds of the rounds, by party.

    Parameters
    ----------
    traffic : Traffic
        What the relay counts.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._before: dict[str, tuple[float, float]] = {}
        self._total: dict[str, Counter[str]] = {}

    def begin(self) -> None:
        """Note that a round begins."""
        traffic = self._traffic
        self._before = {p: (traffic.compute[p], traffic.asked[p]) for p in traffic.asked}

    def end(self, seconds: float) -> dict[str, dict[str, float]]:
        """Return how the parties that were asked something spent the round.

        ``computing`` is in their handlers, ``link`` is the rest of the time from request
        to reply, ``waiting`` is the rest of the round.
        """
        found = {}
        for party, asked in self._traffic.asked.items():
            compute_before, asked_before = self._before.get(party, (0.0, 0.0))
            away = asked - asked_before
            computing = self._traffic.compute[party] - compute_before
            if away:
                spent = {
                    "computing": computing,
                    "link": away - computing,
                    "waiting": max(0.0, seconds - away),
                }
                found[party] = spent
                self._total.setdefault(party, Counter()).update(spent)
        return found

    def shares(self) -> dict[str, dict[str, float]]:
        """Return the share of all rounds that each party computed, sent or waited."""
        return {
            party: {what: part / sum(spent.values()) for what, part in spent.items()}
            for party, spent in self._total.items()
        }
