"""The FP8 teacher on PyTorch's GEMM, at every layout, against the definition of FP8."""

from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from nemo_paced.config import Fp8Config, Fp8Recipe, ModelConfig, Precision
from nemo_paced.errors import ConfigError
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.parallel.pipeline import run_schedule
from nemo_paced.teacher.fp8 import choice as fp8_module
from nemo_paced.teacher.fp8.choice import choose_fp8, load_teacher_gpt
from nemo_paced.teacher.fp8.linear import (
    E4M3,
    Fp8ColumnParallelLinear,
    Fp8RowParallelLinear,
    RowScaled,
    scaled_matmul,
)
from nemo_paced.teacher.fp8.transformer_engine import transformer_config_fields
from tests.distributed.harness import run_ranks
from tests.fp8_reference import fake_quantize_megatron
from tests.tiny import make_hf_model

TOKENS = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(3))
# tensor, pipeline, sequence parallel
LAYOUTS = {
    "tp1": (1, 1, False),
    "tp2": (2, 1, False),
    "tp2 sp": (2, 1, True),
    "pp2": (1, 2, False),
}
SETTINGS = Fp8Config(enabled=True)


def _join(layout):
    tensor, pipeline, sequence_parallel = LAYOUTS[layout]
    model = ModelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
        make_vocab_size_divisible_by=16,
    )
    return model, groups.initialize(model, accelerator="cpu", timeout_s=60)


def _load(folder, model, parallel, *, precision=Precision.fp32, settings=SETTINGS, quantized=True):
    build = partial(build_chunks, load_hf_config(folder), model, parallel, precision=precision)
    choice = choose_fp8(
        settings, precision=precision, device=parallel.device, num_layers=4, pp_size=1
    )
    return load_teacher_gpt(build, Path(folder), parallel, choice, quantized=quantized)


@torch.no_grad()
def _logits(gpt, parallel):
    class Tokens:
        tokens_BS = TOKENS

    def forward_step(data_iterator, model):
        tokens = next(data_iterator).tokens_BS
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, attention_mask=None), lambda x, non_loss_data: x

    outputs = run_schedule(
        forward_step, [Tokens()], [gpt.eval()], parallel, forward_only=True,
        collect_non_loss_data=True,
    )  # fmt: skip
    return outputs[0] if outputs else None


def _quantized_and_reference(rank, world_size, folder, layout, bf16_layers):
    model, parallel = _join(layout)
    start, end = bf16_layers
    settings = Fp8Config(
        enabled=True, num_layers_at_start_in_bf16=start, num_layers_at_end_in_bf16=end
    )
    quantized = _logits(_load(folder, model, parallel, settings=settings), parallel)
    reference = _load(folder, model, parallel, settings=settings, quantized=False)
    exact = _logits(reference, parallel)
    total = reference.config.num_layers
    fake_quantize_megatron(
        [x for x in reference.decoder.layers if start <= x.layer_number - 1 < total - end],
    )
    return quantized, _logits(reference, parallel), exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # biases on q, k and v
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    return str(make_hf_model("qwen2_tied", folder, num_hidden_layers=4, hidden_size=64))


