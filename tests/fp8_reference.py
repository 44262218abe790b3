"""FP8 by its definition, in float64: what the teacher's FP8 layers are checked against."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

E4M3_MAX = 448.0


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest number of float8_e4m3fn, ties to even, saturating: float64, same shape."""
    x = x.double()
    exponent = x.abs().clamp_min(2.0**-40).log2().floor().clamp_min(-6)  # subnormal below 2^-6
    step = 2.0 ** (exponent - 3)  # three bits of mantissa
    return ((x / step).round() * step).clamp(-E4M3_MAX, E4M3_MAX)


def fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """Through FP8 and back, one scale a row (last axis): float64, same shape."""
    scale = x.float().abs().amax(-1, keepdim=True) / E4M3_MAX
    # the division that decides the rounding is float32's
    return to_e4m3(x.float() / scale.clamp_min(1e-37)) * scale.double()


def fake_quantize_parts(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Each of ``parts`` equal slices of the last axis with scales of its own."""
    return torch.cat([fake_quantize(part) for part in x.chunk(parts, -1)], -1)


def fake_quantize_megatron(layers):
    """Megatron's own layers with dequantised weights, given inputs that went through FP8."""
    for layer in layers:
        for linear in layer.modules():
            if isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
                with torch.no_grad():
                    linear.weight.copy_(fake_quantize(linear.weight))
                linear.register_forward_pre_hook(
                    lambda _, args: (fake_quantize(args[0]).to(args[0].dtype), *args[1:])
                )


def fake_quantize_transformers(model, *, tp_size: int) -> None:
    """The same of a transformers model; row-parallel layers in the parts that ``tp_size`` makes."""
    for layer in model.model.layers:
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                parts = tp_size if name.endswith(("o_proj", "down_proj")) else 1
                with torch.no_grad():
                    linear.weight.copy_(fake_quantize_parts(linear.weight, parts))
                linear.register_forward_pre_hook(
                    lambda _, args, parts=parts: (fake_quantize_parts(args[0], parts),)
                )
