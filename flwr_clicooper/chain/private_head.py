"""Conditions on a head whose activations are released with a guarantee per record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flwr_clicooper.chain.build import build_segments
from flwr_clicooper.errors import SplitError
from flwr_clicooper.split.modules import keeping_modes
from flwr_clicooper.split.specs import Tensors, TensorSpec, as_tensors, describe
from flwr_clicooper.task import Config, SplitTask

_TOLERANCE = 1e-4
_OTHER_SEED = 1


def check_per_record(head: nn.Module, inputs: Tensors) -> None:
    """Refuse a head that mixes the records of a batch, as it is in eval mode.

    Then replacing one record would change the activations of others, which no noise per
    record covers.

    Parameters
    ----------
    head : nn.Module
        Left as it was.
    inputs : tuple of Tensor
        Records of the training set.

    Raises
    ------
    SplitError
        A BatchNorm layer uses the statistics of the batch, or an activation depends on who
        else is in the batch.
    """
    with torch.no_grad(), keeping_modes(head):
        head.eval()
        for name, layer in head.named_modules():
            if isinstance(layer, _BatchNorm) and (
                layer.training or layer.running_mean is None
            ):
                raise SplitError(
                    f"the head's layer {name or '(itself)'!r} is {layer} and normalises by "
                    "the batch it is given: one record would change the activations of all. "
                    "Let it use running statistics of public data (eval mode), or use "
                    "GroupNorm or LayerNorm"
                )
        together = as_tensors(head(*inputs), "the head")
        alone = as_tensors(head(*(x[:1] for x in inputs)), "the head")
    for whole, single in zip(together, alone, strict=True):
        own, scale = whole[:1].double(), single.double().abs().amax().clamp_min(1.0)
        if bool(((own - single.double()).abs() > _TOLERANCE * scale).any()):
            raise SplitError(
                "the head gives a record another activation when other records are in its "
                "batch, so a guarantee per record would not hold. Use layers that look at "
                "one record at a time"
            )


def check_random(task: SplitTask, config: Config, head: nn.Module) -> None:
    """Refuse a head that is declared random and is not drawn from the run's seed.

    Raises
    ------
    SplitError
        Another seed gives the same weights, or the weights are not those of this seed.
    """
    drawn = _weights(build_segments(task, config)[0])
    other = {**config, "seed": config["seed"] ^ _OTHER_SEED}
    redrawn = _weights(build_segments(task, other)[0])
    for name, weight in _weights(head).items():
        if not torch.equal(weight, drawn[name]):
            raise SplitError(
                f"option 'head' is 'random', but the head's {name!r} is not what the run's "
                "seed gives: initial weights were given. Declare head = 'public' if they come "
                "from public data only"
            )
    matrices = [name for name, weight in drawn.items() if weight.ndim > 1]
    for name in matrices:
        if torch.equal(drawn[name], redrawn[name]):
            raise SplitError(
                f"option 'head' is 'random', but the head's {name!r} is the same for every "
                "seed: it is not drawn at random. Declare head = 'public' if it does not "
                "depend on private data"
            )


def check_specs(cut: Sequence[TensorSpec], release: str) -> None:
    """Refuse activations that noise cannot be added to.

    Raises
    ------
    SplitError
        One is not a floating-point tensor, or `central-dp` or `class-scores` get more than
        one vector.
    """
    if not all(spec.dtype.is_floating_point for spec in cut):
        raise SplitError(
            f"the head gives {describe(cut)}; a release with epsilon needs floating-point "
            "activations"
        )
    if release in ("central-dp", "class-scores") and (len(cut) != 1 or len(cut[0].shape) != 1):
        raise SplitError(
            f"the head gives {describe(cut)}; {release} needs one vector per record, such as "
            "float32[256]: pool or flatten in the head"
        )


def _weights(head: nn.Module) -> Mapping[str, Tensor]:
    return {k: v for k, v in head.state_dict().items() if v.is_floating_point()}
