"""Parameters whose gradients ``snr`` measures: the LM head's weight, and those of last layers.

Of a tied weight only the use in the LM head counts, not that in the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.student.output_layer import DivergenceOutputLayer


class HeadGradientLayer(DivergenceOutputLayer):
    """Output layer whose weight is a leaf of its own, so that gradients end here, tied or not."""

    head: torch.Tensor | None = None  # the leaf [v/tp, h] of the last forward

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        self.head = (self.weight if weight is None else weight).detach().requires_grad_()
        with torch.enable_grad():
            return super().forward(input_, self.head, runtime_gather_output)


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured parameter other than the LM head's weight.

    Attributes:
        parameter: this rank's part or copy of it.
        parts: whether tensor-parallel ranks hold different parts of it, and not copies.
        partial: whether gradients of its copies are to be summed over the tensor-parallel group.
    """

    parameter: torch.nn.Parameter
    parts: bool
    partial: bool


def measure_layers(gpt: PacedGPTModel, count: int) -> list[Measured]:
    """Make the parameters of the last ``count`` layers and of the final norm require gradients.

    Earlier layers run without a graph: a hook enables gradients before the first measured layer,
    and the ``no_grad`` around the caller's forward restores the mode when it ends.
    """
    layers = gpt.decoder.layers[-count:]
    layers[0].register_forward_pre_hook(_begin_graph, with_kwargs=True)
    return [
        Measured(
            parameter.requires_grad_(),
            parts=getattr(parameter, "tensor_model_parallel", False),
            # as in Megatron's finalize_model_grads: for these a rank has seen its own part of the
            # sequence, or its own heads, alone
            partial=getattr(parameter, "sequence_parallel", False)
            or "q_layernorm" in name
            or "k_layernorm" in name,
        )
        for module in (*layers, gpt.decoder.final_layernorm)
        for name, parameter in module.named_parameters()
    ]


def _begin_graph(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    torch.set_grad_enabled(True)
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}
