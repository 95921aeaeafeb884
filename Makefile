# Every target sets up what it needs: .venv in this folder, from requirements/lock.txt. `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE ?= nixl
# More arguments for pytest: make unit PYTEST_ARGS="-k key"
PYTEST_ARGS ?=
# Number of processes for the tests of `make test`; tests/conftest.py distributes them. One more than two processors have
# use for at a time: many tests wait, for a time-out or for a process that starts.
PYTEST_PROCESSES ?= 3
# Make vLLM use its other code paths on CPU: make test TEST_CPU=avx512 (no AMX) or avx2; see tests/processor
TEST_CPU ?=
# More arguments for the demo: make demo DEMO_ARGS="--storage-mb-per-s 1000"
DEMO_ARGS ?=
# More arguments for the benchmarks
BENCH_ARGS ?=
# Arguments for the model zoo: make zoo ZOO_ARGS="--only llama,qwen3" writes no document
ZOO_ARGS ?= --write docs/zoo.md
# More arguments for the events, such as "--write docs/zoo.md"
EVENTS_ARGS ?=

BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest -n $(PYTEST_PROCESSES)
# Tools that only `make docs` and `make release-check` need
TOOLS := .venv-docs/bin
STANDIN := build/standin
TYPED := vllm_rfork demo scripts examples bench zoo versions
# With `make test COVERAGE=yes`, as CI runs it: branches of the package that the tests reach, with those of its processes;
# the floor is a little below. A test takes a quarter to a half longer: the tracer of Python 3.11 is called for lines of
# other packages, too.
COVERAGE ?=
COVERAGE_ARGS := --cov --cov-report= --cov-fail-under=94

# No access to a model hub, no usage reports, and no influence of the caller's Python.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export PYTHONUNBUFFERED := 1
export TEST_CPU
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV

.PHONY: help setup tools checks test test-long lint types contracts standin wheel unit vllm-tests chart kustomize docs release-check bench bench-engines bench-start-up bench-planner bench-digest zoo events versions demo format clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## install requirements/lock.txt into .venv; every other target does this first
	@$(PYTHON) scripts/set_up.py

test: checks ## lint, types, import contracts and every test that is not marked long
	$(PYTEST) -m "not long" $(if $(COVERAGE),$(COVERAGE_ARGS)) $(PYTEST_ARGS)

test-long: setup standin ## the tests marked long: slow, and seldom the first to fail; CI runs them after `make test`
	$(PYTEST) -m long $(PYTEST_ARGS)

checks: setup
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target lint types contracts standin

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## mypy, strict
	$(BIN)/mypy $(wildcard $(TYPED))

contracts: setup ## import-linter: the layers in .importlinter
	$(BIN)/lint-imports

standin: setup ## build the host stand-in for the Ascend data plane
	@if [ -f tests/standin/Makefile ]; then $(MAKE) --no-print-directory -C tests/standin OUT=../../$(STANDIN); fi

wheel: setup ## build the wheel into build/wheel
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel . > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }

unit: setup standin ## tests that start no vLLM
	$(BIN)/python -m pytest --ignore=tests/vllm --ignore=tests/gpu $(PYTEST_ARGS)

vllm-tests: setup standin ## tests that load models in real vLLM
	$(BIN)/python -m pytest tests/vllm $(PYTEST_ARGS)

chart: setup ## the Helm chart, Kustomize, Dockerfiles and alerts: lint, render, check against Kubernetes' schemas
	$(BIN)/python -m pytest tests/deploy $(PYTEST_ARGS)

kustomize: setup ## write deploy/kustomize from the chart
	$(BIN)/python -m tests.deploy.kustomize

docs: tools ## the documentation site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/mkdocs build --quiet --strict --site-dir build/site

release-check: tools ## sdist and wheel into build/release, checked with twine, and their bill of materials
	rm -rf build/release build/release-venv
	$(BIN)/python -m build --no-isolation --outdir build/release . > build/release.log 2>&1 || { cat build/release.log; exit 1; }
	$(TOOLS)/twine check --strict build/release/*
	$(BIN)/python -m venv --without-pip build/release-venv
	$(BIN)/python -m pip --disable-pip-version-check --python build/release-venv/bin/python install --quiet --no-compile \
	    --constraint requirements/lock.txt --find-links build/release \
	    vllm-rfork==$$($(BIN)/python -c 'import vllm_rfork; print(vllm_rfork.__version__)')
	$(TOOLS)/cyclonedx-py environment --output-reproducible --output-file build/release/sbom.cdx.json \
	    build/release-venv/bin/python
	$(BIN)/python scripts/check_release.py build/release

tools: setup
	@$(PYTHON) scripts/set_up.py docs

bench: setup standin ## weights phase of the default loader and of forks, compared with memcpy
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-engines: setup standin ## every engine that is installed, compared with raw copies: BENCH_ARGS="--device cuda --gib 14"
	$(BIN)/python -m bench.engines $(BENCH_ARGS)

bench-start-up: setup standin ## process start to first token: BENCH_ARGS="--model FOLDER", on CPU with --device cpu
	$(BIN)/python -m bench.start_up $(BENCH_ARGS)

bench-planner: setup ## one planner process compared with the mock: cycles, heartbeats, waiting receivers, Redis
	$(BIN)/python -m bench.bench_planner $(BENCH_ARGS)

bench-digest: setup ## digests compared with a plain sum and a copy: BENCH_ARGS="--device cuda --gib 8"
	$(BIN)/python -m bench.digest $(BENCH_ARGS)

zoo: setup ## fork one model of every kind and compare it with a default load; writes docs/zoo.md
	$(BIN)/python -m zoo $(ZOO_ARGS)

events: setup ## end-to-end lifecycle scenarios: sleep, reload, weight update, kill
	$(BIN)/python -m zoo.events $(EVENTS_ARGS)

versions: setup ## read published vLLM and vLLM-Ascend wheels and check what this package needs from them
	$(BIN)/python -m versions

demo: setup ## a vLLM server forks its weights from a running one: make demo [ENGINE=nixl|yuanrong]
	@if [ "$(ENGINE)" = yuanrong ]; then $(MAKE) --no-print-directory standin; fi
	@$(BIN)/python -m demo --engine $(ENGINE) $(DEMO_ARGS)

clean: ## remove build results
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

distclean: clean ## remove .venv as well
	rm -rf .venv .venv-*
