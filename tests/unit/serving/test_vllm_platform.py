"""vLLM on a CPU with a forked engine: asked for by the server's environment, for one rank alone."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nemo_paced.serving.vllm_platform import FORK_VARIABLE, platform
from tests.tiny import make_hf_model

PROGRAM = """\
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
found = []
for ranks in (1, 2):
    config = EngineArgs(sys.argv[1], tensor_parallel_size=ranks).create_engine_config()
    found.append([
        type(current_platform).__name__,
        current_platform.is_cpu(),
        config.parallel_config.distributed_executor_backend,
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"],
    ])
print(json.dumps(found))
"""


def test_without_the_variable_vllm_takes_its_own_platform(monkeypatch):
    monkeypatch.delenv(FORK_VARIABLE, raising=False)
    assert platform() is None
    monkeypatch.setenv(FORK_VARIABLE, "1")
    assert platform() is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's GPU build")
def test_the_engine_is_forked_for_one_rank_and_spawned_for_several(tmp_path):
    model = make_hf_model("qwen3", tmp_path / "model", vocab_size=128, hidden_size=64)
    own = {FORK_VARIABLE: "1", "VLLM_PLUGINS": "nemo_paced", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model], env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert one == ["ForkingCpuPlatform", True, "uni", "fork"]
    assert two == ["ForkingCpuPlatform", True, "mp", "spawn"]
