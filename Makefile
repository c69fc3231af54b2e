# Every target does its own set-up. The first one makes .venv and takes a minute or two; later ones start at once.
#
#   make demo      run the first notebook for real and say what it did
#   make test      formatter, linter, type checker and all tests
#   make matrix    the notebook tests on ipykernel 6.31, 7.3 and the newest 7
#   make lab       open the notebooks in JupyterLab
#   make bench     nbray beside Ray, dask and ProcessPoolExecutor
#   make format    apply the formatter and the linter's fixes
#   make lock      write constraints.txt anew from what the package index offers today
#   make clean     remove build outputs and caches (the environment stays: rm -r .venv)
#
# PYTHON=python3.12 chooses the interpreter, VENV=.venv3.12 another environment. PYTEST="-k store -x" and
# BENCH="..." MATRIX="6.31.* -- -k interrupt" are passed on.

SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST ?=
BENCH ?=
MATRIX ?=
PYTHON ?=
export PYTHON

SOURCES := nbray tests tools $(wildcard benchmarks)
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help moved venv demo test matrix lab bench format lock clean check-format check-lint check-types check-tests

help:
	@sed -n 's/^#   make /  make /p' Makefile

# One stamp per set of extras, each a no-op until the metadata changes or the checkout has moved.
MOVED := $(if $(wildcard $(VENV)/.nbray-checkout),$(filter-out $(CURDIR),$(file <$(VENV)/.nbray-checkout)))
$(VENV)/.nbray-%: pyproject.toml constraints.txt tools/venv.sh $(if $(MOVED),moved)
	@tools/venv.sh $(VENV) $*
	@touch $@

moved:

venv: $(VENV)/.nbray-test

demo: $(VENV)/.nbray-demo
	@$(PY) tools/demo.py notebooks/01-first-cluster.ipynb

# All four always run, so one report shows everything; pytest comes last.
test: $(VENV)/.nbray-test
	@$(MAKE) --no-print-directory --keep-going -j1 check-format check-lint check-types check-tests

check-format: $(VENV)/.nbray-test
	$(PY) -m ruff format --check --output-format concise $(SOURCES)

check-lint: $(VENV)/.nbray-test
	$(PY) -m ruff check $(SOURCES)

check-types: $(VENV)/.nbray-test
	$(PY) -m mypy

check-tests: $(VENV)/.nbray-test
	$(PY) -m pytest $(PYTEST)

matrix: $(VENV)/.nbray-test
	@$(PY) tools/matrix.py $(MATRIX)

lab: $(VENV)/.nbray-lab
	$(PY) -m jupyterlab $(ROOT_FLAG) notebooks/01-first-cluster.ipynb

bench: $(VENV)/.nbray-bench
	$(PY) -m benchmarks $(BENCH)

format: $(VENV)/.nbray-test
	$(PY) -m ruff check --fix $(SOURCES); $(PY) -m ruff format $(SOURCES)

lock:
	@PYTHON="$(PYTHON)" tools/lock.sh

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find nbray tests tools $(wildcard benchmarks notebooks) -name __pycache__ -type d -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -type d -prune -exec rm -rf {} + 2>/dev/null || true
