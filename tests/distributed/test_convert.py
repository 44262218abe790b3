"""Hugging Face -> checkpoint -> Hugging Face, through any layout, is bit-exact."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_paced import parallel as parallel_module
from nemo_paced.config import ModelConfig, PacedConfig, Precision, TrainerConfig
from nemo_paced.errors import CheckpointError
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_gpt, load_hf_config
from nemo_paced.training import checkpoint, convert
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model


def _save(rank, world_size, folder, directory, tensor, pipeline, precision):
    model = ModelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    parallel = parallel_module.initialize(model, accelerator="cpu", timeout_s=60)
    gpt = build_gpt(load_hf_config(folder), model, parallel, precision=precision)
    load_hf_weights(gpt, folder, parallel)
    with torch.no_grad():  # what training may leave in the padding, and in no other place
        for name, parameter in gpt.named_parameters():
            if "embedding" in name or "output_layer" in name:
                first = parallel.tp_rank * parameter.shape[0]
                parameter[max(0, 101 - first) :] = 7.0
    checkpoint.save_model(Path(directory), gpt, Path(folder), parallel)


def _export(rank, world_size, directory, out):
    convert.export_hf(Path(directory), Path(out))


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "precision"),
    [
        ("qwen3", 2, 1, Precision.bf16),
        ("llama_tied", 1, 2, Precision.fp32),
        ("qwen2_tied", 2, 2, Precision.fp32),
    ],
)
def test_a_checkpoint_of_any_layout_exports_the_same(tmp_path, family, tensor, pipeline, precision):
    """Vocabulary 101 is padded to 128 rows a tensor-parallel rank: 256 at two, 128 at one."""
    folder, out = make_hf_model(family, tmp_path / "m"), tmp_path / "out"
    run_ranks(
        tensor * pipeline, _save, folder, tmp_path / "checkpoint", tensor, pipeline, precision
    )
    run_ranks(1, _export, tmp_path / "checkpoint", out)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(dtype)), name
    assert load_hf_config(out) == load_hf_config(folder) | {"dtype": str(dtype)[6:]}


def _import(rank, world_size, folder, directory):
    config = PacedConfig(
        trainer=TrainerConfig(devices=2, precision="fp32"),
        model=ModelConfig(tensor_model_parallel_size=2),
    )
    convert.import_hf(config, Path(folder), Path(directory))


def _read(rank, world_size, folder, directory):
    model = ModelConfig(pipeline_model_parallel_size=2)
    parallel = parallel_module.initialize(model, accelerator="cpu", timeout_s=60)
    gpt = build_gpt(load_hf_config(folder), model, parallel, precision=Precision.fp32)
    checkpoint.load_model(Path(directory), gpt)
    return {name: p.detach().clone() for name, p in gpt.named_parameters()}


def test_an_imported_checkpoint_is_read_at_another_layout(tmp_path):
    folder = make_hf_model("llama_tied", tmp_path / "m")
    run_ranks(1, _import, folder, tmp_path / "checkpoint")
    first, last = run_ranks(2, _read, folder, tmp_path / "checkpoint")
    expected = load_file(folder / "model.safetensors")
    embedding = expected["model.embed_tokens.weight"]
    assert torch.equal(first["embedding.word_embeddings.weight"][:101], embedding)
    assert torch.equal(last["output_layer.weight"][:101], embedding)
    for stage, layer in ((first, 0), (last, 1)):
        wanted = expected[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(stage["decoder.layers.0.mlp.linear_fc2.weight"], wanted)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint and holds none: give RUN"):
        convert.export_hf(tmp_path, tmp_path / "out")
