"""Sizes of published models, for tests."""

from nemo_paced.hf.architectures import Experts
from nemo_paced.sizing.shapes import ModelShape

QWEN3_1_7B = ModelShape(28, 2048, 6144, 16, 8, 128, 151936, tied=True, qk_norm=True)
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True)
QWEN3_32B = ModelShape(64, 5120, 25600, 64, 8, 128, 151936, qk_norm=True)
_EXPERTS = Experts(128, 8, 768, True, frozenset(range(48)))
QWEN3_30B_A3B = ModelShape(48, 2048, 6144, 32, 4, 128, 151936, qk_norm=True, experts=_EXPERTS)
LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
