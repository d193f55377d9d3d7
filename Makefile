# `make up` runs the platform, `make test` its tests; both do all of their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help up demo test test-long check bench bench-quick lock clean

help: ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

up: $(READY) ## set up, then run database, schema, service and jobs on loopback
	@$(BIN)/energy-platform up

demo: $(READY) ## the same with a simulated fleet: 24 h back-filled, then live
	@$(BIN)/energy-platform up --demo

test: $(READY) ## set up, then run the tests
	@$(BIN)/pytest -n auto --dist loadfile

test-long: $(READY) ## the tests with many more random examples and kill rounds
	@ENERGY_TEST_PROFILE=long $(BIN)/pytest -n auto --dist loadfile

check: $(READY) ## lint, format and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Each answers one question; on the server of ENERGY_DATABASE_URL, or on the embedded engine.
BENCHMARKS := startup ingest_single ingest_batch answer_latency growth storage overload refresh_cost

bench: $(READY) ## measure all, into benchmarks/results/ (an hour or more; needs wrk)
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done

bench-quick: $(READY) ## the same in a few minutes, to see that it runs; keeps no results
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --quick; done

# The environment is complete or absent: the stamp is written last, and a changed lock makes it anew.
$(READY): requirements/main.txt requirements/node.txt pyproject.toml \
		src/energy_platform/embedded/package-lock.json src/energy_platform/embedded/node.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "energy-platform needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "This Python cannot make environments: install its venv package (Debian: apt-get install python3-venv)."; exit 1; }
	@echo "Setting up $(VENV) (once, about a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/main.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m energy_platform.embedded.install --check-node || \
		$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/node.txt
	@$(BIN)/python -m energy_platform.embedded.install
	@touch $@

lock: ## write requirements/*.txt anew from requirements/*.in (needs pip-tools)
	@cd requirements && for name in main node; do \
		pip-compile -q --upgrade --generate-hashes --allow-unsafe --strip-extras --no-header \
			--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
			-o $$name.txt $$name.in; done

clean: ## remove the environment (the data folder stays)
	rm -rf $(VENV)
