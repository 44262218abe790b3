# Thin: each line is one that a reader could type. VENV=DIR uses another environment.
VENV ?= .venv
QUICKSTART_ARGS ?=
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile
FAST = $(PYTEST) -m "not slow and not slurm"

.PHONY: docs lock setup quickstart test test-fast slurm-test gpu-test lint real

# OFFLINE=DIR: without a network, from a folder that scripts/wheels.sh filled.
setup:
	@VENV=$(VENV) bash scripts/setup.sh $(if $(OFFLINE),--offline "$(OFFLINE)")

# The newest versions of everything, into constraints/*.txt.
lock:
	@bash scripts/lock.sh

quickstart: setup
	@$(VENV)/bin/nemo-paced quickstart $(QUICKSTART_ARGS)

test: setup
	$(FAST) --durations=40
	$(PYTEST) -m slow --durations=40

test-fast: setup
	$(FAST)

# Every test that needs a GPU, then the losses' benchmark; put the JSON beside the others.
gpu-test: setup
	$(VENV)/bin/python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
	$(VENV)/bin/python -m pytest -q tests/gpu
	$(VENV)/bin/python benchmarks/losses.py --device cuda --tokens 8192 --dtype bf16 \
		--out benchmarks/results/losses_cuda_bf16.json

# The launchers on a SLURM of three nodes on this machine; as root.
slurm-test: setup
	@VENV=$(VENV) bash scripts/slurm_test.sh

# What is made from the code: docs/settings.md and docs/metrics.md.
docs: setup
	$(VENV)/bin/python scripts/make_docs.py
	$(VENV)/bin/python scripts/metrics_table.py

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

real: setup
	$(VENV)/bin/python -m nemo_paced.quickstart.smollm2 --out runs/smollm2
	$(VENV)/bin/nemo-paced train --config-name smollm2_self
	$(VENV)/bin/nemo-paced export-hf runs/smollm2/self runs/smollm2/self/hf
	$(VENV)/bin/nemo-paced report runs/smollm2/self
