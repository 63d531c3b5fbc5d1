# One command each. ARGS passes options on: make up ARGS="--port 9000 --variants dense,w8a8"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   := deploy/locks/gateway.txt
UV     := $(shell sed -n 's/^\(uv==[0-9.]*\).*/\1/p' $(LOCK))
ARGS   ?=
EXAMPLES ?= 20000
NONCES ?= 50000
VARIANTS ?= dense,w8a8,w4a16,depth26,depth26-healed,depth26+w8a8,moe4,moe4-top1,moe4-keep2

# TORCH tells where the CPU build of torch is: PyTorch's own index, or --find-links DIRECTORY.
TORCH   ?= --torch-backend cpu
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url

# Tests wait more than they compute, so a few run side by side; real workers take the whole machine, one after another.
PYTEST := $(BIN)/python -m pytest -q

# What the real-worker tests serve; the first run makes it.
TESTED := --prepare-only --variants dense,w8a8

.DEFAULT_GOAL := help
.PHONY: help up variants install check lint test compose-test bench fuzz cards dashboards dashboard-pictures settings locks

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

up: install  ## Serve a quantized model on 127.0.0.1:8000 (installs and makes what is missing)
	@exec $(BIN)/python -m app up $(ARGS)

variants: install  ## Make the variants of the default model that a CPU serves (some minutes of two cores)
	$(BIN)/python -m app up --prepare-only --variants $(VARIANTS)

install: $(VENV)/.installed  ## Make the gateway's environment in .venv

$(VENV)/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with PYTHON=…" >&2; exit 2; }
	@echo "Installing the gateway and its tests into $(VENV) …"
	@$(PYTHON) -m venv $(VENV) || { echo "error: Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(UV)"
	@$(BIN)/python -m app.launcher.environments $(BIN)/python $(LOCK) .
	@touch $@

check: lint  ## Everything that needs no real worker: linters, types, imports, tests
	$(PYTEST) -n 3 -m "not vllm and not slow and not compose"

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## Everything, also with real vLLM workers (prepares their environment and the default model first)
	$(BIN)/python -m app up $(TESTED)
	$(PYTEST) -n 3 -m "not vllm and not compose"
	$(PYTEST) -m vllm

compose-test: install  ## Build the images and try docker-compose.yml on an engine of its own (root, a quarter of an hour)
	$(PYTEST) -m compose tests/compose

fuzz: install  ## Throw much more at the gateway than the tests do (half an hour; EXAMPLES=… NONCES=… for more or less)
	SLUICE_FUZZ_EXAMPLES=$(EXAMPLES) SLUICE_NONCE_REQUESTS=$(NONCES) $(PYTEST) --timeout 0 \
	  tests/hostile/test_fuzz.py tests/hostile/test_openapi_fuzz.py tests/hostile/test_own_bytes.py

bench: install  ## Measure what the gateway costs
	$(BIN)/python -m loadtest bench $(ARGS)

cards: install  ## Measure every variant of smollm2 again and write deploy/variants.md (on a quiet machine; minutes each)
	$(BIN)/python -m app evaluate smollm2 --output deploy $(ARGS)

dashboards: install  ## Write deploy/grafana/dashboards again from their code
	$(BIN)/python deploy/grafana/build.py

dashboard-pictures: install  ## Draw every panel of the dashboards from a real Prometheus into deploy/pictures (3 minutes)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r deploy/locks/pictures.txt
	$(BIN)/python -m tests.monitoring.pictures deploy/pictures $(ARGS)

settings: install  ## Write deploy/settings.md again from app/settings
	$(BIN)/python deploy/settings.py

locks: install  ## Write the locks again from pyproject.toml and deploy/locks/*.in
	$(COMPILE) --generate-hashes pyproject.toml --extra up --group dev -o $(LOCK)
	$(COMPILE) --generate-hashes pyproject.toml --extra traces --constraints $(LOCK) -o deploy/locks/image.txt
	$(COMPILE) --generate-hashes deploy/locks/build.in -o deploy/locks/build.txt
	$(COMPILE) --generate-hashes --constraints $(LOCK) deploy/locks/pictures.in -o deploy/locks/pictures.txt
	for name in worker-cpu recipes harness; do \
	  $(COMPILE) $(TORCH) --override deploy/locks/overrides.txt deploy/locks/$$name.in -o deploy/locks/$$name.txt || exit 1; \
	done
