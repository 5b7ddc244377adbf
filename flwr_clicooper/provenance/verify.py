"""Verify the evidence of a run from its files alone; `docs/attestation.md` is the format."""

from __future__ import annotations

from pathlib import Path

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance import check_files, check_marks, check_statements
from flwr_clicooper.provenance.attestation import LogHead
from flwr_clicooper.provenance.checking import Case, Check, Report, Rule, shown
from flwr_clicooper.provenance.evidence import (
    LINES_FILE,
    LOG_FILE,
    Line,
    RunEvidence,
    read_head,
    read_lines,
)
from flwr_clicooper.provenance.trust import Trust

__all__ = ["RULES", "Check", "Report", "verify_run"]

_DAMAGED = "The file was changed, cut off, or not written by this package: do not rely on it."

RULES = (
    Rule(
        "jobs",
        "attempts are in order, each linked to the one before, on the same terms",
        "What was agreed on changed, or an attempt was left out or invented.",
        check_statements.jobs,
    ),
    Rule(
        "agreement",
        "each job is signed by the owner, every trainer and the relay, and nobody else",
        "Somebody did not agree to this job, or it was changed after they had.",
        check_statements.agreement,
    ),
    Rule(
        "trusted keys",
        "every party's key is listed in the trust file for its role and stage",
        "A key is not that of a party you trust: anybody may have signed in its place.",
        check_statements.trusted,
    ),
    Rule(
        "complete",
        "every segment has one statement for each start and round, and none is from elsewhere",
        "Work is missing or claimed twice, or comes from another run, attempt or segment.",
        check_statements.complete,
    ),
    Rule(
        "order",
        "statements stand in the order in which they are made",
        "Lines were moved: who did what before whom is not what it was.",
        check_statements.ordered,
    ),
    Rule(
        "signatures",
        "each start and round is signed by its segment's trainer",
        "The statement is not the trainer's: it was forged, changed, or signed by another.",
        check_statements.signed,
    ),
    Rule(
        "chain in time",
        "each statement goes on from the one before it on its segment",
        "A segment's history was rewritten, or went on from other weights.",
        check_statements.chained_in_time,
    ),
    Rule(
        "chain of segments",
        "each round names the statement of the segment before it",
        "A trainer did not see the predecessor's statement, or it was replaced later.",
        check_statements.chained_by_segment,
    ),
    Rule(
        "streams",
        "what each segment gave is what its neighbour got, both ways",
        "Somebody between two trainers, or one of them, changed or made up what crossed.",
        check_statements.streams,
    ),
    Rule(
        "owner's streams",
        "what the owner gave and got is what trainers trained on",
        "A trainer did not train on the owner's data, or not in this run.",
        check_statements.owner_streams,
    ),
    Rule(
        "steps and records",
        "each round has the optimizer steps and records that were agreed on",
        "Less, or something else, was trained than was agreed on.",
        check_statements.worked,
    ),
    Rule(
        "watermark keys",
        "each watermark's key was committed to, and logged, before its round",
        "A key may have been chosen to fit weights that were there already.",
        check_marks.committed,
    ),
    Rule(
        "watermarks",
        "each is in its segment, and the owner found those of the last round",
        "The delivered weights may not be the trainer's.",
        check_marks.marked,
    ),
    Rule(
        "disclosed keys",
        "each is the one that its trainer committed to",
        "A trainer disclosed another key, or the file was changed.",
        check_marks.disclosed,
    ),
    Rule(
        "watermarks in the model",
        "the model's file carries them",
        "The model's weights are not those that were marked in the last round.",
        check_marks.detected,
    ),
    Rule(
        "countersignatures",
        "the owner signed each segment's last statement",
        "The owner did not confirm that it got what the trainer signed.",
        check_statements.countersigned,
    ),
    Rule(
        "delivery",
        "the owner signed it, and it names each segment's last statement",
        "Nobody confirms what was delivered: rounds or trainers may have been left out.",
        check_statements.delivered,
    ),
    Rule(
        "model file",
        "it is the one that the owner delivered",
        "This is another model than the one that was delivered.",
        check_files.delivered_file,
    ),
    Rule(
        "segments of the model",
        "each trainer's is what the trainer signed last, and there is no other",
        "A segment was changed or exchanged after its trainer had signed it.",
        check_files.delivered_segments,
    ),
    Rule(
        "privacy as agreed",
        "privacy.json is what all parties signed at set-up",
        "The guarantee that is shown is not the one that was agreed on.",
        check_files.privacy_agreed,
    ),
    Rule(
        "privacy as delivered",
        "privacy.json is what the owner signed at the end",
        "The guarantee that is shown is not the one that the owner stands for.",
        check_files.privacy_delivered,
    ),
    Rule(
        "log",
        "the relay signed a tree head over exactly these lines",
        "Lines were added, left out or changed after the relay closed the log.",
        check_files.logged,
    ),
    Rule(
        "tree heads",
        "every head that a party saw is of this log, which only grew",
        "The relay showed parties different logs, or rewrote it.",
        check_files.heads,
    ),
    Rule(
        "files",
        "run.toml, metrics.jsonl and privacy.json are those that the relay signed",
        "A file of the run was changed, or is of another run.",
        check_files.covered,
    ),
    Rule(
        "options",
        "run.toml has the run, rounds and options that all parties agreed on",
        "The relay wrote down other terms than the parties signed.",
        check_files.configured,
    ),
)
"""All checks that need readable files, in the order of the report."""


def verify_run(run_dir: Path, trust: Trust | None = None, model: Path | None = None) -> Report:
    """Check all evidence of a run; nothing that is off passes, and nothing raises.

    Parameters
    ----------
    run_dir : Path
        The run's folder.
    trust : Trust, optional
        Whose keys are trusted. Without it nobody knows whose the keys are.
    model : Path, optional
        The delivered model; default is ``model.safetensors`` in the folder, if it is there.
    """
    lines, first = _lines(run_dir)
    head, second = _head(run_dir)
    if lines is None:
        reason = f"{LINES_FILE} cannot be read"
        rest = tuple(Check(rule.name, "not checked", reason) for rule in RULES)
        return Report((first, second, *rest))
    case = Case(run_dir, RunEvidence(lines.lines, head), trust, model)
    run = shown(case.run.jobs[-1].statement.run) if case.run.jobs else ""
    return Report((first, second, *(rule.check(case) for rule in RULES)), run)


def _lines(run_dir: Path) -> tuple[RunEvidence | None, Check]:
    try:
        found = RunEvidence.of(read_lines(run_dir / LINES_FILE))
    except EvidenceError as error:
        return None, Check(LINES_FILE, "failed", shown(str(error)), LINES_FILE, _DAMAGED)
    count = len(found.lines)
    return found, Check(LINES_FILE, "passed", f"{count:,} statements, one per line")


def _head(run_dir: Path) -> tuple[Line[LogHead] | None, Check]:
    try:
        found = read_head(run_dir / LOG_FILE)
    except EvidenceError as error:
        return None, Check(LOG_FILE, "failed", shown(str(error)), LOG_FILE, _DAMAGED)
    return found, Check(LOG_FILE, "passed", "one signed tree head")
