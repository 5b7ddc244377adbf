"""Who the parties are: own identities, and whether to believe the others' introductions."""

from __future__ import annotations

from collections.abc import Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log

from flwr_clicooper.chain.roles import OWNER, RELAY, TRAINER, role_of
from flwr_clicooper.options import node_path
from flwr_clicooper.privacy.sealing import Introduction, check
from flwr_clicooper.provenance.keys import Identity, PublicIdentity, verify
from flwr_clicooper.provenance.trust import Pins, Trust

_RUN_ONLY = "identity.pem"


def own_identity(node_config: Mapping[str, Any], folder: Path) -> Identity:
    """Return the node's identity: the one of ``identity-key``, or one for this run only.

    Parameters
    ----------
    folder : Path
        The node's state in the run, where an identity for this run only is kept.

    Raises
    ------
    OptionError, StateError
        ``identity-key`` is not a path, or its file is not a key that only its owner reads.
    """
    path = node_path(node_config, "identity-key")
    if path:
        return Identity.load(path)
    path = folder / _RUN_ONLY
    if not path.exists():
        Identity.new().save(path)
    return Identity.load(path)


def keep_identity(earlier: Path, folder: Path) -> None:
    """Take over the identity for this run only that an earlier node of a party had."""
    if (earlier / _RUN_ONLY).exists():
        (earlier / _RUN_ONLY).rename(folder / _RUN_ONLY)


def check_peers(
    run: str, peers: Mapping[str, tuple[int, Introduction]], context: Context
) -> None:
    """Refuse introductions that are not of who they must be.

    Parameters
    ----------
    peers : mapping
        Stage (0 for the owner) and introduction, by party name.

    Raises
    ------
    SealError
        An introduction is of another run or party, or is not signed by its identity.
    TrustError
        A key is not the one that must be there.
    """
    for name, (_, introduction) in peers.items():
        check(introduction, run, name, verify)
    check_keys(
        {
            name: (TRAINER if stage else OWNER, stage, PublicIdentity.parse(it.identity))
            for name, (stage, it) in peers.items()
        },
        context,
    )


def check_keys(
    keys: Mapping[str, tuple[str, int, PublicIdentity]],
    context: Context,
    *,
    warn: bool = True,
) -> None:
    """Refuse keys that are not those of who they must be.

    With a ``trust-file``, keys must be those that it lists. Without one, a node that has
    an ``identity-key`` keeps the keys it sees first, beside its own, and warns; a node
    without either can only tell that everybody is the same for the length of this run.
    The relay's key, which may be new in each run, counts only where a trust file lists one.

    Parameters
    ----------
    keys : mapping
        Role, stage (0 for all but trainers) and key, by party name.
    warn : bool
        Whether to warn of keys that nobody vouches for.

    Raises
    ------
    TrustError
        A key is not the one that must be there.
    """
    config = context.node_config
    trust_file, own = node_path(config, "trust-file"), node_path(config, "identity-key")
    if trust_file is not None:
        trust = Trust.load(trust_file)
        for role, stage, key in keys.values():
            if role != RELAY or any(party.role == RELAY for party in trust.parties):
                trust.expect(role, stage, key)
        return
    pins = Pins(own.with_name(f"{own.name}.pins")) if own else None
    new = {
        name: place[2]
        for name, place in keys.items()
        if place[0] != RELAY and (pins is None or pins.check(*place))
    }
    if new and warn and not role_of(config).simulated:
        log(WARNING, "%s", _warning(new, kept=own is not None))


def _warning(new: Mapping[str, PublicIdentity], *, kept: bool) -> str:
    known = [f"{name} {key.fingerprint}" for name, key in new.items()]
    after = "They are kept, and others will be refused." if kept else ""
    return (
        f"no trust-file says who the others are; taken as they came: {', '.join(known)}. A "
        f"relay that lies about keys would not be noticed. {after}"
    ).strip()
