#!/usr/bin/env bash
# Fetches into DIR what a machine without a network is set up from: `scripts/setup.sh --offline DIR`.
# Run it where there is a network, on a machine like the other one: the same Python and processor, a
# glibc that is no newer. It needs no GPU. An interrupted one goes on from where it was.
#
#   bash scripts/wheels.sh DIR            # the CUDA stack, constraints/gpu.txt
#   bash scripts/wheels.sh DIR --cpu      # the CPU stack, constraints/cpu.txt
set -euo pipefail

usage() {
    echo "usage: scripts/wheels.sh DIR [--gpu|--cpu]${1:+ ($1)}" >&2
    exit 2
}

stack="" folder=""
for argument; do
    case $argument in
    --gpu | --cpu)
        [ -z "$stack" ] || usage "one of --gpu and --cpu"
        stack=${argument#--}
        ;;
    -* | "") usage "there is no '$argument'" ;;
    *)
        [ -z "$folder" ] || usage "one folder"
        folder=$(realpath -m -- "$argument")
        ;;
    esac
done
[ -n "$folder" ] || usage
stack=${stack:-gpu}
cd "$(dirname "$0")/.."
. scripts/python.sh

PINS=constraints/$stack.txt
LOG=$folder/wheels.log
PARTIAL=$folder/.partial # what is whole is moved out of it, in one step
BATCH=20                 # packages that an interruption costs at most
began=$(date +%s)

say() { printf '[wheels %4ds] %s\n' "$(($(date +%s) - began))" "$*"; }

refuse() {
    say "$*" >&2
    exit 1
}

pip() { # without a cache: it would take the space a second time
    "$PARTIAL/venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@" >>"$LOG" 2>&1
}

failed() {
    tail -n 25 "$LOG" >&2
    refuse "failed: $1. The whole output is in $LOG. Mend the cause and run it again: it goes on from here"
}

fetch() { # pip's arguments; what is published as source alone is built
    rm -rf "$PARTIAL/new"
    pip wheel --no-deps --wheel-dir "$PARTIAL/new" "$@" && mv "$PARTIAL"/new/*.whl "$folder/"
}

missing() { "$PYTHON" scripts/wheel_folder.py missing "$folder" "$PINS"; }

[ "$(uname -s)" = Linux ] || refuse "this machine is $(uname -s): the wheels are for Linux, run it there"
PYTHON=$(find_python)
if [ -e "$folder/.stack" ] && [ "$(cat "$folder/.stack")" != "$stack" ]; then
    refuse "$folder holds the $(cat "$folder/.stack") stack, and one folder holds one: name another"
fi
mkdir -p "$folder" 2>/dev/null && : 2>/dev/null >>"$LOG" ||
    refuse "$folder cannot be written to: name another folder"
echo "$stack" >"$folder/.stack"
rm -rf "$PARTIAL" "$folder/manifest.json" # a folder that has a manifest is whole
trap 'rm -rf "$PARTIAL"' EXIT
mkdir "$PARTIAL"
export TMPDIR=$PARTIAL # what pip unpacks; on the disk that is asked for its free space

case $stack in # GB of wheels, and of what pip unpacks beside them
cpu) need=2 beside=2 ;;
gpu) need=5 beside=8 ;;
esac
need=$((need * 1000000 - $(du -sk "$folder" | cut -f1)))
need=$(((need > 0 ? need : 0) + beside * 1000000))
free=$(df -Pk "$folder" | awk 'NR == 2 {print $4}')
[ "$free" -ge "$need" ] ||
    refuse "$folder has $((free / 1000000)) GB free, $((need / 1000000 + 1)) are needed: make room or name another folder"

total=$(grep -c == "$PINS")
say "$stack stack, $(missing | grep -c . || true) of $total packages to fetch, into $folder"
"$PYTHON" -m venv "$PARTIAL/venv"
if [ -n "$(missing)" ] || ! compgen -G "$folder/pip-*.whl" >/dev/null; then
    fetch --retries 1 --timeout 30 pip wheel ||
        failed "no package index answers. Is there a network, and do PIP_INDEX_URL and https_proxy name what it needs?"
fi
torch=$(missing | grep '^torch==.*+cpu$' || true)
if [ -n "$torch" ]; then # as setup.sh takes it
    say "$torch"
    fetch "$torch" || fetch "$torch" --index-url https://download.pytorch.org/whl/cpu || failed "$torch"
fi
while :; do
    left=$(missing)
    [ -n "$left" ] || break
    head -n "$BATCH" <<<"$left" >"$PARTIAL/batch.txt"
    say "$((total - $(grep -c . <<<"$left"))) of $total, $(du -sh "$folder" | cut -f1). Next: $(head -n 1 "$PARTIAL/batch.txt") and on"
    fetch -r "$PARTIAL/batch.txt" || failed "one of $(tr '\n' ' ' <"$PARTIAL/batch.txt")"
    if [ "$(missing)" = "$left" ]; then # of a name that is spelt otherwise than its wheel's
        failed "no wheel came of $(tr '\n' ' ' <"$PARTIAL/batch.txt")"
    fi
done

# Transformer Engine's PyTorch extension is published as source alone and fits the torch that it was
# compiled against, so it is compiled on the other machine. pip asks the source for its requirements
# with a torch at hand: with ours, not with the newest, hence the constraints of its build.
if [ "$stack" = gpu ] && ! compgen -G "$folder/transformer_engine_torch-*" >/dev/null; then
    wanted=$(grep -o 'transformer-engine\[pytorch\][^"]*' pyproject.toml)
    say "$wanted: wheels, and the source of its PyTorch extension (some minutes: pip unpacks a torch for it)"
    mkdir "$PARTIAL/engine"
    cp -l "$folder"/*.whl "$PARTIAL/engine/" 2>/dev/null || cp "$folder"/*.whl "$PARTIAL/engine/"
    PIP_CONSTRAINT=$PWD/$PINS PIP_BUILD_CONSTRAINT=$PWD/$PINS pip download --dest "$PARTIAL/engine" \
        --find-links "$folder" "$wanted" || failed "$wanted"
    mv -n "$PARTIAL"/engine/* "$folder/"
fi

say "nemo_paced's own wheel"
mkdir "$PARTIAL/project" # a copy: setuptools would leave its build/ in the checkout
cp -rL pyproject.toml README.md LICENSE nemo_paced "$PARTIAL/project/"
fetch --no-index --find-links "$folder" "$PARTIAL/project" || failed "nemo_paced's own wheel"

say "the manifest: SHA-256 of every file"
"$PYTHON" scripts/wheel_folder.py write "$folder" "$stack"
rm -rf "$PARTIAL"
say "complete: $(ls "$folder" | grep -cE '\.(whl|tar\.gz)$') files, $(du -sh "$folder" | cut -f1). Copy $folder and this checkout, then there: make setup OFFLINE=$folder"
if [ "$stack" = gpu ] && ! compgen -G "$folder/transformer_engine_torch-*.whl" >/dev/null; then
    say "Transformer Engine's PyTorch extension is there as source: the other machine compiles it, with a C++ compiler"
fi
