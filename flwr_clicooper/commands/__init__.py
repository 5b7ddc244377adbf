"""Commands of ``clicooper`` that are too large for `flwr_clicooper.cli`."""
