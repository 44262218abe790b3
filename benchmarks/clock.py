"""Times between marks, by the CPU's clock or by CUDA events on the current stream."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Clock:
    """Started on construction; ``mark`` ends a lap and begins the next."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds of each lap."""
        if not self._cuda:
            return [end - begin for begin, end in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self._marks)]
