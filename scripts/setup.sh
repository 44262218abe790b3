#!/usr/bin/env bash
# Makes the virtual environment in $VENV (default .venv) with everything that runs on this machine:
# the CPU stack where there is no NVIDIA GPU, the CUDA one where there is. A complete environment is
# left as it is; an interrupted installation goes on; a broken one is named.
#
# Versions are those of constraints/*.txt (`make lock`): a release of somebody else's package tomorrow
# changes nothing here, and pip has nothing to resolve.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/python.sh

VENV=${VENV:-.venv}
LOG=$VENV/setup.log
STAMP=$VENV/setup.complete
WANTED=$(cat pyproject.toml scripts/setup.sh constraints/*.txt | sha256sum | cut -c1-16)
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
    PYTHON=$(find_python)
    say "new environment in $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV"
fi
rm -f "$STAMP"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    install "CUDA stack: torch, vLLM, Transformer Engine, NeMo, Megatron-Core (several GB)" \
        -e ".[gpu,dev,eval]" -c constraints/gpu.txt
else
    # The default index serves torch for CUDA. Take the CPU build from the configured index where it
    # has one, else from PyTorch's own CPU index, and search that one for torch alone.
    torch=$(grep '^torch==' constraints/cpu.txt)
    if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
        say "$torch, several minutes on a slow line"
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile --no-deps "$torch" >>"$LOG" 2>&1 ||
            install "torch from PyTorch's CPU index" --no-compile --no-deps "$torch" \
                --index-url https://download.pytorch.org/whl/cpu
    fi
    install "$(grep -c == constraints/cpu.txt) packages: vLLM (CPU), Megatron-Core, NeMo, tests, lm-eval" \
        --no-compile --no-deps -r constraints/cpu.txt
    install "nemo_paced" --no-deps -e .
    say "byte code, on all cores"
    # Not of packages' tests and of model classes: the few that are imported are compiled then, and
    # all of them are a third of the time. Packages bring files of other Pythons, which nothing
    # imports: hence no error.
    "$VENV/bin/python" -m compileall -q -j 0 -x '/tests?/|/transformers/models/|/model_executor/models/' \
        "$VENV"/lib/python3*/site-packages >>"$LOG" 2>&1 || true
fi
works
echo "$WANTED" >"$STAMP"
say "environment complete"
