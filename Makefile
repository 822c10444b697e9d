# The targets a person types are the ones CI runs. PIP_ARGS chooses a torch, for example
#   make install PIP_ARGS="--extra-index-url <an index with the build you want>"
PYTHON ?= python3
PIP_ARGS ?=
SERVE_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# real traces, if a folder with data/traces stands beside the checkout; else tests and results take seeded stand-ins
HEADWAY_DATA ?= $(patsubst %/traces,%,$(firstword $(wildcard $(CURDIR)/../*/data/traces)))
export HEADWAY_DATA

.PHONY: help install serve test check results clean
help:
	@echo "make serve    set up .venv and serve the embedded model on http://127.0.0.1:8000"
	@echo "make test     set up .venv and run every test this machine can run"
	@echo "make check    ruff, strict types, import rules"
	@echo "make install  the set-up alone; PIP_ARGS=... is passed to pip"
	@echo "make results  measure again what docs/results says; leave the machine alone meanwhile"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headway needs Python 3.11 or newer: set PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@$(BIN)/headway serve $(SERVE_ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(TEST_ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

results: $(VENV)/.installed-dev
	@for result in exactness overhead storm answers tiles decisions prediction packing blocking goodput goodput_simulated goodput_more; do $(BIN)/python -m headway.bench.$$result || exit 1; done

clean:
	rm -rf $(VENV)
