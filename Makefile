# Thin: each line is one that a reader could type. VENV=DIR uses another environment.
VENV ?= .venv
QUICKSTART_ARGS ?=

.PHONY: setup quickstart test test-fast slurm-test lint real

setup:
	@VENV=$(VENV) bash scripts/setup.sh

quickstart: setup
	@$(VENV)/bin/nemo-paced quickstart $(QUICKSTART_ARGS)

test: setup
	$(VENV)/bin/python -m pytest -q

test-fast: setup
	$(VENV)/bin/python -m pytest -q -m "not slow"

slurm-test: setup
	@VENV=$(VENV) bash scripts/slurm_test.sh

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy nemo_paced

real: setup
	$(VENV)/bin/python -m nemo_paced.quickstart.smollm2 --out runs/smollm2
	$(VENV)/bin/nemo-paced train --config-name smollm2_self
	$(VENV)/bin/nemo-paced export-hf runs/smollm2/self runs/smollm2/self/hf
	$(VENV)/bin/nemo-paced report runs/smollm2/self
