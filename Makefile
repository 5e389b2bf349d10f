# `make help` lists the targets. Needs GNU make, bash, a C compiler and Python 3.11; everything else
# goes into .venv with plain pip.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first that runs: a name in PATH may be a version manager's stub for what is not chosen or not installed.
BASE_PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && command -v "$$python" && break; done)
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

# Without a working GPU, pip gets the exact versions that CI runs, a CPU build of torch among them.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,--constraint constraints-cpu.txt)

# A second environment proves what must hold on the newest supported megatron-core too: pip has it for Python
# 3.12 and later alone.
PYTHON312 ?= $(shell for python in python3.12 python3; do \
	"$$python" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null && command -v "$$python" && break; done)
INSTALLED_312 := .venv-py312/.installed

# SGLang pins another torch than the trainer, and has an environment of its own.
SGLANG_VERSION := 0.5.23
INSTALLED_SGLANG := .venv-sglang/.installed

# $(call stage,NAME) COMMANDS: say what starts and, however it ends, how long it took.
stage = echo "==> $(1)"; trap 'echo "    $(1): $$SECONDS s"' EXIT;

.PHONY: help install quickstart test parity gpu-proof check format sglang-env test-sglang test-rare env-py312 test-py312 clean

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'

install: $(INSTALLED) ## create .venv with all that the other targets need

quickstart: $(INSTALLED) ## a tiny mixture-of-experts model learns arithmetic: about 5 minutes on 2 cores
	@$(call stage,quickstart) $(PYTHON) examples/quickstart.py

# Two at a time, whatever the machine has: a test may start four ranks, or a trainer and servers, and most have
# time limits.
PARALLEL_TESTS := --numprocesses=2 --dist=worksteal

# One thread per process: tests that start ranks and servers share the cores among them.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED) ## all tests but those with SGLang; PYTEST_ARGS="-k packing" selects
	@$(call stage,tests) $(PYTHON) -m pytest -q $(PARALLEL_TESTS) --durations=15 --durations-min=1 $(PYTEST_ARGS)

parity: $(INSTALLED) ## every loss on every layout with both kinds of layers, against float64: about 30 minutes on 2 cores
	@$(call stage,parity matrix) $(PYTHON) tools/parity.py --matrix --time-limit-s 7200

gpu-proof: $(INSTALLED) ## what only a GPU can show, one table; about 8 minutes on one GPU
	@$(call stage,GPU proof) $(PYTHON) tools/gpu_proof.py

check: $(INSTALLED) ## lint, formatting, types, import contracts
	@$(call stage,lint) .venv/bin/ruff check --quiet
	@$(call stage,formatting) .venv/bin/ruff format --check --quiet || { echo "run: make format"; exit 1; }
	@$(call stage,types) .venv/bin/pyrefly check --summary=none
	@$(call stage,import contracts) .venv/bin/lint-imports --no-logo

format: $(INSTALLED) ## rewrite the sources in the one format
	@.venv/bin/ruff check --quiet --fix --select I
	@.venv/bin/ruff format --quiet

sglang-env: $(INSTALLED_SGLANG) ## create .venv-sglang: the rollout servers' environment (2 GB without a GPU)

test-sglang: export OMP_NUM_THREADS := 1
test-sglang: $(INSTALLED) $(INSTALLED_SGLANG) ## the tests that start real SGLang servers: about 7 minutes
	@$(call stage,tests with SGLang) $(PYTHON) -m pytest -q -m "sglang and not rare" tests/sglang --durations=10 --durations-min=5 $(PYTEST_ARGS)

test-rare: export OMP_NUM_THREADS := 1
test-rare: $(INSTALLED) $(INSTALLED_SGLANG) ## tests of benches that take minutes; not part of CI
	@$(call stage,rare tests) $(PYTHON) -m pytest -q -m rare --durations=10 --durations-min=5 $(PYTEST_ARGS)

env-py312: $(INSTALLED_312) ## create .venv-py312: Python 3.12, megatron-core 0.19.2, a CUDA build of torch (5.6 GB in all)

test-py312: export OMP_NUM_THREADS := 1
test-py312: $(INSTALLED_312) ## the tests of `make test` in .venv-py312; not part of CI
	@$(call stage,tests on Python 3.12) CUDA_VISIBLE_DEVICES='' \
		.venv-py312/bin/python -m pytest -q $(PARALLEL_TESTS) $(PYTEST_ARGS)

clean: ## remove the environments and everything the tools left behind; runs/ stays
	rm -rf .venv .venv-py312 .venv-sglang dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints-cpu.txt
	@test -n "$(BASE_PYTHON)" && "$(BASE_PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 needed: $(if $(BASE_PYTHON),$(BASE_PYTHON) is not,neither python3.11 nor python3 in PATH is); make BASE_PYTHON=/path/to/python3.11"; exit 1; }
	@$(call stage,installing into .venv ($(if $(HAS_GPU),GPU,CPU))) \
		test -x $(PYTHON) || $(BASE_PYTHON) -m venv .venv; \
		$(PYTHON) -m pip install -qq --disable-pip-version-check --progress-bar off \
			$(CONSTRAINTS) --editable '.[dev]'; \
		touch $@

$(INSTALLED_SGLANG): requirements-sglang-cpu.txt
	@$(call stage,installing into .venv-sglang ($(if $(HAS_GPU),GPU,CPU))) \
		test -x .venv-sglang/bin/python || $(BASE_PYTHON) -m venv .venv-sglang; \
		.venv-sglang/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off \
			$(if $(HAS_GPU),sglang==$(SGLANG_VERSION),--no-deps --requirement requirements-sglang-cpu.txt); \
		touch $@

$(INSTALLED_312): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON312)" && "$(PYTHON312)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
		|| { echo "Python 3.12 needed: $(if $(PYTHON312),$(PYTHON312) is not,neither python3.12 nor python3 in PATH is); make env-py312 PYTHON312=/path/to/python3.12"; exit 1; }
	@$(call stage,installing into .venv-py312 (5.6 GB)) \
		test -x .venv-py312/bin/python || "$(PYTHON312)" -m venv .venv-py312; \
		.venv-py312/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off \
			--constraint constraints-cpu.txt --editable '.[test]'; \
		touch $@
