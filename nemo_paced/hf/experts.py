"""Mixture-of-experts layers in Megatron-Core's configuration, as Hugging Face computes them."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter

from nemo_paced.config import ModelConfig
from nemo_paced.hf.architectures import Architecture
from nemo_paced.parallel.groups import EXPERT_TENSOR_PARALLEL_SIZE


def experts_config(architecture: Architecture, model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` for a model's experts; empty without experts.

    Hugging Face takes the softmax over all experts, then the top-k, then divides by their sum;
    Megatron's softmax over the top-k logits gives the same weights without the division.
    """
    experts = architecture.experts
    if experts is None:
        return {}
    every_layer = len(experts.layers) == architecture.num_layers
    pattern = [int(layer in experts.layers) for layer in range(architecture.num_layers)]
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": 1 if every_layer else pattern,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalize,
        # A softmax before the top-k would leave many experts tied in bf16. Without one, logits are
        # ranked, and Hugging Face ranks them in the model's dtype.
        "moe_router_dtype": None if experts.normalize else "fp32",
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff * _ranks_left_out(model),
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": EXPERT_TENSOR_PARALLEL_SIZE,
    }


def _ranks_left_out(model: ModelConfig) -> int:
    """What Megatron's loss for balancing experts has to be multiplied by.

    Each rank adds its tokens' share of it, and Megatron-Core 0.16 multiplies that by the rank's own
    number of tokens and not by the micro-batch's: the sum is too small by the number of ranks that
    a sequence is cut over. Later releases multiply by that number themselves.
    """
    attach = inspect.getsource(TopKRouter.attach_and_log_load_balancing_loss)
    if "tp_cp_group.size()" in attach:
        return 1
    return model.tensor_model_parallel_size * model.context_parallel_size
