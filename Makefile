# One word each: `make serve`, `make test`. Needs only Python 3.11 to 3.13 with pip; everything goes into $(VENV).
#
#   make serve                       install, then serve the default model
#   make serve MODEL=DIR PORT=8080   another checkpoint, another port; ARGS="--dtype float32" passes any other flag
#   make test ARGS="-k tokenizer"    part of the suite
#   make help                        all targets

VENV ?= .venv
WORKERS ?= 2
SEEDS ?= 1000
FIRST ?= 0
MINUTES ?= 2
SEED ?= 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install serve test test-clients simulate fuzz check format bench lock wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-19s %s\n", $$1, $$2}'

install: $(VENV)/.runtime ## make .venv with what the server needs; the command is then .venv/bin/grok-server

serve: $(VENV)/.runtime ## serve the default model, or MODEL=DIR; PORT=, ARGS=
	@exec $(BIN)/grok-server serve $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.dev ## run the whole test suite; ARGS= goes to pytest, WORKERS= sets how many processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-clients: $(VENV)/.dev ## try published SDKs and harnesses, each in an environment of its own, against the real server; ARGS= names some, see tests/clients/run.py
	$(BIN)/python tests/clients/run.py $(ARGS)

simulate: $(VENV)/.dev ## live through SEEDS= seeds of the simulated engine with kills, delays and aborts; FIRST= is the first seed
	PYTHONPATH=tests/support $(BIN)/python tests/simulation/simulate.py --seeds $(SEEDS) --first $(FIRST) --workers $(WORKERS)

fuzz: $(VENV)/.dev ## send hostile requests to a real server for MINUTES=; SEED= makes the same ones again
	PYTHONPATH=tests/support $(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES) --seed $(SEED)

check: $(VENV)/.dev ## format, lint, types, import rules, spelling, dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/typos
	$(BIN)/deptry .

format: $(VENV)/.dev ## let ruff format and fix what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.dev ## measure streams against the bare compiled step, the host's work per step, the prefix cache, overload, masks
	$(BIN)/python -m benchmarks.host_step
	$(BIN)/python -m benchmarks.prefix_cache
	$(BIN)/python -m benchmarks.overload --null-device
	$(BIN)/python -m benchmarks.structured
	$(BIN)/python -m benchmarks.serving $(ARGS)

lock: $(VENV)/.dev ## write requirements/*.txt anew from pyproject.toml; ARGS=--upgrade takes the newest versions
	$(PIP) install --quiet --group lock
	$(BIN)/python scripts/lock.py $(ARGS)

wheel: $(VENV)/.dev ## build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove $(VENV) and everything built
	rm -rf $(VENV) .clients dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Each stamp says that the environment holds what its lock file lists; pip checks every hash.
define INSTALL_PROJECT
$(PIP) install --quiet --no-deps --no-build-isolation --editable .
@touch $@
endef

$(BIN)/python:
	@scripts/make-venv $(VENV)

$(VENV)/.runtime: pyproject.toml requirements/runtime.txt requirements/build.txt | $(BIN)/python
	@echo "Installing the server into $(VENV) (about 700 MB; once)"
	$(PIP) install --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	$(INSTALL_PROJECT)

$(VENV)/.dev: pyproject.toml requirements/dev.txt | $(BIN)/python
	@echo "Installing the server and the tools for its tests and checks into $(VENV) (about 1 GB; once)"
	$(PIP) install --require-hashes -r requirements/dev.txt
	$(INSTALL_PROJECT)
