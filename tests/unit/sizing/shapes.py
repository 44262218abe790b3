"""Architectures of published models, by their sizes, for tests."""

from dataclasses import replace

from nemo_paced.hf.architectures import Architecture, Experts

# what a plan does not look at
UNSIZED = {"name": "", "max_positions": 0, "norm_eps": 0.0, "rope_base": 0.0, "rope_scaling": None}


def model(layers, hidden, ffn, heads, kv_heads, vocab, *, tied=False, qk_norm=False, experts=None):
    """With heads of 128."""
    return Architecture(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, vocab_size=vocab, tied=tied, qkv_bias=False,
        qk_norm=qk_norm, experts=experts, **UNSIZED,
    )  # fmt: skip


def sizes(architecture):
    """An architecture as :func:`model` makes it."""
    return replace(architecture, **UNSIZED)


QWEN3_1_7B = model(28, 2048, 6144, 16, 8, 151936, tied=True, qk_norm=True)
QWEN3_8B = model(36, 4096, 12288, 32, 8, 151936, qk_norm=True)
QWEN3_32B = model(64, 5120, 25600, 64, 8, 151936, qk_norm=True)
_EXPERTS = Experts(128, 8, 768, True, frozenset(range(48)))
QWEN3_30B_A3B = model(48, 2048, 6144, 32, 4, 151936, qk_norm=True, experts=_EXPERTS)
LLAMA3_8B = model(32, 4096, 14336, 32, 8, 128256)
