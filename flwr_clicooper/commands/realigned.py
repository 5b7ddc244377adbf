"""``clicooper claim`` for a model whose neurons may have changed places.

Its neurons are put back by what they answer to public inputs, and what is then found counts
only if it exceeds what models show that were trained independently and treated alike.
"""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flwr_clicooper.commands.inputs import add_files, add_task, load_task, read_tensors
from flwr_clicooper.errors import EvidenceError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from flwr_clicooper.provenance.claim import ClaimReport, WatermarkKey
    from flwr_clicooper.provenance.realign import Verdict


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options of re-alignment to the parser of ``clicooper claim``."""
    group = command.add_argument_group(
        "re-alignment", "for a model whose neurons may have been permuted or rescaled"
    )
    add_task(group, required=False)
    add_files(
        group,
        "--nulls",
        "model.safetensors of at least 30 models of the same task, trained independently",
    )
    group.add_argument(
        "--probes",
        type=Path,
        metavar="FILE",
        help="a .safetensors file of one tensor: some hundred public inputs of the task",
    )
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="the delivered model (default: RUN_DIR/model.safetensors)",
    )


def wanted(arguments: argparse.Namespace) -> bool:
    """Return whether re-alignment is asked for.

    Raises
    ------
    EvidenceError
        Only a part of what it needs is given.
    """
    needed = {name: getattr(arguments, name) for name in ("task", "nulls", "probes")}
    missing = [f"--{name}" for name, value in needed.items() if not value]
    if missing and (len(missing) < len(needed) or arguments.reference):
        raise EvidenceError(
            "re-alignment needs --task, --nulls and --probes: give "
            f"{' and '.join(missing)}, too"
        )
    return not missing


def verdicts(
    arguments: argparse.Namespace,
    suspect: Mapping[str, Tensor],
    keys: Sequence[WatermarkKey],
    tests: int,
) -> list[Verdict]:
    """Re-align a suspect, and look for watermarks in it.

    Parameters
    ----------
    suspect : mapping of str to Tensor
        The tensors of a whole model.
    keys : sequence of WatermarkKey
        Whose watermarks are looked for.
    tests : int
        Comparisons that are made in all.

    Raises
    ------
    CooperError
        A file cannot be read, a model is not of the task, a null model is the delivered
        model itself, or the task has layers through which units cannot be followed.
    """
    from rich.console import Console
    from rich.progress import track
    from torch import equal

    from flwr_clicooper.chain.delivered import MODEL_FILE, load_delivered
    from flwr_clicooper.provenance.realign import check_nulls, judge
    from flwr_clicooper.provenance.watermark import Watermark, inside
    from flwr_clicooper.split.modules import load_weights

    check_nulls(len(arguments.nulls))
    path = arguments.reference or arguments.run / MODEL_FILE
    reference = load_delivered(path.expanduser(), load_task(arguments.task, arguments.app_dir))
    own = reference.state_dict()
    first, probes = _start(reference, _probes(arguments.probes.expanduser()))

    def comparable(weights: Mapping[str, Tensor], name: str) -> nn.Sequential:
        model = copy.deepcopy(reference)
        load_weights(model, weights, name)
        return _after(model, first)

    def nulls() -> Iterator[nn.Sequential]:
        console = Console(stderr=True)
        for file in track(arguments.nulls, "null models", console=console, transient=True):
            weights = read_tensors(file.expanduser())
            if all(name in weights and equal(weights[name], own[name]) for name in own):
                raise EvidenceError(f"{file} is the delivered model, not an independent one")
            yield comparable(weights, str(file))

    marks = [
        (f"{it.segment}.", Watermark(it.key, inside(own, f"{it.segment}."))) for it in keys
    ]
    module = comparable(suspect, "the suspect")
    return judge(marks, _after(reference, first), module, nulls(), probes, tests=tests)


def table(report: ClaimReport) -> Table:
    """Return what a claim found after re-alignment, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    found = Table(
        *("segment", "round"),
        Column("re-aligned", justify="right"),
        Column("null models at most", justify="right"),
        "accepted",
        box=SIMPLE_HEAD,
    )
    for it in report.findings:
        if it.aligned is not None:
            found.add_row(
                *(str(it.segment), str(it.round)),
                f"{it.aligned.matches} of {it.bits}",
                str(max(it.aligned.nulls)),
                "yes" if it.aligned.accepted else "no",
            )
    return found


def _probes(path: Path) -> Tensor:
    """Return the one tensor of a file, in floating point."""
    tensors = list(read_tensors(path).values())
    if len(tensors) != 1 or tensors[0].ndim < 2 or not tensors[0].is_floating_point():
        raise EvidenceError(
            f"{path} has not what is needed: one floating-point tensor of inputs [n, ...]"
        )
    return tensors[0]


def _after(model: nn.Sequential, first: int) -> nn.Sequential:
    """Return the segments from one on, under their own names."""
    from torch import nn

    return nn.Sequential(OrderedDict(list(model.named_children())[first:]))


def _start(model: nn.Sequential, probes: Tensor) -> tuple[int, Tensor]:
    """Return from which segment on units are followed, and the inputs of that segment.

    A head of other layers, or whose activations were bounded, is taken as it is: it is
    public, and so are its answers to public inputs.
    """
    import torch

    from flwr_clicooper.provenance.realign import can_follow
    from flwr_clicooper.split.specs import as_tensors

    with torch.no_grad():
        try:
            answers = as_tensors(model[0](probes), "the head")
        except (RuntimeError, IndexError) as error:  # what PyTorch raises for wrong shapes
            shape = list(probes.shape)
            raise EvidenceError(f"the head does not take probes of shape {shape}") from error
    bound = getattr(model, "bound", None)
    if bound is None and can_follow(model[0]):
        return 0, probes
    if len(answers) != 1:
        raise EvidenceError(f"the head gives {len(answers)} tensors; allowed is 1")
    return 1, (answers if bound is None else bound(answers))[0]
