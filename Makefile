# The few commands of this repository; CI and pre-commit run the same ones.
# Needs make and Python 3.11 or newer with venv (Debian, Ubuntu: apt install make python3-venv).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where no NVIDIA GPU is found, torch is first tried from here: a CPU build of 200 MB instead of several GB.
# Empty, or not reachable: torch comes from pip's own index like everything else.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

PYTHON_FILES := services kernels tests docker/compose_test.py $(if $(wildcard loadtest/*.py loadtest/*/*.py),loadtest)
TORCH := $(shell sed -n 's/.*"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml | head -n 1)
heading = @printf '\n== %s\n'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # the gate's steps in their order
.PHONY: help up test audit compose-test check lint types imports unit format protos settings-table clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

up: $(VENV)/.local  ## install what one machine needs, then start everything on it
	@exec $(BIN)/forepage up

test: $(VENV)/.dev lint types imports unit  ## the gate: format, lint, types, import rules, tests

compose-test: $(VENV)/.dev  ## build the images and try the stack of compose.yaml; needs Docker, or root on Debian
	@$(BIN)/python docker/compose_test.py $(COMPOSE_TEST)

audit: $(VENV)/.dev  ## known vulnerabilities of the installed packages; needs the network
	@$(BIN)/python -m pip install --quiet 'pip-audit>=2.7'
	@$(BIN)/pip-audit --skip-editable --progress-spinner off

check: $(VENV)/.dev lint types imports  ## the gate without the tests

lint: $(VENV)/.dev
	$(heading) 'ruff format --check'
	@$(BIN)/ruff format --check $(PYTHON_FILES)
	$(heading) 'ruff check'
	@$(BIN)/ruff check $(PYTHON_FILES)

types: $(VENV)/.dev
	$(heading) 'mypy'
	@$(BIN)/mypy $(PYTHON_FILES)

imports: $(VENV)/.dev
	$(heading) 'lint-imports'
	@$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(heading) 'pytest'
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not gpu' -n 2 --dist loadfile

format: $(VENV)/.dev  ## rewrite the files the way the gate wants them
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/ruff check --fix $(PYTHON_FILES)

protos: $(VENV)/.dev  ## generate the gRPC stubs again
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services \
	  --grpc_python_out=services protos/forepage/rpc/*.proto

settings-table: $(VENV)/.local  ## write docs/settings.md again
	$(BIN)/forepage settings-table > docs/settings.md

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find services kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "forepage needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@if [ -n '$(TORCH_INDEX_URL)' ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	  ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo 'no GPU found: looking for a CPU build of torch at $(TORCH_INDEX_URL)'; \
	  $(BIN)/python -m pip install --quiet --retries 0 --timeout 10 --index-url '$(TORCH_INDEX_URL)' '$(TORCH)' \
	    || echo 'not found there: torch comes from the default index'; \
	fi
	@touch $@

$(VENV)/.local: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[local]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.local
