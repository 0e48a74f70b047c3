# make test | make bench | make check: each sets up .venv first, a second run is quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test bench check clean

test: .venv/ready
	$(BIN)/python -m pytest

# ARGS: any of the options that `pytest bench --help` lists, e.g. make bench ARGS="--sweep smallest"
bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {sys.version.split()[0]}; elman needs 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
