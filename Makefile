# Everything a newcomer or a CI machine needs. Nothing has to be prepared but Python 3.11 or newer.
#
#   make run        start a local cluster and open the raftkv-kv shell (or run the commands on stdin)
#   make stop       stop that cluster; its data stays
#   make test       the quick tests, ≤ 5 minutes on two cores
#   make test-all   the long ones too, ≤ 40 minutes
#   make test-docker  a cluster of containers, ≤ 8 minutes; skipped where no Docker engine and docker-compose answer
#   make soak       MINUTES=30 of scenarios and chaos on real processes, then of simulation; SEED=… gives its seed
#   make check      ruff and mypy --strict
#
# PYTHON=…  picks an interpreter, WORKERS=… the number of test processes; the tests of one file share one, because
# those on a real cluster share the cluster.

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3
MINUTES ?= 30

.PHONY: run stop test test-all test-docker soak check help

help:
	@sed -n '3,9s/^# \{0,1\}//p' Makefile

run: $(VENV)/.installed
	@scripts/run

stop: $(VENV)/.installed
	@scripts/run --stop

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not long and not soak and not docker'

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not soak and not docker'

test-docker: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m docker -s --durations 0 --durations-min 1 tests/docker

soak: $(VENV)/.installed-dev
	@$(BIN)/python scripts/soak $(MINUTES) $(SEED)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy raftkv tests bench examples

# The stamps: an installation is as old as the list of what it installs.
$(VENV)/.installed: pyproject.toml scripts/set-up-venv
	@PYTHON='$(PYTHON)' scripts/set-up-venv $(VENV) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml scripts/set-up-venv
	@PYTHON='$(PYTHON)' scripts/set-up-venv $(VENV) '.[dev]'
	@touch $(VENV)/.installed $@
