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
from flwr_clicooper.chain.owner_labels import KEY_FILE
from flwr_clicooper.chain.owner_release import Bound, bound_of
from flwr_clicooper.errors import CooperError, DeliveryError, StateError
from flwr_clicooper.files import write_atomically
from flwr_clicooper.options import Options
from flwr_clicooper.privacy.class_scores import ClassScores
from flwr_clicooper.privacy.labels import SecretLabelMap, load_key
from flwr_clicooper.split.modules import load_weights
from flwr_clicooper.split.specs import as_tensors, is_finite
from flwr_clicooper.split.unsplit import Chain
from flwr_clicooper.task import SplitTask

MODEL_FILE = "model.safetensors"
_FEATURES = "mean"
FORMAT = "flwr-clicooper/model/v1"


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a segment's canonical safetensors bytes, in hex."""
    data = save({k: _own(v) for k, v in sorted(weights.items())})
    return hashlib.sha256(data).hexdigest()


def _own(tensor: Tensor) -> Tensor:
    """Return a copy: safetensors stores no tensor under two names, as tied weights have."""
    return tensor.detach().cpu().contiguous().clone()


def check_finite(weights: Mapping[str, Tensor], who: str) -> None:
    """Refuse weights that are not numbers.

    Raises
    ------
    DeliveryError
        The text names the first such tensor.
    """
    bad = [name for name, tensor in weights.items() if not is_finite(tensor)]
    if bad:
        raise DeliveryError(f"{who} is NaN or infinite in {bad[0]!r}; lower the learning rate")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the paths of this machine."""
    return {**config, "data-dir": "", "run-dir": ""}


class DeliveredModel(Chain):
    """Segments as one model, which answers with scores of the true classes.

    Attributes
    ----------
    bound : callable or None
        What was done to the head's activations before they were released with noise.
    labels : SecretLabelMap or None
        Turns scores of pseudo-classes into log-probabilities of classes.
    """

    bound: Bound | None = None
    labels: SecretLabelMap | None = None

    def forward(self, *inputs: Any) -> Any:
        """Return the scores of the head's inputs."""
        if self.bound is None:
            scores = super().forward(*inputs)
        else:
            activations = as_tensors(self[0](*inputs), "the head")
            scores = Chain(*list(self)[1:])(*self.bound(activations))
        return scores if self.labels is None else self.labels.decode(scores)


def assemble(
    segments: Sequence[nn.Module],
    bound: Bound | None = None,
    labels: SecretLabelMap | None = None,
) -> DeliveredModel:
    """Return segments as one model in eval mode."""
    model = DeliveredModel(*segments)
    model.bound, model.labels = bound, labels
    return model.eval()


def save_model(model: DeliveredModel, folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a model with the config that rebuilds it; return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = model.labels.num_classes if model.labels else 0
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dict(config)),
        "classes": str(classes),
    }
    weights = {k: _own(v) for k, v in model.state_dict().items()}
    path = folder / MODEL_FILE
    write_atomically(path, save(weights, metadata))
    return path


def load_delivered(
    run_dir: str | Path, task: SplitTask, label_key: str | Path | None = None
) -> nn.Sequential:
    """Return the model that a run delivered, in eval mode.

    Parameters
    ----------
    run_dir : str or Path
        The run's folder on the owner's machine, ``<run-dir>/<run-id>``, or the path of
        its ``model.safetensors``.
    task : SplitTask
        The task of the run; it gives the architecture.
    label_key : str or Path, optional
        The key file of a run with secret labels; default is ``label.key`` beside the
        model. ``load_delivered(...).labels = None`` gives the scores of pseudo-classes.

    Returns
    -------
    nn.Sequential
        One entry per segment, the head first. It takes what the head takes.

    Raises
    ------
    DeliveryError
        There is no model, it is damaged, or it is not a model of this task.
    StateError
        The label key is not there.
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
        config, classes = json.loads(metadata["config"]), int(metadata.get("classes", "0"))
    except (SafetensorError, ValueError, KeyError) as error:
        raise DeliveryError(f"{path} is damaged: it is not a delivered model") from error
    try:
        paths = ("data-dir", "run-dir")  # of the owner's machine, left out
        options = Options.from_config({k: v for k, v in config.items() if k not in paths})
        labels = None
        if classes:
            key = load_key(Path(label_key or path.parent / KEY_FILE).expanduser())
            labels = SecretLabelMap(classes, options.label_expansion, key)
        segments = build_segments(task, config)
        if options.class_scores:
            features = len(weights[f"0.1.{_FEATURES}"])
            segments[0] = nn.Sequential(
                segments[0], ClassScores(features, options.class_scores)
            )
        model = assemble(segments, bound_of(options), labels)
        load_weights(model, weights, f"{path.name} and {type(task).__name__}")
    except StateError:
        raise
    except CooperError as error:
        raise DeliveryError(str(error)) from error
    return model
