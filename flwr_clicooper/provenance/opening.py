"""What a trainer keeps for an audit, where it stands, and what a challenge asks for of it.

Only names and copies: nothing here reads a tensor, so `clicooper open` needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.provenance.audit import Challenge, Point
from flwr_clicooper.provenance.evidence import read_bytes
from flwr_clicooper.provenance.streams import Position, Streams

STATES = "states"
OPENED = ("activations-in", "gradients-in", "labels-in", STATES)
"""The streams whose arrays are kept; of the others an audit computes the arrays."""
LEAVES_FILE = "leaves"
KEY_FILE = "watermark.key"
MAX_LEAVES = 2**28
"""Bytes in a file of leaves at most."""

Leaf = tuple[str, Position]
"""A stream and a place in it."""


def segment_folder(run_dir: Path, segment: int) -> Path:
    """Return where the trainer of a segment keeps what opens its commitments."""
    return run_dir / f"evidence-{segment}"


def round_folder(run_dir: Path, segment: int, round_: int) -> Path:
    """Return the part of a round; round 0 has what came once, before all rounds."""
    return segment_folder(run_dir, segment) / f"round-{round_}"


def array_file(stream: str, position: Position) -> str:
    """Return the name of the file with the arrays of a leaf."""
    return f"{stream}-{position[1]}-{position[2]}.safetensors"


def load_leaves(folder: Path) -> Streams:
    """Return the leaves of a round's folder; nothing says yet that they were signed.

    Raises
    ------
    EvidenceError
        They are missing or damaged.
    """
    return Streams.from_bytes(read_opened(folder / LEAVES_FILE, MAX_LEAVES))


def is_kept(run_dir: Path, segment: int, round_: int) -> bool:
    """Return whether a round was closed here; one that was broken off has no leaves."""
    return (round_folder(run_dir, segment, round_) / LEAVES_FILE).is_file()


def read_opened(path: Path, limit: int) -> bytes:
    """Return the content of a file that may be very large, or larger than it must be.

    Raises
    ------
    EvidenceError
        As `read_bytes`.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > limit:
        raise EvidenceError(f"{path.name} is too large; allowed are {limit:,} bytes")
    return read_bytes(path, size)


def needed(leaves: Streams, point: Point, until: int) -> list[Leaf]:
    """Return what must be opened to repeat the steps from a point up to ``until``."""

    def fits(stream: str, position: Position) -> bool:
        round_, step, _ = position
        if stream == STATES:
            return step in (point.step, until)
        return round_ == 0 or point.step <= step < until

    return [(s, at) for s in OPENED for at in leaves.positions(s) if fits(s, at)]


def find_arrays(run_dir: Path, segment: int, round_: int, leaf: Leaf) -> Path:
    """Return the file of a leaf; what came as a whole may stand with round 0."""
    stream, position = leaf
    path = round_folder(run_dir, segment, round_) / array_file(stream, position)
    if position[0] == 0 and not path.exists():
        return round_folder(run_dir, segment, 0) / path.name
    return path


def files_for(challenge: Challenge, point: Point, run_dir: Path) -> Iterator[Path]:
    """Yield the files that open a point; of the round before, too, at a round's first step.

    Raises
    ------
    EvidenceError
        The leaves of the round are missing or damaged.
    """
    segment, round_ = point.segment, point.round
    folder = round_folder(run_dir, segment, round_)
    yield folder / LEAVES_FILE
    yield folder / KEY_FILE
    for leaf in needed(load_leaves(folder), point, challenge.until(point)):
        yield find_arrays(run_dir, segment, round_, leaf)
    if point.step == 0 and round_ > 1:
        before = round_folder(run_dir, segment, round_ - 1)
        yield before / LEAVES_FILE
        yield before / array_file(STATES, (round_ - 1, challenge.steps, 0))


def open_evidence(challenge: Challenge, run_dir: Path, out: Path) -> tuple[list[Point], int]:
    """Copy what a challenge asks for out of a trainer's run folder, and nothing else.

    Parameters
    ----------
    challenge : Challenge
        The verifier's.
    run_dir : Path
        The run's folder on the trainer's machine.
    out : Path
        Gets a folder ``evidence-<stage>``, which only its owner may read.

    Returns
    -------
    opened : list of Point
        What was opened: the points of those rounds whose evidence is here.
    copied : int
        Bytes.

    Raises
    ------
    EvidenceError
        Nothing of the challenge is here.
    """
    here = [it for it in challenge.points if is_kept(run_dir, it.segment, it.round)]
    if not here:
        raise EvidenceError(
            f"{run_dir} has nothing of what the challenge asks for; name the run's folder on "
            "the machine of a trainer that it asks"
        )
    if out.resolve() == run_dir.resolve():
        raise EvidenceError(f"{out} is the run's own folder; name another one")
    wanted = {path for point in here for path in files_for(challenge, point, run_dir)}
    copied = 0
    for path in sorted(wanted):
        if path.is_file():  # one that is missing is for the audit to name
            copied += _copy(path, out / path.relative_to(run_dir))
    return here, copied


def make_private(folder: Path) -> None:
    """Make a round's folder, which only its owner may read."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for each in (folder.parent, folder):
        each.mkdir(exist_ok=True, mode=0o700)


def _copy(path: Path, target: Path) -> int:
    make_private(target.parent)
    data = read_opened(path, path.stat().st_size)
    write_atomically(target, data)
    return len(data)
