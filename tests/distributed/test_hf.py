from pathlib import Path

import pytest
import torch

from nemo_paced.config import ModelConfig, Precision
from nemo_paced.errors import ConfigError
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.export_weights import export_hf
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.parallel.pipeline import run_schedule
from tests.distributed.harness import run_ranks
from tests.tiny import FAMILIES, MOE_FAMILIES, hf_logits, make_hf_model

TOKENS = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(3))
LAYOUTS = ((1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4))  # tensor, pipeline, ranks


# tensor (sequence-parallel above 1), pipeline, expert, ranks
MOE_LAYOUTS = (
    (1, 1, 1, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (2, 1, 2, 2),
    (2, 1, 2, 4),
    (1, 1, 4, 4),
    (1, 2, 2, 4),
    (2, 2, 2, 4),
)


def _join(tensor, pipeline, **changes):
    model = ModelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        make_vocab_size_divisible_by=16,
        **changes,
    )
    return model, groups.initialize(model, accelerator="cpu", timeout_s=60)


def _load(folder, model, parallel):
    (gpt,) = build_chunks(load_hf_config(folder), model, parallel, precision=Precision.fp32)
    load_hf_weights([gpt], folder, parallel)
    return gpt


class _Tokens:
    def __init__(self, tokens_BS):
        self.tokens_BS = tokens_BS


def _forward_and_export(
    rank, world_size, families, tensor, pipeline, sequence_parallel=False, expert=1
):
    results = {}
    model, parallel = _join(
        tensor,
        pipeline,
        sequence_parallel=sequence_parallel,
        expert_model_parallel_size=expert,
    )
    for family in families:
        folder = Path(families[family])
        gpt = _load(folder, model, parallel)

        def forward_step(data_iterator, model):
            tokens = next(data_iterator).tokens_BS
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            return model(tokens, positions, attention_mask=None), lambda x, non_loss_data: x

        with torch.no_grad():
            outputs = run_schedule(
                forward_step,
                [_Tokens(TOKENS), _Tokens(TOKENS.flip(0))],
                [gpt],
                parallel,
                forward_only=True,
                collect_non_loss_data=True,
            )
        out = folder.with_name(f"{family}-out-{tensor}-{pipeline}")
        export_hf([gpt], folder, out, parallel)
        results[family] = ((parallel.dp_rank, parallel.tp_rank), outputs)
    groups.shutdown()
    return results


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: str(make_hf_model(family, folder / family)) for family in FAMILIES}


def _check(families, ranks, tensor, pipeline):
    from safetensors.torch import load_file

    for family, folder in families.items():
        expected = hf_logits(Path(folder), TOKENS)
        shards = dict(r[family] for r in ranks if r[family][1])
        for replica in {dp_rank for dp_rank, _ in shards}:
            for micro_batch, wanted in enumerate((expected, expected.flip(0))):
                parts = [shards[replica, rank][micro_batch] for rank in range(tensor)]
                logits = torch.cat(parts, -1)[..., :101]
                torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        before = load_file(Path(folder) / "model.safetensors")
        out = Path(folder).with_name(f"{family}-out-{tensor}-{pipeline}")
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys(), family
        assert all(torch.equal(before[name], after[name]) for name in before), family
        torch.testing.assert_close(hf_logits(out, TOKENS), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("tensor", "pipeline", "ranks"), LAYOUTS)
def test_logits_equal_transformers_and_export_is_bit_exact(families, tensor, pipeline, ranks):
    results = run_ranks(ranks, _forward_and_export, families, tensor, pipeline)
    _check(families, results, tensor, pipeline)
    _remove_exports(families, tensor, pipeline)


def _remove_exports(families, tensor, pipeline):
    for family, folder in families.items():
        out = Path(folder).with_name(f"{family}-out-{tensor}-{pipeline}")
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_sequence_parallel_logits_equal_transformers(families):
    results = run_ranks(2, _forward_and_export, families, 2, 1, True)
    _check(families, results, 2, 1)


@pytest.fixture(scope="module")
def moe_families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    return {family: str(make_hf_model(family, folder / family)) for family in MOE_FAMILIES}


@pytest.mark.parametrize(("tensor", "pipeline", "expert", "ranks"), MOE_LAYOUTS)
def test_experts_equal_transformers_and_export_bit_exact(
    moe_families, tensor, pipeline, expert, ranks
):
    options = (moe_families, tensor, pipeline, tensor > 1, expert)
    results = run_ranks(ranks, _forward_and_export, *options)
    _check(moe_families, results, tensor, pipeline)
    _remove_exports(moe_families, tensor, pipeline)


def _refused(rank, world_size, folder):
    with pytest.raises(ConfigError) as caught:
        _load(Path(folder), *_join(2, 1))
    return str(caught.value)


def test_a_layout_that_does_not_divide_the_heads_is_refused_by_name(tmp_path):
    folder = make_hf_model(
        "llama", tmp_path / "m", num_attention_heads=9, num_key_value_heads=3, hidden_size=72
    )
    for message in run_ranks(2, _refused, str(folder)):
        assert "model.tensor_model_parallel_size is 2" in message
        assert "9 attention heads" in message
