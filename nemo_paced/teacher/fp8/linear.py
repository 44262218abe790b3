"""Frozen linear layers in FP8 with PyTorch's own GEMM: ``torch._scaled_mm``, on GPU and CPU.

Weights are held in float8_e4m3fn alone, with one float32 scale an output feature; activations are
quantised on the fly, with one scale a token. So a token's result does not depend on which other
tokens, or how much padding, share its micro-batch, and a weight row is scaled alike at every
tensor-parallel size. Only a row-parallel layer, whose ranks each see a part of every row, scales
the parts by themselves (as fine or finer).

    x_ni w_oi  ~  s_n s_o q(x_ni / s_n) q(w_oi / s_o),   s = max |.| of the row / 448

Products are summed in float32 (no fast accumulation) and partial sums of a row-parallel layer are
reduced in the model's dtype, as Megatron does. A column-parallel layer under sequence parallelism
gathers its tokens after quantising them: a byte an element crosses instead of two.

The layers are not differentiable, as the teacher is frozen. Layers whose features are no multiple
of 16, which CUDA's GEMM refuses, raise :class:`~nemo_paced.errors.ConfigError` on every device, so
that what runs on a CPU runs on a GPU.

Axes: N tokens, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.distributed import ProcessGroup

from nemo_paced.errors import ConfigError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
GEMM_MULTIPLE = 16  # divides a weight's input and output features


@dataclass(frozen=True, slots=True)
class RowScaled:
    """A matrix in FP8: float8_e4m3fn [N, I] and its float32 scales [N, 1]."""

    data_NI: torch.Tensor
    scale_N1: torch.Tensor

    @staticmethod
    def of(x_NI: torch.Tensor) -> RowScaled:
        """Quantise each row by its largest magnitude; a row of zeros stays one.

        A row that holds NaN or an infinity becomes NaN. On a CPU it needs one float32 copy of x.
        """
        if x_NI.is_cuda:
            from nemo_paced.teacher.fp8.triton_rows import quantize_rows

            return RowScaled(*quantize_rows(x_NI))
        largest_N1 = torch.maximum(x_NI.amax(1, keepdim=True), -x_NI.amin(1, keepdim=True))
        # an all-zero row would divide by zero
        scale_N1 = (largest_N1.float() / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        return RowScaled((x_NI / scale_N1).to(E4M3), scale_N1)

    def dequantized(self) -> torch.Tensor:
        """The matrix that these numbers stand for: float32 [N, I]."""
        return self.data_NI.float() * self.scale_N1

    def gathered(self, group: ProcessGroup) -> RowScaled:
        """The matrix of all ranks' rows, in the order of the ranks; collective over the group."""
        data_NI, scale_N1 = (
            gather_from_sequence_parallel_region(
                part, tensor_parallel_output_grad=False, group=group
            )
            for part in (self.data_NI.view(torch.uint8), self.scale_N1)
        )
        return RowScaled(data_NI.view(E4M3), scale_N1)


def scaled_matmul(x: RowScaled, weight: RowScaled, dtype: torch.dtype) -> torch.Tensor:
    """The product x W^T of [N, I] and [O, I]: [N, O] in ``dtype``, which is bfloat16 on a GPU."""
    return torch._scaled_mm(
        x.data_NI,
        weight.data_NI.t(),  # column-major, as the GEMM wants its second operand
        scale_a=x.scale_N1,
        scale_b=weight.scale_N1.t(),
        out_dtype=dtype,
        use_fast_accum=False,
    )


