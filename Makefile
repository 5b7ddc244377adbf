# Everything runs in a virtual environment of its own, made on the first call and again
# only when what it installs has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow lint bench clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[test,lint]'
	@touch $@

demo: $(INSTALLED)  ## Train the quickstart in a Flower simulation and beside it un-split
	$(BIN)/python examples/quickstart/demo.py

test: $(INSTALLED)  ## All tests but the slow ones
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)  ## Tests that start no Flower process
	$(BIN)/python -m pytest -m 'not simulation and not deployment'

test-slow: $(INSTALLED)  ## Tests that take minutes each, which `make test` leaves out
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## Time, messages, memory, privacy mechanisms, provenance; writes benchmarks/results
	$(BIN)/python benchmarks/chain.py
	$(BIN)/python benchmarks/links.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/mechanisms.py
	$(BIN)/python benchmarks/protection.py
	$(BIN)/python benchmarks/provenance.py
	$(BIN)/python benchmarks/watermark.py

clean:  ## Remove the virtual environment, caches and runs
	rm -rf $(VENV) runs .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
