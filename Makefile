# cutset: needs python >= 3.11, make and git; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
COPY   := build/checked

# Processes that run the tests; each takes a core and about 2 GiB. With 0 there is only this one.
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --no-loadscope-reorder

# Two or more processes share the cores in most tests: one thread each is fastest and repeatable.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check golden bench clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

install: $(STAMP) ## make .venv with torch, the tools and cutset (editable)

demo: $(STAMP) ## partition a GPT-2 over 4 local processes, train, infer, compare
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests (minutes)
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## run the tests, the slow ones too
	$(PYTEST)

check: $(STAMP) ## lint, format, types, import contracts, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $(COPY) .
	cd $(COPY) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p cutset
	cd $(COPY) && $(CURDIR)/$(BIN)/lint-imports --no-logo --config $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.import_linter_cache
	cd $(COPY) && $(CURDIR)/$(BIN)/python -m pytest -q --doctest-modules --noconftest \
	    -c $(CURDIR)/pyproject.toml --rootdir . -p no:cacheprovider cutset

golden: $(STAMP) ## rewrite the golden files; review the diff before committing it
	$(BIN)/python -m pytest -q --update-golden

bench: $(STAMP) ## print the tables of benchmarks/ and write their JSON to out/
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file; done

clean: ## remove builds, caches and outputs; .venv stays
	rm -rf build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first, under the same pins: installed later, it could come in as another build.
$(STAMP): requirements-torch.txt requirements-dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "cutset needs Python 3.11 or later, found: $(PYTHON)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-torch.txt -c requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c requirements-torch.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