@pytest.mark.parametrize("bf16_layers", [(0, 0), (1, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_dequantised_weights_and_activations(folder, layout, bf16_layers):
    tensor, pipeline, _ = LAYOUTS[layout]
    results = run_ranks(tensor * pipeline, _quantized_and_reference, folder, layout, bf16_layers)
    for quantized, reference, exact in results:
        if quantized is None:
            assert pipeline > 1
            continue
        drift = (reference - exact).abs().max()
        assert drift > 0.02, "without a difference to see, the test shows nothing"
        # a value that lies between two FP8 numbers may fall to the other side
        torch.testing.assert_close(quantized, reference, rtol=0, atol=0.02 * drift.item())


def _modules_and_bytes(rank, world_size, folder):
    model, parallel = _join("tp2")
    gpt = _load(folder, model, parallel, precision=Precision.bf16)
    plain = _load(folder, model, parallel, precision=Precision.bf16, quantized=False)

    def tensors(module):
        found = [*module.parameters(), *module.buffers()]
        return {t.data_ptr(): t for t in found if t.numel()}.values()

    layers, plain_layers = gpt.decoder.layers, plain.decoder.layers
    weights = sum(p.numel() for p in plain_layers.parameters() if p.ndim == 2)
    others = sum(p.numel() for p in plain_layers.parameters() if p.ndim == 1)
    rows = sum(len(p) for p in plain_layers.parameters() if p.ndim == 2)
    assert sum(t.nbytes for t in tensors(layers)) == weights + 4 * rows + 2 * others
    assert not [p for p in layers.parameters() if p.ndim == 2], "no weight is left"
    state = [v for v in layers.state_dict().values() if v is not None]
    assert not [v for v in state if v.dtype is E4M3]
    kinds = [type(m).__name__ for m in gpt.modules() if isinstance(m, torch.nn.Module)]
    return {name: kinds.count(name) for name in set(kinds) if "Linear" in name}


def test_no_weight_is_left_in_two_precisions(folder):
    for kinds in run_ranks(2, _modules_and_bytes, folder):
        # four layers with two of each kind; embeddings and head stay
        assert kinds == {
            "Fp8ColumnParallelLinear": 8,
            "Fp8RowParallelLinear": 8,
            "ColumnParallelLinear": 1,
        }


def _largest_moment(rank, world_size, folder):
    """Elements of weights that exist in float32 or BF16 while the model is being loaded."""
    model, parallel = _join("tp1")
    alive = []
    quantizer = fp8_module.LinearQuantizer

    class Watched(quantizer):
        def __init__(self, gpt, *args):
            super().__init__(gpt, *args)
            self.weights = [p for p in gpt.decoder.layers.parameters() if p.ndim == 2]
            self.filled = 0

        def __call__(self, parameter):
            self.filled += any(parameter is weight for weight in self.weights)
            super().__call__(parameter)
            alive.append(self.filled - sum(weight.numel() == 0 for weight in self.weights))

    fp8_module.LinearQuantizer = Watched
    _load(folder, model, parallel)
    return alive


def test_weights_are_quantised_one_by_one_as_they_are_read(folder):
    (alive,) = run_ranks(1, _largest_moment, folder)
    assert len(alive) > 16 and set(alive) == {0}, "a filled weight waits to be quantised"


def _expert_layers(rank, world_size):
    """As SequentialMLP uses them: tokens are dispatched already, nothing is gathered or reduced."""
    from megatron.core.transformer import TransformerConfig

    _, parallel = _join("tp2")
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True,
        tensor_model_parallel_size=2, sequence_parallel=True, perform_initialization=False,
        add_bias_linear=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    results = []
    for kind, quantized, options in (
        (ColumnParallelLinear, Fp8ColumnParallelLinear, {"gather_output": False}),
        (RowParallelLinear, Fp8RowParallelLinear, {"input_is_parallel": True}),
    ):
        linear = kind(
            32, 64, config=config, init_method=None, bias=False, skip_bias_add=True,
            is_expert=True, tp_group=parallel.tp_group, **options,
        )  # fmt: skip
        with torch.no_grad():
            linear.weight.normal_(generator=generator)
        x = torch.randn(7, 1, linear.weight.shape[1], generator=generator)
        fp8_output, _ = quantized(linear, parallel.device)(x)
        own = scaled_matmul(RowScaled.of(x[:, 0]), RowScaled.of(linear.weight), torch.float32)
        results.append((fp8_output[:, 0], own, linear(x)[0][:, 0].detach()))
    return results


def test_experts_neither_gather_nor_reduce():
    for results in run_ranks(2, _expert_layers):
        for fp8_output, own, megatron in results:
            assert torch.equal(fp8_output, own)
            assert (fp8_output - megatron).norm() < 0.06 * megatron.norm()


def _config_with_switches(rank, world_size, folder):
    """Megatron's switches for Transformer Engine on its local layers, which go by none of them."""
    model, parallel = _join("tp1")
    fields = transformer_config_fields(Fp8Recipe.tensorwise, (1, 0))
    (gpt,) = build_chunks(
        load_hf_config(folder), model, parallel, precision=Precision.fp32,
        transformer_engine=False, overrides=fields,
    )  # fmt: skip
    load_hf_weights([gpt], folder, parallel)
    plain = _load(folder, model, parallel, quantized=False)
    assert torch.equal(_logits(gpt, parallel), _logits(plain, parallel))
    assert fields.items() <= vars(gpt.config).items() and not plain.config.fp8


def test_switches_reach_the_model_and_change_nothing_else(folder):
    run_ranks(1, _config_with_switches, folder)


def _refused(rank, world_size, folder):
    model, parallel = _join("tp1")
    with pytest.raises(ConfigError, match=r"linear_fc2 of layer 0 has 48 x 24 features"):
        _load(folder, model, parallel)


def test_features_that_fp8_cannot_take_are_refused(tmp_path):
    run_ranks(1, _refused, str(make_hf_model("llama", tmp_path / "odd", intermediate_size=24)))
