"""The delivered model: its digest, its file, and how to load it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flwr_clicooper.chain.build import build_segments
from flwr_clicooper.errors import CooperError, DeliveryError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.split.modules import load_weights
from flwr_clicooper.split.unsplit import Chain
from flwr_clicooper.task import SplitTask

MODEL_FILE = "model.safetensors"
FORMAT = "flwr-clicooper/model/v1"


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a segment's canonical safetensors bytes, in hex."""
    data = save({k: _own(v) for k, v in sorted(weights.items())})
    return hashlib.sha256(data).hexdigest()


def _own(tensor: Tensor) -> Tensor:
    """Return a copy: safetensors stores no tensor under two names, as tied weights have."""
    return tensor.detach().cpu().contiguous().clone()


def assemble(segments: Sequence[nn.Module]) -> Chain:
    """Return segments as one model in eval mode."""
    return Chain(*segments).eval()


def save_model(model: Chain, folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a model with the config that rebuilds it; return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "config": json.dumps(dict(config))}
    weights = {k: _own(v) for k, v in model.state_dict().items()}
    path = folder / MODEL_FILE
    write_atomically(path, save(weights, metadata))
    return path


def load_delivered(run_dir: str | Path, task: SplitTask) -> nn.Sequential:
    """Return the model that a run delivered, in eval mode.

    Parameters
    ----------
    run_dir : str or Path
        The run's folder on the owner's machine, ``<run-dir>/<run-id>``, or the path of
        its ``model.safetensors``.
    task : SplitTask
        The task of the run; it gives the architecture.

    Returns
    -------
    nn.Sequential
        One entry per segment, the head first. It takes what the head takes.

    Raises
    ------
    DeliveryError
        There is no model, it is damaged, or it is not a model of this task.
    """
    path = Path(run_dir).expanduser()
    path = path / MODEL_FILE if path.is_dir() or path.suffix != ".safetensors" else path
    if not path.is_file():
        raise DeliveryError(
            f"{path} does not exist: the run has not delivered, it ran on another machine, "
            "or the path is not a run's folder"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise DeliveryError(
                f"{path} is {metadata.get('format', 'of an unnamed format')!r}, not {FORMAT!r}"
            )
        config = json.loads(metadata["config"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise DeliveryError(f"{path} is damaged: it is not a delivered model") from error
    try:
        model = assemble(build_segments(task, config))
        load_weights(model, weights, f"{path.name} and {type(task).__name__}")
    except CooperError as error:
        raise DeliveryError(str(error)) from error
    return model
