"""The Megatron student as vLLM's own ``WeightSource``."""

import inspect
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from nemo_paced.config import ModelConfig, Precision
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.refit.weight_source import MegatronWeightSource, ParamMeta
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model


def _walk(rank, world_size, folder, tensor, pipeline, precision=Precision.fp32, expert=1):
    model = ModelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        sequence_parallel=tensor > 1,
    )
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=precision)
    load_hf_weights([gpt], folder, parallel)
    source = MegatronWeightSource([gpt], parallel)
    passes = []
    for _ in range(2):  # each pass reads the weights as they are
        passes.append([(n, None if t is None else t.clone()) for n, t in source])
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.mul_(2)
    batches = [(names, [t.clone() for t in tensors]) for names, tensors in source.iter_groups()]
    return {
        "metadata": source.metadata(),
        "held": source.held_names(),
        "groups": source.groups(),
        "passes": passes,
        "batches": batches,
    }


@pytest.mark.parametrize(
    ("family", "tensor", "pipeline", "expert"),
    [
        *((f, t, p, 1) for f in ("qwen3", "qwen3_tied") for t in (1, 2) for p in (1, 2)),
        ("qwen3_moe", 1, 1, 2),
        ("qwen3_moe", 2, 1, 2),
        ("qwen3_moe", 1, 2, 2),
    ],
)
def test_every_pass_yields_what_metadata_declares(tmp_path, family, tensor, pipeline, expert):
    folder = make_hf_model(family, tmp_path / "m")
    expected = load_file(folder / "model.safetensors")
    ranks = max(2, tensor * pipeline, expert * pipeline)
    options = (folder, tensor, pipeline, Precision.fp32, expert)
    writer, *others = run_ranks(ranks, _walk, *options)
    declared = [(meta.name, meta.dtype, meta.shape) for meta in writer["metadata"]]
    for scale, walked in zip((1, 2), writer["passes"], strict=True):
        assert [(n, t.dtype, tuple(t.shape)) for n, t in walked] == declared
        assert walked[0][0] == "model.embed_tokens.weight"
        assert {n for n, _ in walked} == expected.keys()
        assert all(torch.equal(t, scale * expected[n]) for n, t in walked)
    assert [names for names, _ in writer["batches"]] == writer["groups"]
    for names, tensors in writer["batches"]:
        for name, tensor in zip(names, tensors, strict=True):
            assert torch.equal(tensor, 4 * expected[name])
    assert writer["held"] is None
    for rank in others:
        assert rank["metadata"] == writer["metadata"] and rank["held"] == set()
        assert all(t is None for walked in rank["passes"] for _, t in walked)
        assert rank["groups"] == rank["batches"] == []


def test_the_wire_dtype_is_the_models(tmp_path):
    folder = make_hf_model("llama", tmp_path / "m")
    (writer,) = run_ranks(1, _walk, folder, 1, 1, Precision.bf16)
    assert {meta.dtype for meta in writer["metadata"]} == {torch.bfloat16}
    assert {t.dtype for _, t in writer["passes"][0]} == {torch.bfloat16}


def test_it_is_vllms_weight_source_in_all_but_name(tmp_path):
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")
    public = [n for n in vars(base.WeightSource) if not n.startswith("_")] + ["__iter__"]
    assert "iter_groups" in public
    for name in public:
        theirs, ours = getattr(base.WeightSource, name), getattr(MegatronWeightSource, name, None)
        assert ours is not None, f"{name} is missing"
        assert list(inspect.signature(ours).parameters) == list(
            inspect.signature(theirs).parameters
        ), name
    assert [f.name for f in fields(ParamMeta)] == [f.name for f in fields(base.ParamMeta)]
    folder = make_hf_model("qwen3", tmp_path / "m", num_hidden_layers=11)
    (walked,) = run_ranks(1, _walk, folder, 1, 1)
    names = [meta.name for meta in walked["metadata"]]
    assert walked["groups"] == base.layerwise_groups(names)
    # their default batching, which checks the order of names, driven by our iteration
    replay = _Replay(walked["metadata"], walked["passes"][0])
    batches = list(base.WeightSource.iter_groups(replay))
    assert [b[0] for b in batches] == [b[0] for b in walked["batches"]]


class _Replay:
    def __init__(self, metadata, stream):
        self.metadata = lambda: metadata
        self.held_names = lambda: None
        self.stream = stream

    def __iter__(self):
        return iter(self.stream)

    def groups(self):
        from vllm.distributed.weight_transfer.base import WeightSource

        return WeightSource.groups(self)
