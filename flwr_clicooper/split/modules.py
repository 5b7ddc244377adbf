"""Small helpers for modules: seeds, modes, weights."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from flwr_clicooper.errors import SplitError


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed all generators that a model or a data set may use; restore them after it.

    PyTorch's on the CPU and on ``device``, NumPy's global one, and Python's.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Give every part of a module its train or eval mode back after the block."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], who: str) -> None:
    """Load weights into a module, all or nothing.

    Raises
    ------
    SplitError
        Names or shapes do not match; the text lists up to three differences.
    """
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [
        f"{k}: {own.get(k, 'absent')} in the model, {given.get(k, 'absent')} in the file"
        for k in sorted(own.keys() | given.keys())
        if own.get(k) != given.get(k)
    ]
    if wrong:
        raise SplitError(f"{who}: the weights do not fit: {'; '.join(wrong[:3])}")
    module.load_state_dict(dict(weights))


def check_unshared(segments: Sequence[nn.Module]) -> None:
    """Refuse segments that share a parameter or a buffer.

    Raises
    ------
    SplitError
        Two segments hold the same tensor; trained apart, the copies would diverge.
    """
    seen: dict[int, tuple[int, str]] = {}
    for index, segment in enumerate(segments):
        named = [*segment.named_parameters(), *segment.named_buffers()]
        for name, tensor in named:
            other, first = seen.setdefault(id(tensor), (index, name))
            if other != index:
                raise SplitError(
                    f"segment {other} ({first}) and segment {index} ({name}) share a "
                    "tensor; a cut must leave every parameter and buffer on one side"
                )
