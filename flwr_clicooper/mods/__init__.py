"""Flower mods: each works alone in any ClientApp, configured by keyword.

``ClientApp(mods=[ActivationDPMod(record="embeddings", epsilon=2.0, releases=5)])``.
Neither importing this package nor making a mod imports PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_clicooper.mods.activation_dp import ActivationDPMod
    from flwr_clicooper.mods.attestation import AttestationMod
    from flwr_clicooper.mods.seal import SealMod, passed_on
    from flwr_clicooper.mods.secret_labels import SecretLabelMod

_LAZY = {
    "ActivationDPMod": "flwr_clicooper.mods.activation_dp",
    "AttestationMod": "flwr_clicooper.mods.attestation",
    "SealMod": "flwr_clicooper.mods.seal",
    "SecretLabelMod": "flwr_clicooper.mods.secret_labels",
    "passed_on": "flwr_clicooper.mods.seal",
}

__all__ = ["ActivationDPMod", "AttestationMod", "SealMod", "SecretLabelMod", "passed_on"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
