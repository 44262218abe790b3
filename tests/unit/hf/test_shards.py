"""Cutting and joining are inverse, and each rank's part is what Megatron computes with."""

import pytest
import torch

from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.rows import ParameterLayout
from nemo_paced.hf.shards import cut, join
from tests.unit.hf.test_architectures import QWEN2, QWEN3

# 8 query heads in 4 groups, so that every size below divides them
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 101}


def make(config):
    """The architecture, and (row, its Hugging Face tensors, all values different) once a row."""
    architecture = Architecture.from_config(config | SHAPE)
    rows, count = [], 0.0
    for row in dict.fromkeys(row for row, _ in architecture.rows()):
        tensors = []
        for shape in architecture.hf_shapes(row):
            size = int(torch.tensor(shape).prod())
            tensors.append(torch.arange(count, count + size).reshape(shape))
            count += size
        rows.append((row, tensors))
    return architecture, rows


def cut_all(architecture, row, tensors, size, padded_vocab=104):
    return [
        cut(row, tensors, architecture, rank=rank, size=size, padded_vocab=padded_vocab)
        for rank in range(size)
    ]


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_joining_what_was_cut_gives_the_same_tensors(config, size):
    architecture, rows = make(config)
    assert {row.layout for row, _ in rows} == set(ParameterLayout)
    for row, tensors in rows:
        joined = join(row, cut_all(architecture, row, tensors, size), architecture)
        assert len(joined) == len(tensors)
        for after, before in zip(joined, tensors, strict=True):
            assert torch.equal(after, before), row.megatron


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_is_its_query_heads_then_key_then_value(size):
    architecture, rows = make(QWEN3)
    row, (q, k, v) = next((r, t) for r, t in rows if r.layout is ParameterLayout.qkv)
    whole = torch.cat(cut_all(architecture, row, [q, k, v], size))
    heads = {name: t.split(architecture.head_dim) for name, t in (("q", q), ("k", k), ("v", v))}
    expected = []
    for group in range(4):
        expected += [*heads["q"][2 * group : 2 * group + 2], heads["k"][group], heads["v"][group]]
    assert torch.equal(whole, torch.cat(expected))


def test_each_rank_has_its_gate_above_its_up():
    architecture, rows = make(QWEN3)
    row, (gate, up) = next((r, t) for r, t in rows if r.layout is ParameterLayout.gate_up)
    second = cut_all(architecture, row, [gate, up], 2)[1]
    assert torch.equal(second, torch.cat([gate[32:], up[32:]]))


def test_padding_rows_are_zero_and_never_come_back():
    architecture, rows = make(QWEN3)
    row, (table,) = rows[0]
    # 256 rows on 4 ranks: the second rank is part padding, the last two hold nothing else
    shards = cut_all(architecture, row, [table], 4, padded_vocab=256)
    assert [shard.shape[0] for shard in shards] == [64] * 4
    assert torch.equal(torch.cat(shards)[:101], table)
    assert not torch.cat(shards)[101:].any()
    (joined,) = join(row, [shard + (i > 1) for i, shard in enumerate(shards)], architecture)
    assert torch.equal(joined, table), "whatever training left in the padding"
