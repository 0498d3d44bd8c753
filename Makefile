# make demo: set up and train the demo.  make test: set up and pass the tests.
# make exhaustive: compile every configuration of every kernel for every GPU, some 20 minutes.
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: idle OpenMP threads of several processes wait on each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo test exhaustive clean

demo: .venv/ready
	$(BIN)/fusedshape train demo --out runs

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -n 2
	TRITON_INTERPRET=1 $(PYTEST) -n 2 tests/test_ops.py tests/test_chain.py -k triton
	$(PYTEST) bench --benchmark-disable

exhaustive: .venv/ready
	$(PYTEST) -n 2 -m exhaustive tests/kernels

.venv/ready: pyproject.toml constraints.txt csrc/cpu/*
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/fusedshape build --optional
	touch $@

clean:
	rm -rf .venv fusedshape/_native
