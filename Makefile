# make test | make bench | make charlm | make check | make fuzz | make compile-matrix: each sets up .venv first, a
# second run is quick.
PYTHON ?= python3
BIN := .venv/bin
# The oldest Triton that is supported, beside the tested one; inside .venv, where clean finds it.
OLDEST := .venv/triton-3.6.0

.PHONY: test bench charlm check fuzz compile-matrix clean

test: .venv/ready
	@echo "make test: some 3,600 tests (those marked gpu only where there is one); plan half an hour or more on two slow cores."
	$(BIN)/python -m pytest

# ARGS: any of the options that `pytest bench --help` lists, e.g. make bench ARGS="--sweep smallest"
bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

# ARGS: any of the options that `python -m bench.charlm --help` lists, e.g. make charlm ARGS="--compare"; to go on
# with what the last one trained, ARGS=--resume
charlm: .venv/ready
	$(BIN)/python -m bench.charlm $(ARGS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Random calls beside nn.RNN's; some minutes.  ARGS: e.g. make fuzz ARGS="--cases 100000 --seed 1000"
fuzz: .venv/ready
	$(BIN)/python -m tests.fuzz $(ARGS)

# Compiles for GPUs that are not here, into results/compile/; takes most of an hour on two cores.
# ARGS: e.g. make compile-matrix ARGS="--targets sm_90"
compile-matrix: .venv/ready $(OLDEST)/ready
	$(BIN)/python -m tests.cross_compile rows $(ARGS)
	$(OLDEST)/bin/python -m tests.cross_compile rows $(ARGS)
	$(BIN)/python -m tests.cross_compile report $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {sys.version.split()[0]}; elman needs 3.10 or newer: make PYTHON=python3.11")'
	@echo "Setting up .venv, once: torch, triton, pytest and the rest, at the versions of constraints.txt. A CPU build"
	@echo "of torch makes 2 GB of it; the CUDA build, which is PyPI's on Linux, is a download of several GB: minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots]'
	@touch $@

# NumPy: what the oldest Triton was made for. By itself: the CUDA build of torch asks for another.
$(OLDEST)/ready: .venv/ready
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt) 'numpy<2.4'
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
