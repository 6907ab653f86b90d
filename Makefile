# Everything is done by two commands on a fresh machine (Python 3.11 or later, make, git): `make run` and `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PORT ?= 4200
MLFLOW_PORT ?= 5000

BIN := .venv/bin
# The first of these that is 3.11 or later; `make run PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing of the user's own Prefect is read or written, and no tool phones home.
export PREFECT_HOME := $(CURDIR)/.prefect
export PREFECT_PROFILES_PATH := $(CURDIR)/.prefect/profiles.toml
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export GRADIO_ANALYTICS_ENABLED := False
unexport PREFECT_PROFILE

.PHONY: help run test test-slow lint ui chat deploy stop lock clean

help: ## list the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/ready ## run the pipeline on the embedded default (or what params.yaml says), seven minutes
	@python -m flows.rlhf_pipeline $(ARGS)

test: .venv/ready .venv/deepspeed ## run all tests, as many at a time as there are cores, four at most
	@OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: .venv/ready .venv/deepspeed ## run the tests that take minutes: twenty kills, servers elsewhere
	@GLMFLOW_KILL_TRIALS=20 python -m pytest -m slow $(ARGS)

lint: .venv/ready ## check style and types
	ruff check .
	ruff format --check .
	mypy

ui: .venv/ready ## show all runs in MLflow's pages, http://127.0.0.1:5000 (MLFLOW_PORT=...)
	@python -m flows.deploy ui --port $(MLFLOW_PORT)

chat: .venv/ready ## talk to the result
	@glmflow chat

deploy: .venv/ready ## start Prefect's server and worker, http://127.0.0.1:4200 (PORT=...), and deploy the flow
	@python -m flows.deploy start --port $(PORT)

stop: .venv/ready ## stop what `make deploy` started
	@python -m flows.deploy stop

lock: .venv/ready ## write requirements.lock from the packages that are installed now
	@{ sed -n '/^#/p' requirements.lock; pip freeze --exclude-editable --exclude glmflow | sed -E 's/\+[a-z0-9.]+$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## remove what the pipeline made; runs in mlruns/ and DVC's cache stay
	rm -rf prepared models metrics plots reports runs .worktrees .pytest_cache .mypy_cache .ruff_cache
	git worktree prune

# torch comes first and alone: its index may differ from that of the other packages.
.venv/ready: requirements.lock pyproject.toml
ifeq ($(strip $(PYTHON)),)
	$(error No Python 3.11 or later was found (looked for python3.11, python3, python3.12, python3.13, python). Install one, on Debian by `apt-get install python3 python3-venv`, or say where it is: make run PYTHON=/path/to/python3.11)
endif
	@echo "Installing into .venv (once; a few minutes) ..."
	@$(PYTHON) -m venv .venv || { echo "On Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^torch==' requirements.lock)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=65"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# For its tests, beside the environment: where DeepSpeed is installed, accelerate imports it in every training.
.venv/deepspeed: requirements-deepspeed.lock | .venv/ready
	@rm -rf $@.new
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.new -r requirements-deepspeed.lock
	@rm -rf $@ && mv $@.new $@ && touch $@
