# make demo: set up and train the demo.  make test: set up and pass every test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/ready
	$(BIN)/fusedshape train demo --out runs

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/test_ops.py -k triton
	$(BIN)/pytest bench --benchmark-disable

.venv/ready: pyproject.toml constraints.txt csrc/cpu/*
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/fusedshape build --optional
	touch $@

clean:
	rm -rf .venv fusedshape/_native
