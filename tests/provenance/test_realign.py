"""A suspect with permuted and scaled units is found; an independent model is not."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper.errors import EvidenceError
from flwr_clicooper.provenance.realign import NULLS, Verdict, judge, realign
from flwr_clicooper.provenance.watermark import ACCEPT, BITS, Watermark

KEY = hashlib.sha256(b"a fixed key for tests").digest()
PROBES = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def network(seed: int) -> nn.Sequential:
    """Return a whole model: a segment of convolutions and a segment of linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
        ),
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(24 * 16, 48),
            nn.BatchNorm1d(48),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(48, 32),
            nn.ReLU(),
            nn.Linear(32, 5),
        ),
    )


def train(module: nn.Sequential, seed: int, steps: int = 25) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(16, 1, 8, 8, generator=generator)
        y = (x.mean(dim=(1, 2)).argmax(dim=1)) % 5
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def marked() -> tuple[nn.Sequential, Watermark]:
    module = network(0)
    train(module, 0)
    watermark = Watermark(KEY, module.state_dict())
    watermark.top_up(module)
    return module, watermark


def shuffled(module: nn.Sequential, seed: int = 1, *, cut: bool = True) -> nn.Sequential:
    """Permute and scale hidden units, at the cut or not; the model computes the same."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)

    def move(out: nn.Module, norm: nn.Module | None, after: nn.Module) -> None:
        units = len(out.weight)
        order = torch.randperm(units, generator=generator)
        one, two = (torch.rand(units, generator=generator) * 3 + 0.3 for _ in range(2))
        if norm is None:
            two = one
        layers = [layer for layer in (out, norm) if layer is not None]
        for layer in layers:
            for tensor in [*layer.parameters(), *layer.buffers()]:
                if tensor.ndim:
                    tensor.data = tensor.data[order]
        out.weight.data *= one.reshape(-1, *[1] * (out.weight.ndim - 1))
        if out.bias is not None:
            out.bias.data *= one
        if norm is not None:
            norm.running_mean *= one
            norm.running_var *= one**2
            norm.weight.data *= two
            norm.bias.data *= two
        weight = after.weight.data.reshape(len(after.weight), units, -1)
        after.weight.data = (weight[:, order] / two[:, None]).reshape(after.weight.shape)

    (a, a_norm, _, b, *_), (_, c, c_norm, _, _, d, _, e) = module
    move(a, a_norm, b)
    if cut:
        move(b, None, c)
    move(c, c_norm, d)
    move(d, None, e)
    return module


def test_permuted_and_scaled_weights_come_back() -> None:
    module, watermark = marked()
    suspect = shuffled(module)
    with torch.no_grad():
        assert torch.allclose(suspect.eval()(PROBES), module.eval()(PROBES), atol=1e-3)
    assert watermark.matches(suspect.state_dict()) < 160
    weights = realign(module, suspect, PROBES)
    assert set(weights) == {
        "0.0.weight",
        "0.3.weight",
        "1.1.weight",
        "1.5.weight",
        "1.7.weight",
    }
    for name, weight in weights.items():
        assert torch.allclose(weight, module.state_dict()[name], rtol=1e-2, atol=1e-3), name
    assert watermark.matches(weights) == BITS


def test_a_segment_alone_is_aligned_by_what_comes_into_it() -> None:
    module, _ = marked()
    first, second = module.eval()
    watermark = Watermark(KEY, second.state_dict())
    watermark.top_up(second)
    with torch.no_grad():
        inputs = first(PROBES)
    inside = shuffled(module, cut=False)[1]
    assert watermark.matches(inside.state_dict()) < ACCEPT
    assert watermark.matches(realign(second, inside, inputs)) == BITS
    # The units before it changed places, too: only the whole model tells which.
    outside = shuffled(module)
    assert watermark.matches(realign(second, outside[1], inputs)) < ACCEPT
    weights = realign(module, outside, PROBES)
    own = {k.removeprefix("1."): v for k, v in weights.items() if k.startswith("1.")}
    assert watermark.matches(own) == BITS


def test_a_fine_tuned_and_shuffled_suspect_is_found_and_null_models_are_not() -> None:
    module, watermark = marked()
    suspect = copy.deepcopy(module)
    train(suspect, 99, steps=15)
    suspect = shuffled(suspect)
    nulls = []
    for seed in range(1, NULLS + 1):
        null = network(seed)
        train(null, seed, steps=3)
        nulls.append(null)
    (verdict,) = judge([("", watermark)], module, suspect, nulls, PROBES)
    assert verdict.accepted
    assert verdict.matches >= ACCEPT
    assert max(verdict.nulls) < ACCEPT
    facts = verdict.as_dict()
    assert facts["nulls"] == NULLS
    assert facts["nulls-max"] == max(verdict.nulls)

    other = network(1000)
    train(other, 1000)
    (refused,) = judge([("", watermark)], module, shuffled(other), nulls, PROBES)
    assert not refused.accepted


def test_what_does_not_exceed_the_null_models_is_not_accepted() -> None:
    module, watermark = marked()
    nulls = [module] * NULLS
    second = Watermark(KEY, module[1].state_dict())
    marks = [("", watermark), ("1.", second)]
    one, two = judge(marks, module, shuffled(module), nulls, PROBES)
    assert one == Verdict(BITS, (BITS,) * NULLS, -255.0, accepted=False)
    assert two.matches < ACCEPT
    (more,) = judge(marks[:1], module, shuffled(module), nulls, PROBES, tests=8)
    assert more.log2_false_positive == -253.0
    with pytest.raises(EvidenceError, match="29 null models; allowed are at least 30"):
        judge(marks, module, module, nulls[1:], PROBES)


def test_models_and_probes_stay_as_they_are() -> None:
    module, _ = marked()
    suspect, probes = shuffled(module), PROBES.clone()
    old = [{k: v.clone() for k, v in m.state_dict().items()} for m in (module, suspect)]
    realign(module.train(), suspect, probes)
    for tensors, now in zip(old, (module, suspect), strict=True):
        assert all(torch.equal(v, now.state_dict()[k]) for k, v in tensors.items())
    assert module.training
    assert torch.equal(probes, PROBES)
    realign(
        nn.Sequential(nn.ReLU(inplace=True), module),
        nn.Sequential(nn.ReLU(True), suspect),
        probes,
    )
    assert torch.equal(probes, PROBES)


def test_silent_units_do_no_harm() -> None:
    module, watermark = marked()
    suspect = shuffled(module)
    with torch.no_grad():
        suspect[1][5].weight[3] = 0.0
        suspect[1][5].bias[3] = 0.0
    assert watermark.matches(realign(module, suspect, PROBES)) >= ACCEPT


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(32, 2))


def jump() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.AdaptiveAvgPool1d(6), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(9, 4), nn.GELU()), "'1', a GELU"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(9, 4), nn.Tanh())), "'0.1', a Tanh"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "'0', a Conv2d with groups"),
        (lambda: nn.MultiheadAttention(4, 2), "'the module', a MultiheadAttention"),
    ],
)
def test_layers_beyond_it_are_named(make: Callable[[], nn.Module], text: str) -> None:
    module = make()
    with pytest.raises(
        EvidenceError, match=f"followed through {text}; allowed are sequentials"
    ):
        realign(module, module, torch.randn(5, 9))


@pytest.mark.parametrize(
    ("make", "probes", "text"),
    [
        (sequence, torch.randn(5, 8, 8), "'0' gives 3 dimensions"),
        (jump, torch.randn(5, 9), "6 inputs after one of 4 units"),
        (jump, torch.full((5, 9), torch.nan), "NaN or infinity"),
    ],
)
def test_inputs_beyond_it_are_named(
    make: Callable[[], nn.Sequential], probes: Tensor, text: str
) -> None:
    with pytest.raises(EvidenceError, match=text):
        realign(make(), make(), probes)


def test_other_layers_are_refused() -> None:
    one = nn.Sequential(nn.Linear(9, 4), nn.ReLU())
    for other in (nn.Sequential(nn.Linear(9, 5), nn.ReLU()), nn.Sequential(nn.Linear(9, 4))):
        with pytest.raises(EvidenceError, match="layers are not those of the reference"):
            realign(one, other, torch.randn(5, 9))
