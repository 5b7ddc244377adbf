"""Every error this package raises on purpose.

The text of an error may travel to the ServerApp and into logs, so it never holds
a data value, a label or a key: it names who, where, and what is allowed.
"""

from __future__ import annotations


class CooperError(Exception):
    """Root of all errors of this package."""


class OptionError(CooperError):
    """A run option or node option is unknown or has a value that is not allowed."""


class RoleError(CooperError):
    """The federation's roles do not form a chain: missing, doubled or wrong."""


class SplitError(CooperError):
    """A model cannot be cut as asked, or its segments do not fit each other."""


class DataError(CooperError):
    """The owner's data set is empty, badly shaped, or its labels are out of range."""


class MessageError(CooperError):
    """A message is malformed, out of order, or holds a tensor that must be refused."""


class StateError(CooperError):
    """Stored state is missing, damaged, or not of the version the message is for."""


class ClientError(CooperError):
    """A client answered with an error; the text names the client and its reason.

    ``node_id`` is the client, or 0 where it is not known. ``refused`` says that the client
    found a fault in what it got, and would find it again.
    """

    def __init__(self, text: str, node_id: int = 0, *, refused: bool = False) -> None:
        super().__init__(text)
        self.node_id = node_id
        self.refused = refused


class ClientTimeoutError(ClientError):
    """A client did not answer in time, or cannot be reached."""


class DeliveryError(CooperError):
    """A delivered segment or a saved model is not what it should be."""


class FrameError(CooperError):
    """Bytes on a live link are not a frame, are too large, or come from a stranger."""


class LinkError(CooperError):
    """A live link cannot be made, or broke and did not come back."""


class PrivacyBudgetExceeded(CooperError):  # noqa: N818 - the name users know from the field
    """A release would cost more privacy than was allowed; nothing was released."""


class TrustError(CooperError):
    """A key or a signature is not that of a party that is trusted in this place."""


class SealError(CooperError):
    """A sealed message does not open, or is not the one that belongs in its place."""


class EvidenceError(CooperError):
    """A signed statement, a log or an opened commitment is not what it must be."""
