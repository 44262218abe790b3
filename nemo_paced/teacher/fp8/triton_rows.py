"""Rows quantised to FP8 by one Triton kernel: two bytes an element read twice, one written.

The same numbers as :meth:`~nemo_paced.teacher.fp8.linear.RowScaled.of` gives in PyTorch, whose five
operators move three times as much and hold a float32 copy: on a GPU that would be a fifth of the
time of the GEMM that follows. The second reading comes out of the cache.

Axes: N rows (tokens), I columns (features).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST_BLOCK = 4096  # columns that a program takes at a time


@triton.jit
def _quantize_kernel(
    x_NI, data_NI, scale_N, columns, stride, LARGEST: tl.constexpr, TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    largest_B = tl.zeros([BLOCK], tl.float32)
    broken_B = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, columns, BLOCK):
        inside_B = begin + column_B < columns
        x_B = tl.load(x_NI + row * stride + begin + column_B, mask=inside_B, other=0.0)
        x_B = tl.abs(x_B.to(tl.float32))
        broken_B |= (x_B != x_B).to(tl.int32)  # a maximum passes NaN over
        largest_B = tl.maximum(largest_B, x_B)
    scale = tl.maximum(tl.div_rn(tl.max(largest_B, 0), LARGEST), TINY)
    scale = tl.where(tl.max(broken_B, 0) > 0, float("nan"), scale)
    tl.store(scale_N + row, scale)
    for begin in range(0, columns, BLOCK):
        inside_B = begin + column_B < columns
        x_B = tl.load(x_NI + row * stride + begin + column_B, mask=inside_B, other=0.0)
        quantized_B = tl.div_rn(x_B.to(tl.float32), scale).to(tl.float8e4nv)
        tl.store(data_NI + row * columns + begin + column_B, quantized_B, mask=inside_B)


def quantize_rows(x_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its largest magnitude.

    Args:
        x_NI: float32, bfloat16 or float16, its columns contiguous.

    Returns:
        float8_e4m3fn [N, I] and float32 scales [N, 1]. A row that holds NaN or an infinity becomes
        NaN; a row of zeros stays one.
    """
    rows, columns = x_NI.shape
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    data_NI = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x_NI.device)
    scale_N1 = torch.empty((rows, 1), dtype=torch.float32, device=x_NI.device)
    if rows:
        _quantize_kernel[(rows,)](
            x_NI, data_NI, scale_N1, columns, x_NI.stride(0),
            LARGEST=torch.finfo(torch.float8_e4m3fn).max,
            TINY=torch.finfo(torch.float32).tiny,
            BLOCK=min(triton.next_power_of_2(columns), WIDEST_BLOCK),
            num_warps=8 if columns > 2048 else 4,
        )  # fmt: skip
    return data_NI, scale_N1
