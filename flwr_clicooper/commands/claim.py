"""``clicooper claim``: which trainer's watermark, of which round, a model carries."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_clicooper.commands import realigned
from flwr_clicooper.commands.inputs import add_files, read_tensors
from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.trust import Trust

if TYPE_CHECKING:
    from flwr_clicooper.provenance.attestation import RoundStatement
    from flwr_clicooper.provenance.claim import ClaimReport, Finding
    from flwr_clicooper.provenance.evidence import Line
    from flwr_clicooper.report.facts import Facts

FORMAT = "flwr-clicooper/claim/v1"
NEEDED = (
    *("jobs", "agreement", "trusted keys", "complete", "order", "signatures", "chain in time"),
    *("chain of segments", "streams", "watermark keys", "log", "tree heads"),
)
"""Checks that must not fail, or it is not known who committed to what, and before what."""
PERMUTED = (
    "A model whose neurons were permuted or rescaled shows no watermark as it is: give "
    "--task, --nulls and --probes to have them put back first."
)
ALIGNED = (
    "Re-aligned, a model shows some likeness to any other: a match is accepted if it is more "
    "than that of every null model."
)
Commands = argparse._SubParsersAction  # what `add_subparsers` returns has no public name


@dataclass(frozen=True)
class Commitment:
    """A watermark that the attestations announce.

    Attributes
    ----------
    line : Line
        The statement on its round.
    digest : str
        The SHA-256 of its key, from the statement before.
    """

    line: Line[RoundStatement]
    digest: str

    @property
    def place(self) -> tuple[int, int]:
        """Segment and round."""
        return self.line.statement.segment, self.line.statement.round


@dataclass(frozen=True)
class Given:
    """Keys that were given, sorted by what the attestations say of them.

    Attributes
    ----------
    keys : dict of str to bytes
        Those that were committed to, by their commitment.
    strange : int
        How many others.
    """

    keys: dict[str, bytes]
    strange: int


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``clicooper``."""
    command = commands.add_parser("claim", help="find whose watermarks a model carries")
    for name, value, what in (
        ("model", "FILE", "the suspect: a .safetensors file of a model, or of one segment"),
        ("run", "RUN_DIR", "the run whose trainers may have made it, such as runs/<run-id>"),
    ):
        command.add_argument(f"--{name}", type=Path, required=True, metavar=value, help=what)
    add_files(
        command, "--keys", "trainers' watermark-<stage>.json, besides what lies in RUN_DIR"
    )
    command.add_argument(
        "--trust", type=Path, metavar="FILE", help="such as trust.toml; it has the names"
    )
    command.add_argument("--json", action="store_true", help="for machines")
    realigned.add_to(command)
    command.set_defaults(command=claim)


def claim(arguments: argparse.Namespace) -> int:
    """Look for the watermarks of a run in a model."""
    run_dir: Path = arguments.run.expanduser()
    aligning = realigned.wanted(arguments)
    facts = _facts(run_dir, arguments.trust)
    commitments = {it.digest: it for it in commitments_of(facts)}
    given = read_keys(_files(run_dir, arguments.keys), commitments)
    report = _compare(arguments, commitments, given, aligning=aligning)
    missing = [it for it in commitments.values() if it.digest not in given.keys]
    if arguments.json:
        print(json.dumps(_as_json(facts, report, commitments, given), indent=2))
    else:
        _show(facts, report, missing, given)
    return 0 if report is not None and report.accepted else 1


# -- what is compared ----------------------------------------------------------------------


