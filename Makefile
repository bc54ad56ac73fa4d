# Every target sets itself up: the first one makes $(VENV), later ones find it.
PYTHON ?= python3
VENV ?= .venv
# of the demo: pvt or twins
BACKBONE ?= pvt

python := $(VENV)/bin/python
installed := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-all lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(installed) ## train, convert, cost and compare a small model on embedded data
	@$(python) -m ecoformer demo --backbone $(BACKBONE)

test: $(installed) ## all tests but the slow ones
	@$(python) -m pytest -n logical --maxprocesses 4 --dist worksteal

test-all: $(installed) ## all tests
	@$(python) -m pytest -m ""

lint: $(installed) ## ruff, who may import whom, mypy
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-logo --no-cache
	@$(python) -m mypy

clean: ## remove the environment and all caches; runs/ stays
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find ecoformer pvt twins tests -name __pycache__ -prune -exec rm -rf {} +

$(installed): pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null \
	  || { echo "error: no $(PYTHON) here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), older than Python 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv), then repeat" >&2; exit 1; }
	@echo "installing into $(VENV); PyTorch is large, so the first time takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(python) -m pip install -qq "pip>=22.3"
	@$(python) -m pip install -qq --editable ".[dev]"
	@touch $@
