"""The arithmetic of one FP8 product, on one rank."""

import pytest
import torch

from nemo_paced.teacher.fp8.linear import E4M3, RowScaled, scaled_matmul
from tests.fp8_reference import fake_quantize, to_e4m3

TOKENS = (0, 1, 7, 17, 64)


def random(rows, columns, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def test_the_reference_rounds_as_float8_e4m3fn_does():
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()]
    assert torch.equal(to_e4m3(every).float(), every)
    between = random(1, 20_000, scale=100.0).clamp(-448, 448)
    assert torch.equal(to_e4m3(between).float(), between.to(E4M3).float())
    midpoints = (every.sort()[0][1:] + every.sort()[0][:-1]) / 2
    assert torch.equal(to_e4m3(midpoints).float(), midpoints.to(E4M3).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_row_is_quantised_by_its_largest_magnitude(dtype, scale):
    x = random(7, 48, scale=scale).to(dtype)
    row_scaled = RowScaled.of(x)
    assert row_scaled.data_NI.dtype is E4M3 and row_scaled.scale_N1.dtype is torch.float32
    torch.testing.assert_close(
        row_scaled.dequantized().double(), fake_quantize(x), rtol=1e-6, atol=0
    )
    assert (row_scaled.data_NI.float().abs().amax(1) == 448).all(), "the whole range is used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_product_is_that_of_the_dequantised_operands(tokens, dtype):
    x, weight = random(tokens, 64).to(dtype), random(48, 64, seed=1, scale=0.02).to(dtype)
    product = scaled_matmul(RowScaled.of(x), RowScaled.of(weight), dtype)
    exact = fake_quantize(x) @ fake_quantize(weight).t()
    assert product.dtype is dtype and product.shape == (tokens, 48)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(product.double(), exact, rtol=rounding, atol=1e-6)


def test_zeros_stay_zeros_and_nothing_becomes_infinite():
    x, weight = random(5, 64), random(32, 64, seed=1)
    x[1] = 0.0
    x[2, 3] = 1e38  # an outlier token: its other features vanish beside it, the others' do not
    x[4] = 1e-42  # subnormal in float32
    weight[7] = 0.0
    product = scaled_matmul(RowScaled.of(x), RowScaled.of(weight), torch.float32)
    assert product.isfinite().all()
    assert (product[1] == 0).all() and (product[:, 7] == 0).all()
    alone = scaled_matmul(RowScaled.of(x[:1]), RowScaled.of(weight), torch.float32)
    torch.testing.assert_close(product[:1], alone, rtol=1e-5, atol=1e-5)


def test_a_broken_value_shows_instead_of_being_clipped():
    for broken in (float("nan"), float("inf")):
        x = random(2, 16)
        x[0, 3] = broken
        product = scaled_matmul(RowScaled.of(x), RowScaled.of(random(16, 16)), torch.float32)
        assert product[0].isnan().all() and product[1].isfinite().all()
