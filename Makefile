# The targets a person types are the ones CI runs. PIP_ARGS chooses a torch, for example
#   make install PIP_ARGS="--extra-index-url <an index with the build you want>"
PYTHON ?= python3
PIP_ARGS ?=
SERVE_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
BROWSER_VENV := .venv-browser
CLIENTS_VENV := .venv-clients
# real traces, if a folder with data/traces stands beside the checkout; else tests and results take seeded stand-ins
HEADWAY_DATA ?= $(patsubst %/traces,%,$(firstword $(wildcard $(CURDIR)/../*/data/traces)))
export HEADWAY_DATA

.PHONY: help install serve test test-browser test-clients test-gpu test-native test-arm bench-gpu bench-peers check results soak clean
help:
	@echo "make serve    set up .venv and serve the embedded model on http://127.0.0.1:8000"
	@echo "make test     set up .venv and run every test this machine can run"
	@echo "make test-native   the compiled operators under AddressSanitizer and UBSan"
	@echo "make test-arm      the same for Arm, compiled and emulated; needs g++-aarch64-linux-gnu and qemu-user-static, and half an hour"
	@echo "make test-browser  the page in headless Chromium, which is set up if it can be; takes the pictures in docs/"
	@echo "make test-clients  clients that others wrote, in a venv of their own: litellm, langchain, lm-eval, schemathesis, aiperf"
	@echo "make test-gpu      the tests of CUDA operators and recorded steps; needs a CUDA build of torch"
	@echo "make bench-gpu     prefill, decode and blocking on that device, into docs/results/gpu.md"
	@echo "make bench-peers   OpenVINO, llama.cpp, vLLM and transformers on the same CPU, into docs/results/cpu-peers.md; BENCH_ARGS=--quick to try"
	@echo "make soak     200 callers for ten minutes, disconnects and kills of the engine, into docs/results/soak.md"
	@echo "make check    ruff, strict types, import rules"
	@echo "make install  the set-up alone; PIP_ARGS=... is passed to pip"
	@echo "make results  measure again what docs/results says, but for soak, bench-gpu and bench-peers; leave the machine alone meanwhile"

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

$(BROWSER_VENV)/.installed: tests/browser/requirements.txt | $(BIN)/python
	@$(PYTHON) -m venv $(BROWSER_VENV)
	$(BROWSER_VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

test-browser: $(VENV)/.installed $(BROWSER_VENV)/.installed
	@[ -n "$$CHROMIUM" ] || command -v chromium chromium-browser >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || { echo "Install Chromium (Debian, Ubuntu: apt-get install chromium), or set CHROMIUM to its path." >&2; exit 1; }
	@HEADWAY_PYTHON=$(CURDIR)/$(BIN)/python $(BROWSER_VENV)/bin/python -m pytest --confcutdir tests/browser -p no:cacheprovider tests/browser $(TEST_ARGS)

$(CLIENTS_VENV)/.installed: tests/clients/requirements.txt | $(BIN)/python
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

test-clients: $(VENV)/.installed-dev $(CLIENTS_VENV)/.installed
	@HEADWAY_PYTHON=$(CURDIR)/$(BIN)/python $(CLIENTS_VENV)/bin/python -m pytest --confcutdir tests/clients -p no:cacheprovider -p no:dash tests/clients $(TEST_ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test-native: $(VENV)/.installed-dev
	@$(BIN)/python hatch_build.py runs/native -g -O1 -fsanitize=address,undefined -fno-sanitize-recover
	@HEADWAY_NATIVE_FOLDER=$(CURDIR)/runs/native ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" $(BIN)/python -m pytest tests/cpu/test_native.py tests/cpu/test_panels.py tests/cpu/test_layers.py $(TEST_ARGS)

test-arm: $(VENV)/.installed-dev
	@tests/arm/run.sh $(TEST_ARGS)

soak: $(VENV)/.installed-dev
	@$(BIN)/python -m headway.bench.soak

test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest tests/gpu $(TEST_ARGS)

bench-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -m headway.bench.gpu

bench-peers: $(VENV)/.installed-dev
	@$(BIN)/python -m headway.bench.peers $(BENCH_ARGS)

results: $(VENV)/.installed-dev
	@for result in exactness overhead storm answers tiles kernels linear layers quantization start contention multiplex multiplex_simulated door decisions prediction packing blocking goodput goodput_simulated goodput_more; do $(BIN)/python -m headway.bench.$$result || exit 1; done

clean:
	rm -rf $(VENV) $(BROWSER_VENV) $(CLIENTS_VENV)
