"""Tiny random Hugging Face models of each family, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MOE_SHAPE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
FAMILIES = (
    "qwen3",
    "qwen3_tied",
    "qwen2",
    "qwen2_tied",
    "llama",
    "llama_tied",
    "llama3_rope",
)
MOE_FAMILIES = {
    "qwen3_moe": {},
    "qwen3_moe_tied": {},
    "qwen3_moe_unnormalised": {"norm_topk_prob": False},
    "qwen3_moe_mixed": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
}


def make_hf_model(family: str, folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a random model of the family and return its directory."""
    import transformers

    shape = {**SHAPE, **MOE_FAMILIES.get(family, {}), **changes}
    tied = family.endswith("_tied")
    if family.startswith("qwen3_moe"):
        config = transformers.Qwen3MoeConfig(
            **{**MOE_SHAPE, **shape, "head_dim": 32, "tie_word_embeddings": tied}
        )
    elif family.startswith("qwen3"):
        config = transformers.Qwen3Config(**shape, head_dim=32, tie_word_embeddings=tied)
    elif family.startswith("qwen2"):
        config = transformers.Qwen2Config(**shape, tie_word_embeddings=tied)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if family == "llama3_rope":
            rope = {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        config = transformers.LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # random norms and biases too, so that a swapped one shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 logits [b, s, v] of transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits
