# make run    set up, then train PACT on BFCL with the preset for this machine; ends with a report
# make test   set up, then the whole test suite (make test-slow: its slow tests; make test-faults: thousands of injected faults and a table of them)
# make test-policy   only what differs between the Python versions: policy, checkpoints and whole runs
# make docs   the pages as a site in site/, built without a network
# PYTHON=python3.12 make run   picks another interpreter (3.11 or 3.12); VENV=.venv312 beside it keeps the environments of both
# TORCH_INDEX=https://download.pytorch.org/whl/cpu make run   takes torch from PyTorch's own (smaller) CPU index
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
TORCH_INDEX ?=
# processes of the test runs, each with one thread; WORKERS=0: all in one, as a debugger wants it
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ARGS ?=
STAMP := $(VENV)/.installed-$(shell cat requirements.txt pyproject.toml tools/install.sh 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: run test test-slow test-faults test-policy lint docs install check-python doctor clean

run: install
	$(BIN)/python recipes/pact_bfcl.py $(ARGS)

test: install lint
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

test-policy: install
	$(PYTEST) -m "not slow" tests/test_policy_*.py tests/test_checkpoints_*.py tests/test_training_runs*.py tests/test_rehearsal*.py $(ARGS)

FAULTS := $(CURDIR)/.cache/faults.jsonl

test-faults: install
	mkdir -p $(dir $(FAULTS)) && rm -f $(FAULTS) && touch $(FAULTS)
	status=0; PACT_FAULTS_TALLY=$(FAULTS) $(BIN)/python -m pytest -m faults $(ARGS) || status=$$?; \
	$(BIN)/python -m tests.faults.tally $(FAULTS) || status=1; exit $$status

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_markdown.py

# the pages as a site in site/; any warning, dead link or dead anchor ends it
docs: install
	$(BIN)/python tools/check_markdown.py
	$(BIN)/python tools/settings_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

doctor: install
	$(BIN)/python tools/doctor.py

install: $(STAMP)

# an environment that is there already is not of another version than the one that is asked for
ifneq ($(origin PYTHON),file)
$(STAMP): | check-python
check-python:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash tools/install.sh check
endif

$(STAMP): requirements.txt pyproject.toml tools/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/install.sh
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache site
