"""Which platform vLLM takes in a server of ours on a machine without a GPU.

Named to vLLM through the entry point group ``vllm.platform_plugins``, which each of its processes
asks before it imports anything else: this file imports nothing.
"""

from __future__ import annotations

import os

FORK_VARIABLE = "NEMO_PACED_FORK_ENGINE"  # in the environment of a server


def platform() -> str | None:
    """Our class where the server's environment asks for it; ``None``: vLLM's own choice."""
    if os.environ.get(FORK_VARIABLE) != "1":
        return None
    return "nemo_paced.serving.vllm_cpu.ForkingCpuPlatform"
