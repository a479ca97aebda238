PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# idle threads give their core back soon: on a shared machine the default is up to 20 times slower
export GOMP_SPINCOUNT ?= 10000

# where a container sets this, each of the tests' many processes compiles torch's Python anew, for seconds
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell grep '^torch==' constraints.txt)
SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py

# vLLM's CPU build, 3 GB, in an environment of its own
VLLM_VENV ?= $(HOME)/.cache/r1fast/vllm

.PHONY: help demo test test-vllm test-sanitize lint sandbox faults soak bench build format clean

help:      ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 22

demo: build   ## set up, then run the whole R1 recipe small, on the CPU: a table and a report
	@$(BIN)/r1fast pipeline configs/demo.toml

test: lint sandbox ## set up, lint, every test, two at a time (JOBS=2); without a GPU the kernels run under the Triton interpreter
	@$(BIN)/pytest -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: build ## test the vLLM engine against a real vLLM, which is installed first (VLLM_VENV)
	@$(BIN)/python benchmarks/vllm_build.py "$(VLLM_VENV)" && code=0 || code=$$?; \
	if [ $$code = 3 ] && [ -n "$(VLLM_OPTIONAL)" ]; then \
		echo "SKIPPED: the vLLM engine was not tested, as its vLLM could not be installed (see above)"; \
	elif [ $$code != 0 ]; then exit $$code; \
	else R1FAST_VLLM_PYTHON="$(VLLM_VENV)/bin/python" $(BIN)/pytest tests/test_vllm.py $(ARGS); fi

test-sanitize: build ## csrc/ under AddressSanitizer and UBSan: its tests and what fuzzes it, at each CPU level (half an hour)
	@$(BIN)/python tests/sanitize.py $(ARGS)

sandbox:   ## install bubblewrap, in which code rewards run programs, where that is possible
	@command -v bwrap > /dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "set-up: bubblewrap"; export DEBIAN_FRONTEND=noninteractive; \
		apt-get install -qqy bubblewrap > /dev/null 2>&1 \
		|| { apt-get update -qq && apt-get install -qqy bubblewrap; } > /dev/null 2>&1 \
		|| echo "bubblewrap could not be installed: code rewards take a lower rung, its tests are skipped"; \
	else echo "no bubblewrap, and installing it takes root and apt-get: code rewards take a lower rung, its tests are skipped"; fi

lint: build   ## ruff, check and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: build ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

faults: build ## the tests that inject faults; what they tried becomes the table of docs/reliability.md
	@$(BIN)/python tests/fault_table.py

soak: build   ## half an hour of training with random faults: make soak SECONDS=1800 SEED=0 ARGS=--exact
	@PYTHONPATH=tests $(BIN)/python tests/soak.py --seconds $(or $(SECONDS),1800) --seed $(or $(SEED),0) $(ARGS)

bench: build  ## run every benchmark, append to benchmarks/results.csv, rewrite RESULTS.md
	@$(BIN)/pytest -q benchmarks --benchmark-json=benchmarks/kernels.json
	@for program in benchmarks/bench_*.py; do echo "== $$program"; $(BIN)/python "$$program"; done
	@$(BIN)/python benchmarks/common.py

build: .venv/.built  ## set up: .venv, pinned dependencies, csrc/ compiled, r1fast installed in place

clean:     ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info r1fast/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, and removed first when its step is redone: an interrupted set-up starts over.
# Without --no-compile pip would compile 10,000 files, most of which are never imported.
.venv/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("r1fast needs Python 3.11 or newer, " + sys.executable + " is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	@[ -e $@ ] || { echo "set-up 1/4: .venv"; $(PYTHON) -m venv --clear .venv; }
	@rm -f $@
	@echo "set-up 2/4: $(TORCH)"
	@$(PIP) install --no-compile "$(TORCH)"
	@echo "set-up 3/4: $$(grep -c == constraints.txt) pinned packages"
	@# a CUDA build of torch names the triton it needs, and has brought it
	@if $(BIN)/python -c 'import importlib.metadata as m; exit(not any(r.startswith("triton") for r in m.requires("torch")))'; \
	then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi > .venv/requirements.txt
	@$(PIP) install --no-compile -r .venv/requirements.txt
	@touch $@

.venv/.built: .venv/.installed pyproject.toml $(SOURCES)
	@echo "set-up 4/4: csrc/ and r1fast"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
