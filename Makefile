# Every target sets up what it needs: a machine with Python and make is enough.
#
#   make PYTHON=python3.12 test      another interpreter
#   make test ARGS="-k header -x"    arguments for pytest, the benchmark or the demo
#   make test WORKERS=8              more processes

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=
KEEP    ?= torch==2.13.0

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install -q
SOURCES  = $(wildcard uipe_merge tests benchmarks examples)

# Stamps: set-up is repeated only when what it depends on has changed.
VENV_OK := $(VENV)/.stamp-venv
RUN_OK  := $(VENV)/.stamp-run
DEV_OK  := $(VENV)/.stamp-dev

BUILT_FROM := pyproject.toml constraints.txt $(wildcard uipe_merge/arithmetic/*.[ch])

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check lint types format bench faults wheel constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

# ------------------------------------------------------------------- set-up

$(VENV_OK):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "setting up $(VENV); the first time this downloads PyTorch and takes some minutes" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUN_OK): $(VENV_OK) $(BUILT_FROM)
	@$(PIP) -c constraints.txt -e .
	@touch $@

# Includes all of the above, hence both stamps.
$(DEV_OK): $(VENV_OK) $(BUILT_FROM)
	@$(PIP) -c constraints.txt -e '.[plot,study,dev]'
	@touch $(RUN_OK) $@

# ---------------------------------------------------------------------- use

demo: $(RUN_OK) ## build a tiny pair of models, merge it, show the effect (offline)
	@$(BIN)/uipe-merge demo $(ARGS)

# ------------------------------------------------------------------- checks

# One torch thread a process: the workers already share out the cores.
test: $(DEV_OK) ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(DEV_OK) ## ruff: rules and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(DEV_OK) ## mypy, strict
	$(BIN)/mypy $(SOURCES)

check: lint types test ## lint + types + test: what a change has to pass

format: $(DEV_OK) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# ARGS="--hazard-table=docs/faults.md" writes down what was counted.
faults: $(DEV_OK) ## every hazard, and the long fault-injection sweeps; the counts as a table
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "sweep or not sweep" --hazards \
	  -n $(WORKERS) --dist worksteal --timeout 3600 $(ARGS)

bench: $(DEV_OK) ## time and memory against mergekit, written to docs/performance.md
	$(BIN)/python benchmarks/run.py $(ARGS)

# ------------------------------------------------------------------ release

wheel: $(DEV_OK) ## sdist and wheel in dist/, checked
	@rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# From ranges to the newest set that satisfies them; run `make check` before keeping it.
# torch moves on purpose only (KEEP=): the published figures were measured with this one.
# Local labels (+cpu) and the CUDA libraries, which torch pins itself, depend on the machine.
constraints: ## resolve the dependencies anew into constraints.txt
	@rm -rf $(VENV)-resolve
	@$(PYTHON) -m venv $(VENV)-resolve
	$(VENV)-resolve/bin/python -m pip --disable-pip-version-check install -q '.[plot,study,dev]' $(KEEP)
	@{ grep '^#' constraints.txt; \
	   $(VENV)-resolve/bin/python -m pip --disable-pip-version-check freeze --exclude uipe-merge \
	   | sed 's/+[A-Za-z0-9.]*$$//' | grep -v -i -E '^(nvidia|cuda|triton)'; } > constraints.tmp
	@mv constraints.tmp constraints.txt
	@rm -rf $(VENV)-resolve

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) $(VENV)-resolve dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
