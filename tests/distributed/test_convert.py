"""Hugging Face -> checkpoint -> Hugging Face, through any layout, is bit-exact."""

import contextlib
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from safetensors.torch import load_file

from nemo_paced.commands import convert as commands
from nemo_paced.config import ModelConfig, PacedConfig, Precision, TrainerConfig
from nemo_paced.errors import CheckpointError, ConfigError
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.run import checkpoint, convert
from nemo_paced.run.checkpoint_files import find_checkpoint
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model

MODEL_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def make_config(layout, precision="fp32"):
    """Layout: tensor, pipeline, expert, ranks."""
    return PacedConfig(
        trainer=TrainerConfig(devices=layout[3], precision=precision),
        model=ModelConfig(**dict(zip(MODEL_KEYS, layout, strict=False))),
    )


def _save(rank, world_size, folder, directory, layout, precision):
    """As a run of this layout would write it."""
    config = make_config(layout)
    model = ModelConfig(
        **dict(zip(MODEL_KEYS, layout, strict=False)), sequence_parallel=layout[0] > 1
    )
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=precision)
    load_hf_weights([gpt], folder, parallel)
    with torch.no_grad():  # what training may leave in the padding, and in no other place
        for name, parameter in gpt.named_parameters():
            if "embedding" in name or "output_layer" in name:
                first = parallel.tp_rank * parameter.shape[0]
                parameter[max(0, 101 - first) :] = 7.0
    checkpoint.save_model(Path(directory), [gpt], Path(folder), parallel)


def _import(rank, world_size, folder, directory, layout):
    convert.import_hf(make_config(layout), Path(folder), Path(directory))


def _export(rank, world_size, directory, out, layout=(1, 1, 1, 1)):
    convert.export_hf(make_config(layout), Path(directory), Path(out))


def check_equal(folder, out, dtype=torch.float32):
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(dtype)), name


@pytest.mark.parametrize(
    ("family", "layout", "precision"),
    [
        ("qwen3", (2, 1, 1, 2), Precision.bf16),
        ("llama_tied", (1, 2, 1, 2), Precision.fp32),
        ("qwen2_tied", (2, 2, 1, 4), Precision.fp32),
        ("qwen3_moe", (1, 1, 2, 2), Precision.bf16),
        ("qwen3_moe_mixed", (2, 2, 2, 4), Precision.fp32),
    ],
)
def test_a_checkpoint_of_any_layout_exports_the_same(tmp_path, family, layout, precision):
    """Vocabulary 101 is padded to 128 rows a tensor-parallel rank: 256 at two, 128 at one."""
    folder, out = make_hf_model(family, tmp_path / "m"), tmp_path / "out"
    run_ranks(layout[3], _save, folder, tmp_path / "checkpoint", layout, precision)
    run_ranks(1, _export, tmp_path / "checkpoint", out)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    check_equal(folder, out, dtype)
    assert load_hf_config(out) == load_hf_config(folder) | {"dtype": str(dtype)[6:]}


@pytest.mark.parametrize(
    ("family", "saved", "layouts"),
    [
        ("qwen3", (2, 2, 1, 4), [(1, 2, 1, 2), (2, 1, 1, 2)]),
        ("qwen3_tied", (2, 2, 1, 4), [(1, 2, 1, 2)]),
        ("qwen3_moe", (2, 2, 2, 4), [(1, 2, 1, 2), (1, 1, 2, 2), (1, 1, 4, 4)]),
    ],
)
def test_several_ranks_export_at_a_layout_of_their_own(tmp_path, family, saved, layouts):
    folder = make_hf_model(family, tmp_path / "m")
    run_ranks(saved[3], _save, folder, tmp_path / "checkpoint", saved, Precision.fp32)
    for number, layout in enumerate(layouts):
        out = tmp_path / f"out{number}"
        run_ranks(layout[3], _export, tmp_path / "checkpoint", out, layout)
        check_equal(folder, out)


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen3_moe", (2, 1, 2, 2)), ("llama_tied", (1, 2, 1, 2))]
)
def test_several_ranks_import_what_one_rank_imports(tmp_path, family, layout):
    folder = make_hf_model(family, tmp_path / "m")
    run_ranks(layout[3], _import, folder, tmp_path / "checkpoint", layout)
    run_ranks(1, _export, tmp_path / "checkpoint", tmp_path / "out")
    check_equal(folder, tmp_path / "out")


def _read(rank, world_size, folder, directory):
    model = ModelConfig(pipeline_model_parallel_size=2)
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=Precision.fp32)
    checkpoint.load_model(Path(directory), [gpt])
    return {name: p.detach().clone() for name, p in gpt.named_parameters()}


