# Two commands matter: `make demo` and `make test`. Both set up a private environment in .venv first.
PYTHON ?= python3
# The CPU build of this torch is small where the package index offers one; set TORCH= to choose another.
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python

# OpenMP threads that wait asleep: those that spin make training some 20 times slower where other programs run too.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test lint bench bench-all plots gpu-check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/host/*.cpp csrc/host/*.h)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH) "setuptools>=77" wheel pybind11 ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup
	$(VENV)/bin/fastpo demo --output_dir runs/demo

# As many processes as cores, of one thread each: twice as fast as one process with all threads.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Appends rows to benchmarks/results/results.csv, then writes what README.md and docs/ say of them. SUITE=full: 20 minutes.
SUITE ?= quick
bench: setup
	$(PY) benchmarks/run.py --suite $(SUITE)
	$(PY) benchmarks/plot.py --readme

# Everything that has rows, some hours: the ops, the grid of the fused heads, the end-to-end programs, the embedded task.
bench-all: setup
	$(PY) benchmarks/run.py --suite full
	$(PY) benchmarks/run.py --suite grid --rounds 2
	$(PY) benchmarks/tree_workloads.py
	$(PY) benchmarks/tree_training.py
	$(PY) benchmarks/tree_search.py
	$(PY) benchmarks/embedded_task.py
	$(PY) benchmarks/plot.py --readme

plots: setup
	$(PY) benchmarks/plot.py --readme

# Uses the Python that has CUDA's torch, not .venv: it must run where nothing can be downloaded.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf build dist *.egg-info fastpo/*.so runs
