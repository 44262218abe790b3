"""Hugging Face directories that do not fit, and what an exported one holds."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_paced.config import ModelConfig, Precision
from nemo_paced.errors import CheckpointError
from nemo_paced.hf import export_weights
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.export_weights import export_hf
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model


def _load(folder, precision=Precision.fp32, **sizes):
    model = ModelConfig(**sizes)
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=precision)
    load_hf_weights([gpt], folder, parallel)
    return gpt, parallel


def _rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _message(rank, world_size, folder):
    with pytest.raises(CheckpointError) as caught:
        _load(folder)
    return str(caught.value)


def drop(folder):
    _rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def add(folder):
    _rewrite(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))


def reshape(folder):
    _rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))


def remove(folder):
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"m do not fit its LlamaForCausalLM: 1 missing \(model.layers.1.mlp.up_proj.weight"),
        (add, r"1 unexpected \(model.layers.2.mlp.up_proj.weight\)"),
        (reshape, r"tensor model.norm.weight has shape \(47,\), its config.json says \(48,\)"),
        (remove, r"model.safetensors does not exist"),
        (cut_short, r"model.safetensors is damaged"),
        (break_index, r"model.safetensors.index.json is damaged"),
    ],
)
def test_a_damaged_directory_is_refused_by_name(tmp_path, damage, message):
    import re

    folder = make_hf_model("llama", tmp_path / "m")
    damage(folder)
    (told,) = run_ranks(1, _message, folder)
    assert re.search(message, told)


def _loaded_norm(rank, world_size, folder):
    gpt, _ = _load(folder)
    return gpt.decoder.final_layernorm.weight.detach()


def test_rotary_tables_of_old_checkpoints_are_passed_over(tmp_path):
    """transformers wrote them once and ignores them when it reads."""
    folder = make_hf_model("llama", tmp_path / "m")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(folder, lambda t: t.update({name: torch.ones(6)}))
    expected = load_file(folder / "model.safetensors")["model.norm.weight"]
    (norm,) = run_ranks(1, _loaded_norm, folder)
    assert torch.equal(norm, expected)


def _export(rank, world_size, folder, out, precision, late=0.0, shard_bytes=None):
    gpt, parallel = _load(folder, precision)
    if shard_bytes:
        export_weights.SHARD_BYTES = shard_bytes
    if rank:
        time.sleep(late)
    export_hf([gpt], folder, out, parallel)


def test_a_late_data_parallel_rank_does_not_find_its_own_export_in_the_way(tmp_path):
    folder = make_hf_model("llama", tmp_path / "m")
    run_ranks(2, _export, folder, tmp_path / "out", Precision.fp32, 1.0)
    assert (tmp_path / "out/model.safetensors").exists()


def _refused_export(rank, world_size, folder, out):
    with pytest.raises(CheckpointError, match="is not empty: choose a new directory"):
        _export(rank, world_size, folder, out, Precision.fp32)


def test_an_existing_directory_is_refused_on_every_rank_and_left_alone(tmp_path):
    folder = make_hf_model("llama", tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    run_ranks(2, _refused_export, folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_an_export_has_everything_but_the_old_weights(tmp_path):
    folder = make_hf_model("llama", tmp_path / "m")
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in (*carried, "generation_config.json"):
        (folder / name).write_text('{"a": 1}')
    stale = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx")
    for name in stale:
        (folder / name).write_text("old weights")
    out = tmp_path / "new" / "out"
    run_ranks(1, _export, folder, out, Precision.fp32)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", *carried}
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no temporary folder is left"
    assert load_hf_config(out) == load_hf_config(folder) | {"dtype": "float32"}


def test_an_export_in_parts_has_an_index_and_reads_the_same(tmp_path):
    import transformers

    folder, out = make_hf_model("qwen2", tmp_path / "m"), tmp_path / "out"
    run_ranks(1, _export, folder, out, Precision.bf16, 0.0, 20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parts = sorted(out.glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    tensors = [load_file(part) for part in parts]
    assert index["metadata"]["total_size"] == sum(t.nbytes for p in tensors for t in p.values())
    read = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(read[name], value.bfloat16()), name
    # and it is read here too
    (norm,) = run_ranks(1, _loaded_norm, out)
    assert torch.equal(norm, read["model.norm.weight"].float())


def _three_ranks(rank, world_size, folder, out):
    gpt, parallel = _load(folder, tensor_model_parallel_size=3)
    export_hf([gpt], folder, out, parallel)


def test_nine_heads_in_three_groups_at_tensor_parallel_3(tmp_path):
    """Vocabulary 101 is padded to 384: the last two ranks hold nothing but padding."""
    folder = make_hf_model(
        "llama",
        tmp_path / "m",
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=72,
        intermediate_size=96,
    )
    run_ranks(3, _three_ranks, folder, tmp_path / "out")
    before = load_file(Path(folder) / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
