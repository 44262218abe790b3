#!/usr/bin/env bash
# Prints pip constraints that keep a container's own builds of torch and what goes with it. NGC's
# images bring a torch that no index has; an unconstrained `pip install` would replace it.
#
#   bash scripts/constraints.sh > constraints.txt
#   pip install -c constraints.txt nemo-paced
set -euo pipefail
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip list --format=freeze --disable-pip-version-check |
    grep -iE '^(torch|torchvision|torchaudio|pytorch[-_]triton|triton|transformer[-_]engine|flash[-_]attn|apex|nvidia[-_].*|megatron[-_]core)==' ||
    { echo "no torch is installed for $PYTHON: there is nothing to keep" >&2; exit 1; }
