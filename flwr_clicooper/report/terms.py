"""What was agreed on in a run, who took part, and what was delivered, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from flwr_clicooper.provenance.keys import PublicIdentity
from flwr_clicooper.report.facts import Facts, option


def job_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return what was agreed on and how it went, as names and texts."""
    job = facts.job
    if job is None:
        return []
    trained = (
        f"{job.rounds:,} on {job.records:,} records, batches of {option(job, 'batch-size')}"
    )
    rows = [
        ("rounds", trained),
        ("release", f"{option(job, 'release')}, schedule {option(job, 'schedule')}"),
        ("cuts", _cuts(job.cuts)),
        ("privacy", facts.privacy[0] if facts.privacy else "no words are in privacy.json"),
    ]
    for number, how in enumerate(facts.attempts, start=1):
        if len(facts.attempts) > 1:
            rows.append((f"attempt {number}", how))
    return rows + _delivery_rows(facts)


def party_rows(facts: Facts) -> list[tuple[str, str, PublicIdentity]]:
    """Return role, name and key of everybody who ever took part, once each."""
    found = {
        (it.role, it.stage, it.key): None
        for line in facts.evidence.jobs
        for it in line.statement.parties
    }
    order = {"owner": 0, "trainer": 1, "relay": 2}
    return [
        (f"{role} {stage}" if stage else role, facts.names.get(key, ""), key)
        for role, stage, key in sorted(found, key=lambda it: (order[it[0]], it[1]))
    ]


def _delivery_rows(facts: Facts) -> list[tuple[str, str]]:
    if not facts.evidence.deliveries:
        return [("delivery", "none")]
    it, job = facts.evidence.deliveries[-1].statement, facts.job
    owner = f", signed by {facts.name(job.party('owner'))}" if job else ""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in it.metrics.items())
    return [
        ("delivery", f"model.safetensors with SHA-256 {it.subject}, {it.time}{owner}"),
        ("held-out", f"{figures or 'nothing'}, as the owner says"),
    ]


def _cuts(cuts: Sequence[Sequence[str]]) -> str:
    """Return what crosses the cuts, from the owner on."""
    parts = ["owner"]
    for number, crosses in enumerate(cuts):
        parts.append(", ".join(crosses))
        if number + 1 < len(cuts):
            parts.append(f"segment {number + 1}")
    return " → ".join(parts)
