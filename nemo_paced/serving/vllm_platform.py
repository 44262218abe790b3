"""Choice of vLLM's platform in a rollout server on a machine without a GPU.

vLLM finds it through the entry point group ``vllm.platform_plugins``, which each of its processes
asks before it imports anything else: this module imports ``os`` alone.
"""

from __future__ import annotations

import os

FORK_VARIABLE = "NEMO_PACED_FORK_ENGINE"  # in the environment of a server


def platform() -> str | None:
    """The name of ``ForkingCpuPlatform`` where the server's environment asks for it.

    ``None`` leaves the choice to vLLM.
    """
    if os.environ.get(FORK_VARIABLE) != "1":
        return None
    return "nemo_paced.serving.vllm_cpu.ForkingCpuPlatform"
