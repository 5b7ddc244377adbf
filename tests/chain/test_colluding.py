"""Relay and trainers collude, with their real keys, to reorder the rounds of a real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flwr_clicooper import CooperStrategy, LocalGrid, cooper_client
from flwr_clicooper.provenance.attestation import LogHead, RoundStatement, TreeHead, now
from flwr_clicooper.provenance.dsse import Envelope
from flwr_clicooper.provenance.evidence import load_run
from flwr_clicooper.provenance.keys import Identity
from flwr_clicooper.provenance.log import MerkleLog
from flwr_clicooper.provenance.verify import verify_run
from tests.chain.audited import WideTask
from tests.provenance.runs import failed
from tests.tasks import nodes


@pytest.fixture(scope="module")
def colluders(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[int, Identity], Identity]:
    """A run of three rounds, with the keys of all trainers and of the relay."""
    folder = tmp_path_factory.mktemp("colluding")
    configs, keys, relay = nodes(2), {}, Identity.new()
    for config in configs[1:]:
        stage = config["stage"]
        keys[stage] = Identity.new()
        keys[stage].save(folder / f"{stage}.pem")
        config["identity-key"] = str(folder / f"{stage}.pem")
    relay.save(folder / "relay.pem")
    options = {"release": "clean", "num-rounds": 3, "link": "mailbox"}
    options |= {"run-dir": str(folder / "runs"), "relay-key": str(folder / "relay.pem")}
    grid = LocalGrid(cooper_client(WideTask(2)), configs, options)
    run_dir = CooperStrategy.from_config(options).start(grid).run_dir
    assert run_dir is not None
    assert verify_run(run_dir).ok
    return run_dir, keys, relay


def close_log(run_dir: Path, lines: list[Envelope], relay: Identity) -> set[str]:
    """Write other lines, let the relay sign them; return which checks fail."""
    before = load_run(run_dir)
    assert before.head is not None
    text = "".join(line.to_json() + "\n" for line in lines)
    signed = (run_dir / "attestations.jsonl").read_bytes(), (run_dir / "log.json").read_bytes()
    log = MerkleLog(bytes.fromhex(line.digest) for line in lines)
    files = before.head.statement.files
    head = LogHead(log.root().hex(), run_dir.name, log.size, now(), files)
    try:
        (run_dir / "attestations.jsonl").write_text(text)
        closed = Envelope.sign(head.payload(), relay).to_json() + "\n"
        (run_dir / "log.json").write_text(closed)
        return failed(verify_run(run_dir))
    finally:
        (run_dir / "attestations.jsonl").write_bytes(signed[0])
        (run_dir / "log.json").write_bytes(signed[1])


def test_a_relay_that_reorders_rounds_is_seen(
    colluders: tuple[Path, dict[int, Identity], Identity],
) -> None:
    run_dir, _, relay = colluders
    lines = [line.envelope for line in load_run(run_dir).lines]
    first = [i for i, it in enumerate(load_run(run_dir).lines) if _round(it.statement) == 1]
    second = [i for i, it in enumerate(load_run(run_dir).lines) if _round(it.statement) == 2]
    for one, other in zip(first, second, strict=True):
        lines[one], lines[other] = lines[other], lines[one]
    assert close_log(run_dir, lines, relay) >= {"order", "chain in time", "tree heads"}


def test_rounds_that_all_trainers_and_the_relay_sign_anew_in_another_order_are_seen(
    colluders: tuple[Path, dict[int, Identity], Identity],
) -> None:
    """All links and heads are made to agree; only the owner does not take part."""
    run_dir, keys, relay = colluders
    run = load_run(run_dir)
    other = {1: 2, 2: 1, 3: 3}
    lines: list[Envelope] = []
    log, last, seen = MerkleLog(), dict[int, str](), dict[int, TreeHead]()
    predecessor = ""
    for line in run.lines:
        it, envelope = line.statement, line.envelope
        if isinstance(it, RoundStatement) and it.kind == "round":
            head = seen.setdefault(it.round, TreeHead(log.root().hex(), log.size))
            told = run.round(it.segment, other[it.round])
            assert told is not None
            swapped = replace(
                told.statement,
                round=it.round,
                previous=last[it.segment],
                predecessor=predecessor if it.segment > 1 else "",
                log=head,
                watermark=it.watermark,
                time=it.time,
            )
            envelope = Envelope.sign(swapped.payload(), keys[it.segment])
            predecessor = envelope.digest
        if isinstance(it, RoundStatement):
            last[it.segment] = envelope.digest
        lines.append(envelope)
        log.append(bytes.fromhex(envelope.digest))
    found = close_log(run_dir, lines, relay)
    assert found == {"countersignatures", "delivery", "tree heads"}


def _round(statement: object) -> int:
    if isinstance(statement, RoundStatement) and statement.kind == "round":
        return statement.round
    return 0
