"""Each rank's parts of the Hugging Face tensors, as nccl_m2n reshards them."""

import pytest
import torch
from safetensors.torch import load_file

from nemo_paced.config import ModelConfig, Precision, RefitBackend
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.refit.meeting import Meeting
from nemo_paced.refit.vllm_senders import EverywhereSource, ShardSource, init_info
from tests.distributed.harness import run_ranks
from tests.tiny import make_hf_model


def _walk(rank, world_size, folder, tensor, pipeline, expert):
    model = ModelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        sequence_parallel=tensor > 1,
    )
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=Precision.fp32)
    load_hf_weights([gpt], folder, parallel)
    shards = ShardSource([gpt], parallel)
    meeting = Meeting(RefitBackend.nccl_m2n, "127.0.0.1", 1, (2, 2))
    return {
        "mesh": shards.mesh(),
        "metadata": shards.metadata(),
        "shards": [(name, part.clone()) for name, part in shards],
        "whole": [(name, t.clone()) for name, t in EverywhereSource([gpt], parallel)],
        "init": init_info(meeting, parallel),
    }


def _put_together(name, mesh, placements, parts):
    """What m2n's description of the source says that the tensor is."""
    assert mesh.size == len(parts)
    if placements is None:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    replicas, shards = mesh.dims
    assert placements[0] == -1
    rows = [parts[i * shards : (i + 1) * shards] for i in range(replicas)]
    tensors = [torch.cat(row, placements[1]) for row in rows]
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
    return tensors[0]


@pytest.mark.parametrize(
    ("family", "ranks", "tensor", "pipeline", "expert"),
    [
        ("qwen3", 4, 2, 2, 1),
        ("qwen3_tied", 4, 2, 1, 1),
        ("qwen3_moe", 4, 2, 2, 2),
        ("qwen3_moe", 2, 1, 1, 2),
    ],
)
def test_the_parts_described_to_m2n_make_up_the_checkpoint(
    tmp_path, family, ranks, tensor, pipeline, expert
):
    folder = make_hf_model(family, tmp_path / "m")
    expected = load_file(folder / "model.safetensors")
    walked = run_ranks(ranks, _walk, folder, tensor, pipeline, expert)
    first = walked[0]
    names = [meta.name for meta in first["metadata"]]
    assert set(names) == expected.keys() and len(set(names)) == len(names)
    for rank in walked:
        assert rank["metadata"] == first["metadata"] and rank["mesh"] == first["mesh"]
        assert [name for name, _ in rank["shards"]] == names
        assert all(torch.equal(t, expected[name]) for name, t in rank["whole"])
    for index, meta in enumerate(first["metadata"]):
        parts = [rank["shards"][index][1] for rank in walked]
        whole = _put_together(meta.name, first["mesh"], meta.placements, parts)
        assert tuple(whole.shape) == meta.shape and torch.equal(whole, expected[meta.name])
    if tensor > 1:
        cut = {meta.name for meta in first["metadata"] if meta.placements is not None}
        assert "model.layers.0.self_attn.q_proj.weight" in cut
        assert "model.layers.0.self_attn.o_proj.weight" in cut


def test_the_group_holds_trainer_ranks_before_the_servers(tmp_path):
    folder = make_hf_model("qwen3", tmp_path / "m")
    ranks = [rank["init"] for rank in run_ranks(2, _walk, folder, 2, 1, 1)]
    assert [info.rank for info in ranks] == [0, 1]
    assert {(i.num_trainer_ranks, i.world_size, i.destination_mesh_dims) for i in ranks} == {
        (2, 6, (2, 2))
    }
