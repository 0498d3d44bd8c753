# make demo: set up and train the demo.  make test: set up and pass the tests.
# make docs: build the documentation into build/docs.
# make test-newest: pass them with the newest torch, after every change to ops.
# make gpu: nine minutes on an NVIDIA GPU, with whatever Python, torch and triton $(PYTHON) has.
# make wheel: a source distribution, and a wheel with compiled CPU libraries, into dist.
# make exhaustive: compile every configuration of every kernel for every GPU, diagnose hundreds of
#   nets; half an hour.
PYTHON ?= python3
BIN := .venv/bin
# One thread a process: idle OpenMP threads of several processes wait on each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
# Two workers; whoever has run its half takes over tests of the other's.
WORKERS := -n 2 --dist worksteal
# Triton reads TRITON_INTERPRET once, when it is imported: hence a run of their own.
INTERPRETED := tests/kernels/test_*_interpreted.py tests/ops/test_ops.py tests/ops/test_chain.py \
	-k 'interpreted or triton'
SPHINX := $(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
# Compiling csrc, checking types and building the documentation take one core each.
MAKEFLAGS += --jobs=2

.PHONY: demo test check docs wheel test-newest exhaustive gpu clean

demo: .venv/ready
	$(BIN)/fusedshape train demo --out runs

test: .venv/ready check docs
	$(PYTEST) $(WORKERS) fusedshape tests bench --benchmark-disable
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) $(INTERPRETED)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages in docs/ and the API from the docstrings; a warning is an error.
docs: .venv/installed
	$(SPHINX)
	@echo open build/docs/index.html

# Not isolated, because csrc needs a torch to compile against.
wheel: .venv/installed
	FUSEDSHAPE_LIBRARIES=1 $(BIN)/python -m build --no-isolation --outdir dist

# The other end of the range of torch versions that is promised: by hand, after every change to ops.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/fusedshape build --optional
	.venv-newest/bin/python -c 'import torch; print("torch", torch.__version__)'
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest $(WORKERS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-newest/bin/pytest $(WORKERS) $(INTERPRETED)

exhaustive: .venv/ready
	$(PYTEST) $(WORKERS) -m exhaustive

gpu:
	$(PYTHON) -m bench.gpu --out runs/gpu

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/ready: .venv/installed csrc/cpu/* csrc/host/*
	$(BIN)/fusedshape build --optional
	touch $@

clean:
	rm -rf .venv .venv-newest fusedshape/_native build dist
