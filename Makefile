# make test | make bench | make gpu | make charlm | make check | make fuzz | make compile-matrix | make ptx: each sets
# up .venv first, a second run is quick.
PYTHON ?= python3
BIN := .venv/bin
# What the tests run on: newest is the tested set of constraints.txt; the others have a .venv inside, where clean
# finds it.
STACK := newest
VENV := $(patsubst %/newest,%,.venv/$(STACK))

.PHONY: test bench gpu charlm check fuzz compile-matrix ptx clean

# STACK: newest, oldest or middle; ARGS: any of pytest's, e.g. make test STACK=oldest ARGS=tests/test_layer.py
test: $(VENV)/ready
	@echo "make test: all tests take ten to thirty minutes on two cores; those marked gpu run where there is one."
	$(VENV)/bin/python -m pytest $(ARGS)

# ARGS: any of the options that `pytest bench --help` lists, e.g. make bench ARGS="--sweep smallest"
bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

# A new GPU, nine minutes: verifies and tunes the kernels, times the layer; into results/ and elman/tuned/.
# ARGS: any of the options that `python -m bench.gpu --help` lists, e.g. make gpu ARGS="--minutes 30"; without a GPU
# ARGS="--device cpu"
gpu: .venv/ready
	$(BIN)/python -m bench.gpu $(ARGS)

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

# Compiles for GPUs that are not here, into results/compile/; takes more than an hour on two cores.
# ARGS: e.g. make compile-matrix ARGS="--targets sm_90"
compile-matrix: .venv/ready .venv/middle/ready .venv/oldest/ready
	$(BIN)/python -m tests.cross_compile rows $(ARGS)
	.venv/middle/bin/python -m tests.cross_compile rows $(ARGS)
	.venv/oldest/bin/python -m tests.cross_compile rows $(ARGS)
	$(BIN)/python -m tests.cross_compile report $(ARGS)

# The kernels as compiled for GPUs that are not here, emulated, into results/ptx/; up to four hours, and
# a second call goes on.  ARGS: e.g. make ptx ARGS="--targets sm_90 --minutes 10"
ptx: .venv/ready .venv/oldest/ready
	$(BIN)/python -m tests.tools.ptxsim rows $(ARGS)
	.venv/oldest/bin/python -m tests.tools.ptxsim rows $(ARGS)
	$(BIN)/python -m tests.tools.ptxsim report $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"{sys.executable} is Python {sys.version.split()[0]}; elman needs 3.10 or newer: make PYTHON=python3.11")'
	@echo "Setting up .venv, once: torch, triton, pytest and the rest, at the versions of constraints.txt. A CPU build"
	@echo "of torch makes 2 GB of it; the CUDA build, which is PyPI's on Linux, is a download of several GB: minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots]'
	@touch $@

# NumPy: with a newer one the interpreter of Triton 3.6 takes no loop to a number of run time. setuptools: torch 2.11
# asks for an older one.
.venv/oldest/ready: VERSIONS := 'numpy<2.4' torch==2.11.0 triton==3.6.0
.venv/middle/ready: VERSIONS := torch==2.13.0 triton==3.7.1
.venv/oldest/ready .venv/middle/ready: .venv/%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv/$*
	grep -vE '^(numpy|setuptools|torch|triton)==' constraints.txt >.venv/$*/constraints.txt
	.venv/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/$*/constraints.txt $(VERSIONS) -e '.[test,plots]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
