#!/usr/bin/env bash
# Makes the virtual environment in $BENCH_VENV (default .venv-bench) that holds this package and the
# peers it is measured against. It is apart from the project's own: the peers' pins are not ours.
set -euo pipefail
cd "$(dirname "$0")/.."

BENCH_VENV=${BENCH_VENV:-.venv-bench}
PYTHON=${PYTHON:-python3}

if [ ! -x "$BENCH_VENV/bin/python" ]; then "$PYTHON" -m venv "$BENCH_VENV"; fi
pip() { "$BENCH_VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    pip install torch # the default index's build brings CUDA and Triton
elif ! pip install "torch==2.13.0+cpu"; then
    pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
fi
# modelopt imports requests without naming it
pip install "megatron-core==0.16.1" psutil numpy rich requests transformers \
    "nvidia-modelopt==0.47.0" "trl==1.16.0"
# its requirements name Triton, which has no CPU build; its chunked losses do not need it
pip install --no-deps "liger-kernel==0.8.5"
pip install --no-deps -e .
"$BENCH_VENV/bin/python" -c 'import nemo_paced, rich, torch; print("torch", torch.__version__)'
