"""Throughput of a step: tokens a second, FLOP/s of both models, and MFU where the peak is known.

Model FLOPs are counted as papers count them: what the tokens need (no padding, nothing that is
recomputed), 3 forwards for forward and backward. Peaks are the data sheets' (``sizing/hardware``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from nemo_paced.config import PacedConfig, Precision
from nemo_paced.data.packing import TrainItem
from nemo_paced.hf.architectures import Architecture
from nemo_paced.parallel.groups import Parallel
from nemo_paced.sizing.flops import forward_flops
from nemo_paced.sizing.hardware import GPUS
from nemo_paced.student.step import StepResult


class Throughput:
    """Computes the throughput of a run's steps from the sizes of its models and its ranks."""

    def __init__(self, config: PacedConfig, parallel: Parallel) -> None:
        self.student = Architecture.read(config.student.hf_path, "student.hf_path")
        self.teacher = Architecture.read(config.teacher_hf_path, "teacher.hf_path")
        self.student_ranks = config.student_ranks
        self.teacher_ranks = config.teacher_ranks
        self.separate = bool(config.teacher.separate_ranks)  # the teacher's time is not seen here
        bf16 = config.trainer.compute_precision is Precision.bf16
        self.peak = peak_flops(parallel.device) if bf16 else None

    def metrics(self, items: Sequence[TrainItem], result: StepResult) -> dict[str, float]:
        """Tokens/s, TFLOP/s per rank, MFU and padding of a step that has trained on ``items``."""
        seconds = result.teacher_s + result.student_s
        student = self.student_flops(items) / self.student_ranks
        metrics = {
            "throughput/tokens_per_second": result.tokens / seconds,
            "throughput/student_tflops_per_rank": student / result.student_s / 1e12,
            "throughput/padding_share": result.padding_share,
        }
        if result.cached == 0 and result.teacher_s > 0 and not self.separate:
            teacher = self.teacher_flops(items) / self.teacher_ranks
            metrics["throughput/teacher_tflops_per_rank"] = teacher / result.teacher_s / 1e12
        if self.peak is not None:
            metrics["throughput/mfu"] = student / result.student_s / self.peak
        return metrics

    def student_flops(self, items: Sequence[TrainItem]) -> float:
        """Model FLOPs of the student's forward and backward on ``items``.

        The LM head is included, at the response tokens.
        """
        head = 2 * self.student.vocab_size * self.student.hidden_size
        return 3 * sum(
            forward_flops(self.student, length := _length(item.student_prompt_ids, item), length)
            + head * len(item.response_ids)
            for item in items
        )

    def teacher_flops(self, items: Sequence[TrainItem]) -> float:
        """Model FLOPs of the teacher's forward on ``items``.

        The LM head is left out: its product is a part of the loss.
        """
        return sum(
            forward_flops(self.teacher, length := _length(item.teacher_prompt_ids, item), length)
            for item in items
        )


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of a GPU, FLOP/s; ``None`` where it is not known (every CPU)."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The bf16 peak, FLOP/s, of a GPU by the name that the driver gives it.

    ``None`` for one that is not known: the H100 and H200 on PCIe and their NVL pairs are slower
    than those of SXM boards, and a GB200 is no B200.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"h100", "h200"} and words & {"pcie", "nvl"}:
        return None
    return next((gpu.bf16 for key, gpu in GPUS.items() if key in words), None)


def _length(prompt: tuple[int, ...], item: TrainItem) -> int:
    return len(prompt) + len(item.response_ids)