def test_an_imported_checkpoint_is_read_at_another_layout(tmp_path):
    folder = make_hf_model("llama_tied", tmp_path / "m")
    run_ranks(1, _import, folder, tmp_path / "checkpoint", (1, 1, 1, 1))
    first, last = run_ranks(2, _read, folder, tmp_path / "checkpoint")
    expected = load_file(folder / "model.safetensors")
    embedding = expected["model.embed_tokens.weight"]
    assert torch.equal(first["embedding.word_embeddings.weight"][:101], embedding)
    assert torch.equal(last["output_layer.weight"][:101], embedding)
    for stage, layer in ((first, 0), (last, 1)):
        wanted = expected[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(stage["decoder.layers.0.mlp.linear_fc2.weight"], wanted)


def _save_plain_megatron(rank, world_size, folder, directory):
    """A GPTModel of Megatron's own layers, norms included, as Megatron-LM would save it."""
    model = ModelConfig()
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    (ours,) = build_chunks(load_hf_config(folder), model, parallel, precision=Precision.fp32)
    layer = get_gpt_layer_local_spec(
        num_experts=ours.config.num_moe_experts, qk_layernorm=True, normalization="RMSNorm"
    )
    plain = GPTModel(
        ours.config,
        layer,
        vocab_size=ours.vocab_size,
        max_sequence_length=128,
        share_embeddings_and_output_weights=ours.architecture.tied,
        position_embedding_type="rope",
    )
    Path(directory).mkdir()
    dist_checkpointing.save(plain.sharded_state_dict(), str(directory))


def saved_tensors(directory):
    found = dist_checkpointing.load_tensors_metadata(str(directory))
    return {key: tuple(tensor.global_shape) for key, tensor in found.items()}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_checkpoints_have_megatrons_own_keys_and_shapes(tmp_path, family):
    folder = make_hf_model(family, tmp_path / "m")
    layout = (1, 2, 2, 4) if family == "qwen3_moe" else (1, 2, 1, 2)
    run_ranks(layout[3], _save, folder, tmp_path / "ours", layout, Precision.fp32)
    run_ranks(1, _save_plain_megatron, folder, tmp_path / "plain")
    expected = saved_tensors(tmp_path / "plain")
    if family == "qwen3_moe":
        # Megatron's local layers call the norm before experts by the name that it has where it is
        # fused into an MLP; Transformer Engine's layers, which others run, do not fuse it there
        norm = expected.pop("decoder.layers.mlp.linear_fc1.layer_norm_weight")
        expected["decoder.layers.pre_mlp_layernorm.weight"] = norm
        assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in expected
    assert saved_tensors(tmp_path / "ours") == expected


def test_the_commands_start_as_many_ranks_as_the_layout_has(tmp_path):
    folder = make_hf_model("qwen3_moe", tmp_path / "m")
    layout = ("trainer.devices=2", "model.expert_model_parallel_size=2", "trainer.precision=fp32")
    commands.import_hf([str(folder), str(tmp_path / "checkpoint"), *layout])
    layout = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
    commands.export_hf([str(tmp_path / "checkpoint"), str(tmp_path / "out"), *layout])
    check_equal(folder, tmp_path / "out")


def test_ranks_that_would_hold_copies_are_refused():
    with pytest.raises(ConfigError, match=r"devices is 2, and the layout that converts has 1 rank"):
        convert.check_ranks(make_config((1, 1, 1, 2)))
    convert.check_ranks(make_config((1, 1, 2, 2)))


def _interrupted(rank, world_size, directory, out):
    def stop(done, total):
        raise KeyboardInterrupt

    convert._progress = lambda what, parallel: contextlib.nullcontext(stop)
    with pytest.raises(KeyboardInterrupt):
        _export(rank, world_size, directory, out)


def test_an_interrupted_export_leaves_a_temporary_folder_that_the_next_replaces(tmp_path):
    folder, out = make_hf_model("llama", tmp_path / "m"), tmp_path / "out"
    run_ranks(1, _import, folder, tmp_path / "checkpoint", (1, 1, 1, 1))
    run_ranks(1, _interrupted, tmp_path / "checkpoint", out)
    assert not out.exists() and (tmp_path / ".out.tmp").is_dir()
    (tmp_path / ".out.tmp/stale.safetensors").write_text("half")
    run_ranks(1, _export, tmp_path / "checkpoint", out)
    check_equal(folder, out)
    assert not (tmp_path / ".out.tmp").exists() and not (out / "stale.safetensors").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint and holds no whole one: give RUN"):
        find_checkpoint(tmp_path)
