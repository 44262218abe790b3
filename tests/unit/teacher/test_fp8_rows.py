"""The Triton kernel that quantises rows: in Triton's interpreter, and compiled for an H100."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_paced.teacher.fp8.linear import RowScaled

ROOT = Path(__file__).parents[3]
BROKEN, ZERO, INFINITE, SUBNORMAL = 2, 1, 3, 4  # rows
RUN = """
import sys, torch
from nemo_paced.teacher.fp8.triton_rows import quantize_rows
inputs = torch.load(sys.argv[1])
torch.save([quantize_rows(x) for x in inputs], sys.argv[2])
"""
COMPILE = """
import re, torch
from triton import compiler
from triton.backends.compiler import GPUTarget
from nemo_paced.teacher.fp8.triton_rows import _quantize_kernel
types = dict(x_NI="*bf16", data_NI="*fp8e4nv", scale_N="*fp32", columns="i32", stride="i32")
constants = dict(LARGEST=448.0, TINY=torch.finfo(torch.float32).tiny, BLOCK=4096)
aligned = {(index,): [["tt.divisibility", 16]] for index in range(5)}
source = compiler.ASTSource(
    _quantize_kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned
)
text = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm
print(sorted(set(re.findall(r"(?:ld|st)[.]global[.0-9a-z]*|cvt[.0-9a-z]*e4m3[.0-9a-z]*|div[.a-z0-9]*",
                            text["ptx"]))))
"""


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Inputs, and what the kernel makes of them."""
    folder = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for dtype, columns in ((torch.float32, 48), (torch.bfloat16, 4096 + 48)):
        x = torch.randn(7, columns, generator=generator)
        x[ZERO], x[BROKEN, 3], x[INFINITE, 5], x[SUBNORMAL] = 0, torch.nan, -torch.inf, 1e-42
        inputs.append(x.to(dtype))
    inputs.append(torch.randn(5, 96, generator=generator)[:, ::2])  # not contiguous
    inputs.append(torch.randn(0, 16, generator=generator))
    torch.save(inputs, folder / "inputs.pt")
    run(RUN, str(folder / "inputs.pt"), str(folder / "found.pt"), TRITON_INTERPRET="1")
    return list(zip(inputs, torch.load(folder / "found.pt"), strict=True))


def test_rows_are_those_of_pytorch(cases):
    for x, (data, scale) in cases:
        expected = RowScaled.of(x)
        assert torch.equal(scale.nan_to_num(-1), expected.scale_N1.nan_to_num(-1))
        sound = [row for row in range(len(x)) if len(x) != 7 or row not in (BROKEN, INFINITE)]
        got, wanted = data[sound].float(), expected.data_NI[sound].float()
        # Triton's interpreter loses the carry of a rounding up to the next power of two
        exact = (x / scale)[sound].float()
        carried = torch.frexp(wanted).exponent > torch.frexp(exact).exponent
        carried &= wanted != 0  # what is rounded to zero has no exponent
        assert torch.equal(got[~carried], wanted[~carried])
        assert carried.sum() <= 0.1 * carried.numel()


def test_broken_rows_show(cases):
    for x, (data, scale) in cases[:2]:
        dequantized = data.float() * scale
        assert dequantized[BROKEN].isnan().all() and not x[ZERO].any()
        assert scale[INFINITE].isinf() and (dequantized[ZERO] == 0).all()


def test_an_h100_loads_sixteen_bytes_rounds_to_nearest_and_divides_exactly():
    instructions = run(COMPILE)
    for wanted in ("ld.global.v4.b32", "st.global.v4.b32", "cvt.rn.satfinite.e4m3x2.f32"):
        assert wanted in instructions
    assert "div.rn.f32" in instructions and "div.full" not in instructions
