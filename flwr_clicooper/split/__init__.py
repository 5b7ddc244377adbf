"""The model: where it can be cut, and one segment's forward, backward and state.

Public names come from `flwr_clicooper`; this package stays empty, since the relay
imports `batches` and must not load PyTorch.
"""
