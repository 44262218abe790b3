#!/usr/bin/env bash
# Makes the virtual environment in $VENV (default .venv) with everything that runs on this machine:
# the CPU stack where there is no NVIDIA GPU, the CUDA one where there is. A complete environment is
# left as it is; an interrupted installation goes on; a broken one is named.
#
# Versions are those of constraints/*.txt (`make lock`): a release of somebody else's package tomorrow
# changes nothing here, and pip has nothing to resolve.
#
#   bash scripts/setup.sh                  # from pip's index
#   bash scripts/setup.sh --offline DIR    # from a folder that scripts/wheels.sh filled, without a network
set -euo pipefail

usage() {
    echo "usage: scripts/setup.sh [--offline DIR]${1:+ ($1)}" >&2
    exit 2
}

OFFLINE=""
case ${1-} in
"") [ $# = 0 ] || usage "there is no ''" ;;
--offline)
    [ $# = 2 ] && [ -n "$2" ] || usage "--offline takes one folder"
    OFFLINE=$(realpath -m -- "$2")
    ;;
*) usage "there is no '$1'" ;;
esac
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
    if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "${SOURCE[@]}" "$@" >>"$LOG" 2>&1; then
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

if [ -x "$VENV/bin/python" ]; then PYTHON=$VENV/bin/python; else PYTHON=$(find_python); fi

SOURCE=()
if [ -n "$OFFLINE" ]; then
    say "offline: files of $OFFLINE against their manifest"
    STACK=$("$PYTHON" scripts/wheel_folder.py check "$OFFLINE") || exit 1
    SOURCE=(--no-index --find-links "$OFFLINE")
    # Places that this machine's configuration adds to those: pip would wait for each of them.
    export PIP_CONFIG_FILE=/dev/null
    unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    STACK=gpu
else
    STACK=cpu
fi
PINS=constraints/$STACK.txt

if [ ! -x "$VENV/bin/python" ]; then
    say "new environment in $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV"
fi
rm -f "$STAMP"

if [ "$STACK" = cpu ] && [ -z "$OFFLINE" ]; then
    # The default index serves torch for CUDA. Take the CPU build from the configured index where it
    # has one, else from PyTorch's own CPU index, and search that one for torch alone.
    torch=$(grep '^torch==' "$PINS")
    if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
        say "$torch, several minutes on a slow line"
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile --no-deps "$torch" >>"$LOG" 2>&1 ||
            install "torch from PyTorch's CPU index" --no-compile --no-deps "$torch" \
                --index-url https://download.pytorch.org/whl/cpu
    fi
fi
case $STACK in
cpu) what="vLLM (CPU), Megatron-Core, NeMo, tests, lm-eval" ;;
gpu) what="torch, vLLM, Megatron-Core, NeMo, tests, lm-eval (several GB)" ;;
esac
install "$(grep -c == "$PINS") packages: $what" --no-compile --no-deps -r "$PINS"
if [ "$STACK" = gpu ] && [ "${TRANSFORMER_ENGINE:-yes}" != no ]; then
    # Its PyTorch extension is published as source. Without isolation: that would compile it against
    # the newest torch. Its other CUDA headers come with the wheels of torch and vLLM.
    say "if Transformer Engine cannot be compiled here, TRANSFORMER_ENGINE=no goes without it (slower layers)"
    install "Transformer Engine, whose PyTorch extension is compiled (a C++ compiler, minutes)" --no-compile \
        --no-build-isolation "$(grep -o 'transformer-engine\[pytorch\][^"]*' pyproject.toml)" -c "$PINS"
fi
install "nemo_paced" --no-deps -e .
say "byte code, on all cores"
# Not of packages' tests and of model classes: the few that are imported are compiled then, and
# all of them are a third of the time. Packages bring files of other Pythons, which nothing
# imports: hence no error.
"$VENV/bin/python" -m compileall -q -j 0 -x '/tests?/|/transformers/models/|/model_executor/models/' \
    "$VENV"/lib/python3*/site-packages >>"$LOG" 2>&1 || true
works
echo "$WANTED" >"$STAMP"
say "environment complete"