class _Fp8Linear(torch.nn.Module):
    """Base of the FP8 layers, column- and row-parallel.

    Weight and scale are buffers that no state dict holds: there is nothing to train or to save.
    """

    data_OI: torch.Tensor
    scale_O1: torch.Tensor

    def __init__(
        self, linear: ColumnParallelLinear | RowParallelLinear, device: torch.device
    ) -> None:
        super().__init__()
        weight = RowScaled.of(linear.weight.detach().to(device))
        self.register_buffer("data_OI", weight.data_NI, persistent=False)
        self.register_buffer("scale_O1", weight.scale_N1, persistent=False)
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.skip_bias_add = linear.skip_bias_add
        self.sequence_parallel = linear.sequence_parallel
        self.explicit_expert_comm = linear.explicit_expert_comm
        self.tp_group = linear.tp_group

    def _multiply(self, x: RowScaled, shape: torch.Size) -> torch.Tensor:
        weight = RowScaled(self.data_OI, self.scale_O1)
        output_NO = scaled_matmul(x, weight, self.dtype)
        # tokens may have been gathered along the first axis
        return output_NO.view(-1, *shape[1:-1], output_NO.shape[-1])

    def _with_bias(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class Fp8ColumnParallelLinear(_Fp8Linear):
    """FP8 layer in place of Megatron's ColumnParallelLinear.

    It maps [s, b, I] ([s/tp, b, I] under sequence parallelism) to ([s, b, O/tp], bias or ``None``).
    """

    @torch.no_grad()
    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = RowScaled.of(input_.reshape(-1, input_.shape[-1]))
        if self.sequence_parallel and not self.explicit_expert_comm:
            x = x.gathered(self.tp_group)
        return self._with_bias(self._multiply(x, input_.shape))


class Fp8RowParallelLinear(_Fp8Linear):
    """FP8 layer in place of Megatron's RowParallelLinear.

    It maps [s, b, I/tp] to ([s, b, O] ([s/tp, b, O] under sequence parallelism), bias or ``None``).
    """

    @torch.no_grad()
    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = RowScaled.of(input_.reshape(-1, input_.shape[-1]))
        output = self._multiply(x, input_.shape)
        if self.explicit_expert_comm:  # the MoE token dispatcher reduces
            return self._with_bias(output)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        else:
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return self._with_bias(output)


class LinearQuantizer:
    """Hook that replaces a model's linear layers by FP8 ones, each once its weight has been filled.

    It is handed to ``load_hf_weights`` as ``on_loaded``, so that no more than one weight exists in
    two precisions at any time.

    Args:
        gpt: with Megatron's local layers; may lie on the host, where untouched values cost nothing.
        bf16_layers: how many layers at the start and at the end of the whole model stay out of FP8.
        device: where the FP8 weights go.

    Raises:
        ConfigError: features of this rank's part of a layer that are no multiple of 16.
    """

    def __init__(self, gpt: GPTModel, bf16_layers: tuple[int, int], device: torch.device) -> None:
        self.device = device
        first, last = bf16_layers[0], gpt.config.num_layers - bf16_layers[1]
        self._places: dict[int, tuple[torch.nn.Module, str]] = {}
        for layer in gpt.decoder.layers:
            if not first <= layer.layer_number - 1 < last:
                continue
            for parent in layer.modules():
                for name, module in parent.named_children():
                    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                        _check_features(module, f"{name} of layer {layer.layer_number - 1}")
                        self._places[id(module.weight)] = (parent, name)

    def __call__(self, parameter: torch.nn.Parameter) -> None:
        """Replace the layer whose weight this parameter is, if it is one of those to quantise."""
        place = self._places.pop(id(parameter), None)
        if place is None:
            return
        parent, name = place
        linear = getattr(parent, name)
        column = isinstance(linear, ColumnParallelLinear)
        quantized = (Fp8ColumnParallelLinear if column else Fp8RowParallelLinear)(
            linear, self.device
        )
        setattr(parent, name, quantized)
        # a caller that walks a list of parameters still holds this one: free its values
        parameter.data = parameter.data.new_empty(0)


def _check_features(linear: ColumnParallelLinear | RowParallelLinear, where: str) -> None:
    rows, columns = linear.weight.shape
    if rows % GEMM_MULTIPLE or columns % GEMM_MULTIPLE:
        raise ConfigError(
            f"teacher.fp8.enabled: {where} has {rows} x {columns} features on a rank, and FP8 "
            f"needs multiples of {GEMM_MULTIPLE}: use a smaller tensor parallel size, or keep the "
            "teacher in BF16"
        )
