# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first, with the pinned versions.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit slow schema clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:
	@echo "make setup   make $(VENV) with the pinned versions"
	@echo "make demo    the whole pipeline on the embedded synthetic data (about 2 minutes on 2 cores)"
	@echo "make test    lint, types, tests"
	@echo "make slow    the tests that take minutes each"
	@echo "make schema  write tune_configs/schema.json anew"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it, or name one: make $@ PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,search]'
	@touch $@

demo: setup
	$(BIN)/distill-ray run tune_configs/glyph62.yaml

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -m "not slow"

slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

schema: setup
	$(BIN)/python -c 'import json; from distill_ray.config import json_schema; print(json.dumps(json_schema(), indent=1))' > tune_configs/schema.json
