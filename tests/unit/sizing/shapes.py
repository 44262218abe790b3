"""Sizes of published models, for tests."""

from nemo_paced.sizing.shapes import ModelShape

QWEN3_1_7B = ModelShape(28, 2048, 6144, 16, 8, 128, 151936, tied=True, qk_norm=True)
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True)
QWEN3_32B = ModelShape(64, 5120, 25600, 64, 8, 128, 151936, qk_norm=True)
QWEN3_30B_A3B = ModelShape(
    48, 2048, 768, 32, 4, 128, 151936, qk_norm=True, num_experts=128, experts_per_token=8
)
LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
