# Each command sets up what it needs in .venv first; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
ARGS ?=

.PHONY: serve test lint check soak stubs reference clean

serve: .venv/installed ## serve MODEL (default: the built-in one) on 127.0.0.1:50051 and http://127.0.0.1:8000
	$(BIN)/nanoserve serve $(MODEL) $(ARGS)

test: .venv/installed-dev ## all tests but the soaks, with their coverage
	$(BIN)/python -m pytest -q -m "not soak" --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: .venv/installed-dev ## style, types, and the contract: lint, format, compatibility, stubs in step
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python tools/check_contract.py
	$(BIN)/python tools/generate_stubs.py --check
	$(BIN)/python tools/generate_reference.py --check

check: lint test ## what CI runs, and what one runs before a commit

soak: .venv/installed-dev ## long runs: memory over 10,000 requests, wide fuzzing
	$(BIN)/python -m pytest -q -m soak $(ARGS)

stubs: .venv/installed-dev ## regenerate the client's stubs from protos/
	$(BIN)/python tools/generate_stubs.py

reference: .venv/installed-dev ## regenerate docs/reference/ from options, protos, errors and REST fields
	$(BIN)/python tools/generate_reference.py

clean:
	rm -rf .venv .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml clients/python/pyproject.toml gateway/openai/pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e clients/python -e gateway/openai -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e clients/python -e gateway/openai -e '.[dev]'
	touch $@
