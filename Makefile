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

# Appends rows to benchmarks/results/, then writes what README.md and docs/ say of them. SUITE=full, 20 minutes: all that is
# time or memory, ops and end-to-end programs. DATA: a directory with GSM8K's model_solutions.jsonl, for the trees.
SUITE ?= quick
DATA ?=
bench: setup
	$(PY) benchmarks/run.py --suite $(SUITE) $(if $(DATA),--data $(DATA))
	$(PY) benchmarks/plot.py --readme

# Everything that is claimed of this package on a CPU, some hours: time and memory, with more repetitions and with torch's
# own products, and accuracy, which is no part of SUITE=full.
TREES := $(if $(DATA),--data $(DATA))
bench-all: setup
	$(PY) benchmarks/run.py --suite quick
	$(PY) benchmarks/run.py --suite full $(TREES)
	$(PY) benchmarks/run.py --suite grid --rounds 2
	$(PY) benchmarks/tree_workloads.py $(TREES)
	$(PY) benchmarks/tree_training.py $(TREES)
	$(PY) benchmarks/tree_search.py
	$(PY) benchmarks/embedded_task.py
	$(PY) benchmarks/embedded_search.py
	$(PY) benchmarks/kill_resume.py
	$(PY) benchmarks/demo.py
	$(if $(DATA),$(PY) benchmarks/reward_agreement.py --data $(DATA)/model_solutions.jsonl)
	$(PY) benchmarks/recipe_runs.py
	$(PY) benchmarks/plot.py --readme

plots: setup
	$(PY) benchmarks/plot.py --readme

# Uses the Python that has CUDA's torch, not .venv: it must run where nothing can be downloaded.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf build dist *.egg-info fastpo/*.so runs
