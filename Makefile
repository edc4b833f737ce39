# Every target sets up what it needs: a machine with Python and make is enough.
#
#   make PYTHON=python3.12 test      another interpreter
#   make test ARGS="-k header -x"    arguments for pytest, the benchmark or the demo
#   make test WORKERS=8              more processes

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 3
ARGS    ?=
KEEP    ?= torch==2.13.0

ATHERIS ?= atheris==3.0.0
SECONDS ?= 60
TARGETS ?= header header_json index config adapter adapter_weights recipe_yaml recipe_toml \
           recipe_json manifest grid scores pickle_rows archive

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install -q
SOURCES  = $(wildcard uipe_merge tests benchmarks examples docs tools)

# Stamps: set-up is repeated only when what it depends on has changed.
VENV_OK := $(VENV)/.stamp-venv
RUN_OK  := $(VENV)/.stamp-run
DEV_OK  := $(VENV)/.stamp-dev

BUILT_FROM := pyproject.toml constraints.txt $(wildcard uipe_merge/arithmetic/*.[ch])

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check lint types format docs bench faults fuzz audit wheel extras sbom constraints \
        clean

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

# An editable installation is not compiled to bytecode, as one that is copied is: where Python may not
# write any, every start would compile the package again.
COMPILE := $(BIN)/python -m compileall -q uipe_merge

$(RUN_OK): $(VENV_OK) $(BUILT_FROM)
	@$(PIP) -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

# Includes all of the above, hence both stamps.
$(DEV_OK): $(VENV_OK) $(BUILT_FROM)
	@$(PIP) -c constraints.txt -e '.[plot,study,lm-eval,mergekit,ray,docs,dev]'
	@$(COMPILE)
	@touch $(RUN_OK) $@

# ---------------------------------------------------------------------- use

demo: $(RUN_OK) ## build a tiny pair of models, merge it, show the effect (offline)
	@$(BIN)/uipe-merge demo $(ARGS)

# ------------------------------------------------------------------- checks

# One torch thread a process: the workers already share out the cores. Three keep two cores busy:
# many tests wait for a process of their own or for a server.
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

# atheris has its own place: it is no library of the program, and wheels are for few machines.
fuzz: $(DEV_OK) ## fuzz every target, SECONDS each (60); or TARGETS="index adapter"
	@[ -d $(VENV)-fuzz ] || { $(PIP) --only-binary :all: --target $(VENV)-fuzz.tmp '$(ATHERIS)' && \
	  mv $(VENV)-fuzz.tmp $(VENV)-fuzz; }
	@export PYTHONPATH="$(VENV)-fuzz$${PYTHONPATH:+:$$PYTHONPATH}" OMP_NUM_THREADS=1; \
	for target in $(TARGETS); do \
	  echo "== $$target, $(SECONDS) s"; \
	  $(BIN)/python tests/fuzz/fuzz_one.py $$target $(SECONDS) .fuzz > .fuzz-$$target.log 2>&1 || { \
	    tail -40 .fuzz-$$target.log; exit 1; }; \
	  grep -E '^stat::(number_of_executed|new_units|peak)' .fuzz-$$target.log; \
	done

audit: $(DEV_OK) ## look for known holes in what is pinned
	$(BIN)/python tools/audit.py constraints.txt

bench: $(DEV_OK) ## time and memory against mergekit, written to docs/performance.md
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(DEV_OK) ## the site, in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# ------------------------------------------------------------------ release

wheel: $(DEV_OK) ## sdist and wheel in dist/, checked
	@rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# Downloads all of it for each: minutes, and gigabytes of disk for one at a time.
extras: $(DEV_OK) ## each extra alone in an environment of its own
	$(BIN)/python tests/extras_alone.py $(ARGS)

sbom: $(DEV_OK) ## what a release was tested with, as CycloneDX, in dist/
	@mkdir -p dist
	$(BIN)/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml \
	  --output-reproducible --output-format JSON \
	  --output-file dist/uipe_merge-$$($(BIN)/python -c 'import uipe_merge; print(uipe_merge.__version__)').cdx.json

# From ranges to the newest set that satisfies them; run `make check` before keeping it.
# torch moves on purpose only (KEEP=): the published figures were measured with this one.
# Local labels (+cpu) and the CUDA libraries, which torch pins itself, depend on the machine.
constraints: ## resolve the dependencies anew into constraints.txt
	@rm -rf $(VENV)-resolve
	@$(PYTHON) -m venv $(VENV)-resolve
	$(VENV)-resolve/bin/python -m pip --disable-pip-version-check install -q '.[all,docs,dev]' $(KEEP)
	@{ grep '^#' constraints.txt; \
	   $(VENV)-resolve/bin/python -m pip --disable-pip-version-check freeze --exclude uipe-merge \
	   | sed 's/+[A-Za-z0-9.]*$$//' | grep -v -i -E '^(nvidia|cuda|triton)'; } > constraints.tmp
	@mv constraints.tmp constraints.txt
	@rm -rf $(VENV)-resolve

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) $(VENV)-resolve $(VENV)-fuzz $(VENV)-fuzz.tmp .fuzz .fuzz-*.log dist build site
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
