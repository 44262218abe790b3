"""What this machine's CPU computes fast; it needs no torch."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Instructions without which PyTorch's CPU kernels convert every bfloat16 element one by one: a
# matrix product took 500 times as long as in float32.
_FOR_BF16 = ("avx512bw", "avx512_bf16", "amx_bf16", "bf16", "sve")


def computes_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU computes in bfloat16 at about float32's speed; where unknown, ``False``."""
    if platform.system() != "Linux":
        return False
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    words = {
        word
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for word in line.partition(":")[2].split()
    }
    return not words.isdisjoint(_FOR_BF16)
