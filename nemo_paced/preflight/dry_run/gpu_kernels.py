"""Stand-ins for the kernels of a GPU: what each keeps for backward and gives, without arithmetic.

On a CPU layers are Megatron's local ones, whose norms, rotations and SwiGLU are several operators
with a tensor each, and the losses are PyTorch's; on a GPU each is one kernel. The stand-ins keep
what Transformer Engine's norms and attention keep, and what Megatron's fused SwiGLU and this
package's Triton kernels do. They run on fake tensors alone: values are never written.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from nemo_paced.hf.attention import CoreAttention
from nemo_paced.hf.model import RMSNorm
from nemo_paced.losses.options import Options
from nemo_paced.teacher.fp8.linear import E4M3, RowScaled


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of the same shape and type."""
    return tensor.new_empty(tensor.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return like(x), like(weight)


class FusedRMSNorm(RMSNorm):
    """RMSNorm that keeps its input and a number a row; its output is the next layer's to keep."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(x, self.weight)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        attended = like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, log_sum_exp)
        return attended

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return like(query), like(key), like(value)


class FlashAttention(CoreAttention):
    """Attention without a score matrix: it keeps its inputs, its output and a number a head.

    Under context parallelism keys and values of other ranks, which pass through, are not counted.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        return _Attention.apply(query, key, value).flatten(-2)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return like(grad)


def rotated(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The rotary embedding of queries or keys, which keeps nothing of them."""
    return _Rotation.apply(x)


def swiglu(gate_up: torch.Tensor, *_: Any) -> torch.Tensor:
    """SwiGLU in one kernel, with a factor a token or without."""
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def swiglu_back(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    return like(gate_up)


def weighted_swiglu_back(
    grad: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return like(gate_up), like(weights)


def _local_stats(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: Options
) -> torch.Tensor:
    chosen = options.divergence
    rows = 4 + chosen.needs_forward_kl + chosen.needs_reverse_kl
    return student_NV.new_zeros((rows, student_NV.shape[0]), dtype=torch.float32)


def _two_numbers(student_NV: torch.Tensor, *_: Any) -> torch.Tensor:
    return student_NV.new_zeros((2, student_NV.shape[0]), dtype=torch.float32)


def in_place(*_: Any, **__: Any) -> None:
    """A kernel that writes where it is told to and needs nothing beside.

    So are the losses' gradients in the student's logits, a product of 16-bit matrices that is added
    to a float32 one, and the scaling of many tensors.
    """


# in place of the modules ``losses/triton_kernels.py`` and ``losses/triton_adaptive_kl.py``
LOSS = SimpleNamespace(local_stats=_local_stats, mixture_sums=_two_numbers, gradient=in_place)
ADAPTIVE_KL = SimpleNamespace(head_tail_gaps=_two_numbers)


def quantized(x_NI: torch.Tensor) -> RowScaled:
    """Rows in FP8 with a float32 scale each, in one kernel."""
    return RowScaled(
        x_NI.new_empty(x_NI.shape, dtype=E4M3),
        x_NI.new_empty((x_NI.shape[0], 1), dtype=torch.float32),
    )


def norm_of_all(chunk: int, flag: torch.Tensor, lists: Any, *_: Any) -> tuple[torch.Tensor, None]:
    """The norm of many tensors in one kernel."""
    return flag.new_zeros(1, dtype=torch.float32), None