def _facts(run_dir: Path, trust_file: Path | None) -> Facts:
    """Return the evidence of a run whose commitments are those of its trainers.

    Raises
    ------
    EvidenceError
        They are not.
    """
    from flwr_clicooper.provenance.checking import Case, Report
    from flwr_clicooper.provenance.evidence import load_run
    from flwr_clicooper.provenance.verify import RULES
    from flwr_clicooper.report.facts import facts_of

    trust = Trust.load(trust_file.expanduser()) if trust_file else None
    case = Case(run_dir, load_run(run_dir), trust)
    report = Report(tuple(rule.check(case) for rule in RULES if rule.name in NEEDED))
    if report.failed:
        failed = ", ".join(check.name for check in report.failed)
        raise EvidenceError(
            f"the evidence of {run_dir} does not hold ({failed}), so its watermarks prove "
            "nothing; 'clicooper verify' says more"
        )
    return facts_of(case, report)


def commitments_of(facts: Facts) -> Iterator[Commitment]:
    """Yield what trainers committed to before rounds that have a watermark."""
    for lines in facts.evidence.segments.values():
        for before, line in pairwise(lines):
            digest = before.statement.watermark.commitment
            if line.statement.kind == "round" and line.statement.watermark.bits and digest:
                yield Commitment(line, digest)


def _files(run_dir: Path, given: Iterable[Path]) -> list[Path]:
    from flwr_clicooper.provenance.evidence import KEYS_FILE

    own = [run_dir / KEYS_FILE] if (run_dir / KEYS_FILE).exists() else []
    return [
        *own,
        *sorted(run_dir.glob("watermark-*.json")),
        *(it.expanduser() for it in given),
    ]


def read_keys(files: Iterable[Path], commitments: Iterable[str]) -> Given:
    """Return the keys of files that owners or trainers wrote.

    Raises
    ------
    EvidenceError
        A file cannot be read, or is neither.
    """
    from flwr_clicooper.provenance.dsse import MAX_ENVELOPE
    from flwr_clicooper.provenance.evidence import DisclosedKeys, OwnKeys, read_bytes

    found: set[bytes] = set()
    for path in files:
        data = read_bytes(path, MAX_ENVELOPE)
        kind = OwnKeys if b'"segment":' in data else DisclosedKeys
        try:
            keys = kind.parse(data)
        except EvidenceError as error:
            raise EvidenceError(f"{path}: {error}") from None
        found |= {bytes.fromhex(key) for key in keys.keys.values()}
    by_digest = {sha256(key).hexdigest(): key for key in found}
    known = {digest: by_digest[digest] for digest in commitments if digest in by_digest}
    return Given(known, len(found) - len(known))


def _compare(
    arguments: argparse.Namespace,
    commitments: dict[str, Commitment],
    given: Given,
    *,
    aligning: bool,
) -> ClaimReport | None:
    """Return what the keys find in a model, or nothing if there are none.

    Raises
    ------
    CooperError
        The model cannot be read, or cannot be re-aligned.
    """
    model: Path = arguments.model.expanduser()
    if not model.is_file():
        raise EvidenceError(f"{model} is missing or no file")
    if not given.keys:
        return None
    from flwr_clicooper.provenance.claim import WatermarkKey, claim

    suspect = read_tensors(model)
    chosen = sorted(
        (commitments[digest] for digest in given.keys), key=lambda commitment: commitment.place
    )
    keys = [
        WatermarkKey(it.line.statement.run, *it.place, given.keys[it.digest], it.digest)
        for it in chosen
    ]
    report = claim(suspect, keys, suspects=2 if aligning else 1)
    if not aligning:
        return report
    return report.with_aligned(realigned.verdicts(arguments, suspect, keys, report.tests))


# -- what is said --------------------------------------------------------------------------


def _as_json(
    facts: Facts,
    report: ClaimReport | None,
    commitments: dict[str, Commitment],
    given: Given,
) -> dict[str, Any]:
    findings: dict[str, Any] = {"accepted": False, "tests": 0, "findings": []}
    if report is not None:
        findings = report.as_dict()
    places = {it.place: it.line for it in commitments.values()}
    findings["findings"] = [
        {**it, **_signer(facts, places[it["segment"], it["round"]])}
        for it in findings["findings"]
    ]
    missing = [
        {"segment": it.place[0], "round": it.place[1], **_signer(facts, it.line)}
        for digest, it in commitments.items()
        if digest not in given.keys
    ]
    return {
        "format": FORMAT,
        **findings,
        "without-key": missing,
        "strange-keys": given.strange,
    }


