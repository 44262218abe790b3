"""The FP8 teacher on a GPU: PyTorch's GEMM against the definition, Transformer Engine if there."""

from functools import partial

import pytest
import torch

from nemo_paced.config import Fp8Backend, Fp8Config, Fp8Recipe, ModelConfig, Precision
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.model import build_chunks, has_transformer_engine
from nemo_paced.parallel import groups
from nemo_paced.teacher.fp8.choice import choose_fp8, load_teacher_gpt
from nemo_paced.teacher.fp8.linear import RowScaled, scaled_matmul
from tests.fp8_reference import fake_quantize
from tests.tiny import hf_logits, make_hf_model

needs_te = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 4096])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (4096, 12288)])
def test_a_product_is_that_of_the_dequantised_operands(tokens, inputs, outputs):
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (
        torch.randn(rows, inputs, generator=generator, device="cuda").bfloat16()
        for rows in (tokens, outputs)
    )
    x[0, 3] = 1e4  # an outlier: the token's other features lose precision, nobody else's do
    product = scaled_matmul(RowScaled.of(x), RowScaled.of(weight), torch.bfloat16)
    exact = fake_quantize(x) @ fake_quantize(weight).t()
    assert product.isfinite().all()
    assert (product.double() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [48, 4096, 14336])
def test_rows_are_quantised_as_on_a_cpu(columns, dtype):
    x = torch.randn(33, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, 3], x[4] = 0, torch.nan, 1e-42
    there, here = RowScaled.of(x.cuda()), RowScaled.of(x)
    found, expected = there.data_NI.cpu(), here.data_NI
    # E4M3 has a NaN of either sign, and the two devices choose differently
    nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), nan) and nan[2].all() and nan.sum() == columns
    found, expected = (each.view(torch.uint8)[~nan] for each in (found, expected))
    assert torch.equal(found, expected)
    assert torch.equal(there.scale_N1.cpu().nan_to_num(-1), here.scale_N1.nan_to_num(-1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_hf_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3", hidden_size=64)


@pytest.fixture(scope="module")
def parallel():
    yield groups.initialize(ModelConfig(make_vocab_size_divisible_by=16))
    groups.shutdown()


def logits(folder, parallel, backend, recipe, *, quantized=True, bf16_layers=0):
    settings = Fp8Config(
        enabled=True, backend=backend, recipe=recipe, num_layers_at_start_in_bf16=bf16_layers
    )
    model = ModelConfig(make_vocab_size_divisible_by=16)
    build = partial(build_chunks, load_hf_config(folder), model, parallel, precision=Precision.bf16)
    choice = choose_fp8(
        settings, precision=Precision.bf16, device=parallel.device, num_layers=2, pp_size=1
    )
    gpt = load_teacher_gpt(build, folder, parallel, choice, quantized=quantized)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS).cuda()
    with torch.no_grad():
        found = gpt.requires_grad_(False).eval()(TOKENS.cuda(), positions, attention_mask=None)
    return found[..., :101].float().cpu(), gpt


def check(folder, parallel, backend, recipe):
    exact = hf_logits(folder, TOKENS)
    in_bf16, _ = logits(folder, parallel, backend, recipe, quantized=False)
    in_fp8, gpt = logits(folder, parallel, backend, recipe)
    half, _ = logits(folder, parallel, backend, recipe, bf16_layers=1)
    rounding, drift, less = ((x - exact).norm() / exact.norm() for x in (in_bf16, in_fp8, half))
    assert rounding < 0.03 and rounding < less < drift < 0.25
    return gpt


def test_a_model_on_pytorchs_gemm_drifts_as_fp8_does(folder, parallel):
    check(folder, parallel, Fp8Backend.torch, Fp8Recipe.rowwise)


@needs_te
@pytest.mark.parametrize("recipe", [Fp8Recipe.tensorwise, Fp8Recipe.blockwise, Fp8Recipe.mxfp8])
def test_a_model_on_transformer_engine_drifts_as_fp8_does(folder, parallel, recipe):
    from transformer_engine.pytorch import QuantizedTensor

    if recipe is Fp8Recipe.mxfp8 and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("MXFP8 needs Blackwell")
    gpt = check(folder, parallel, Fp8Backend.transformer_engine, recipe)
    for layer in gpt.decoder.layers:
        matrices = [p for p in layer.parameters() if p.ndim == 2]
        assert len(matrices) == 4 and all(isinstance(p, QuantizedTensor) for p in matrices)
