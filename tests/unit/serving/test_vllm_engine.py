"""vLLM's words are in one module: another engine is another such module."""

import ast
from pathlib import Path

import nemo_paced
from nemo_paced.serving import vllm_engine

PACKAGE = Path(nemo_paced.__file__).parent
# what runs inside vLLM's own processes, or drives vLLM's own trainer-side engines
INSIDE = {"vllm_cpu", "vllm_platform", "vllm_plugin", "vllm_senders", "gloo_transfer"}


def constants(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_routes_flags_and_variables_of_the_server_stand_in_one_module():
    own = Path(vllm_engine.__file__)
    words = {
        word
        for word in constants(own)
        if word.startswith(("/", "--", "VLLM_")) and word not in ("/", "--model")
    }
    assert {"/pause", "/health", "--max-num-seqs", "VLLM_PLUGINS"} <= words
    others = [p for p in PACKAGE.rglob("*.py") if p != own and p.stem not in INSIDE]
    found = {(path.stem, word) for path in others for word in constants(path) if word in words}
    assert not found


def test_vllm_is_imported_where_it_runs_alone():
    importing = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.split(".")[0] == "vllm"
    }
    assert importing <= INSIDE