def _signer(facts: Facts, line: Line[RoundStatement]) -> dict[str, str]:
    key = facts.trainer(line)
    return {"trainer": facts.trainer_name(line), "fingerprint": key.fingerprint if key else ""}


def _show(
    facts: Facts, report: ClaimReport | None, missing: list[Commitment], given: Given
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    console.print(Text(_verdict(facts, report), "bold"), soft_wrap=True)
    if report is not None:
        table = Table(
            *("trainer", "fingerprint", "segment", "round"),
            Column("matches", justify="right"),
            Column("by chance", justify="right"),
            "accepted",
            box=SIMPLE_HEAD,
        )
        for finding in report.findings:
            table.add_row(*map(Text, _cells(facts, finding)))
        console.print(table)
        text = f"By chance: at most so likely, over all {report.tests} comparisons together."
        console.print(Text(text), soft_wrap=True)
    hint = [PERMUTED]
    if report is not None and report.findings[0].aligned:
        hint = [ALIGNED]
        console.print(realigned.table(report))
    for text in [*_without_key(facts, missing), *_strange(given), *hint]:
        console.print(Text(text), soft_wrap=True)


def _verdict(facts: Facts, report: ClaimReport | None) -> str:
    if report is None:
        return "Nothing was compared: no key is of a commitment in the attestations."
    if not report.accepted:
        return "This model carries none of the watermarks whose keys were given."
    found: dict[str, list[int]] = {}
    for it in report.accepted:
        found.setdefault(f"{_owner_of(facts, it)} in segment {it.segment}", []).append(
            it.round
        )
    parts = [f"{who} of {ranges(rounds)}" for who, rounds in found.items()]
    return f"This model carries watermarks by {'; by '.join(parts)}."


def _line_of(facts: Facts, finding: Finding) -> Line[RoundStatement] | None:
    return facts.evidence.round(finding.segment, finding.round)


def _owner_of(facts: Facts, finding: Finding) -> str:
    line = _line_of(facts, finding)
    return "unknown" if line is None else facts.trainer_name(line)


def _cells(facts: Facts, it: Finding) -> tuple[str, ...]:
    line = _line_of(facts, it)
    key = None if line is None else facts.trainer(line)
    chance = f"2^{it.log2_false_positive:.0f}" if it.log2_false_positive < 0 else "1"
    return (
        facts.names.get(key, "") if key else "",
        key.fingerprint if key else "",
        str(it.segment),
        str(it.round),
        f"{it.matches} of {it.bits}",
        chance,
        "yes" if it.accepted else f"no: {it.skipped}" if it.skipped else "no",
    )


def _without_key(facts: Facts, missing: list[Commitment]) -> Iterator[str]:
    found: dict[tuple[int, str], list[int]] = {}
    for it in missing:
        segment, round_ = it.place
        found.setdefault((segment, facts.trainer_name(it.line)), []).append(round_)
    for (segment, name), rounds in found.items():
        yield f"No key was given for segment {segment} by {name}: {ranges(rounds)}."


def _strange(given: Given) -> Iterator[str]:
    if given.strange:
        count = f"{given.strange} key{'s' if given.strange > 1 else ''}"
        yield f"Not compared: {count} that no attestation of this run committed to."


def ranges(rounds: Iterable[int]) -> str:
    """Return rounds in words, such as ``rounds 1 to 3, 5``."""
    found: list[list[int]] = []
    for it in sorted(rounds):
        if found and it == found[-1][1] + 1:
            found[-1][1] = it
        else:
            found.append([it, it])
    texts = [f"{low}" if low == high else f"{low} to {high}" for low, high in found]
    one = len(found) == 1 and found[0][0] == found[0][1]
    return f"round{'' if one else 's'} {', '.join(texts)}"
