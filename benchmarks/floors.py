"""What no implementation undercuts on this machine: bytes over bandwidth, and the GEMMs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from clock import Clock
from reference import Linear, Logits


@dataclass(frozen=True, slots=True)
class Probe:
    """Something timed in the same rounds as the contenders; one lap for each name."""

    laps: tuple[str, ...]
    run: Callable[[Clock], None]


def copy_probe(logits: Logits) -> Probe:
    """Copies of the student's logits into memory in use, and into fresh memory.

    Fresh memory pays page faults on the CPU, as a gradient just allocated does. On CUDA the caching
    allocator hands out memory in use and the two are alike.
    """
    source = logits.student.detach()
    warm = source.clone()

    def run(clock: Clock) -> None:
        warm.copy_(source)
        clock.mark()
        fresh = torch.empty_like(source).copy_(source)
        clock.mark()
        del fresh

    return Probe(("copy_warm", "copy_fresh"), run)


def gemm_probe(linear: Linear) -> Probe:
    """The four products every exact fused loss needs, each in one piece into memory in use."""
    with torch.no_grad():
        logits = linear.logits()
    student, teacher = logits.student, logits.teacher
    grad_hidden = torch.empty_like(linear.student_hidden)
    grad_weight = torch.empty_like(linear.student_weight)
    hidden, weight = linear.student_hidden.detach(), linear.student_weight.detach()

    def run(clock: Clock) -> None:
        torch.mm(hidden, weight.t(), out=student)
        clock.mark()
        torch.mm(linear.teacher_hidden, linear.teacher_weight.t(), out=teacher)
        clock.mark()
        torch.mm(student, weight, out=grad_hidden)
        clock.mark()
        torch.mm(student.t(), hidden, out=grad_weight)
        clock.mark()

    laps = "gemm_student_logits", "gemm_teacher_logits", "gemm_grad_hidden", "gemm_grad_weight"
    return Probe(laps, run)


def logits_floor(lap_s: dict[str, float]) -> dict[str, float]:
    """Seconds for forward (reads both logits) and backward (reads both, writes the gradient).

    Five arrays, where a copy moves two. The fresh floor takes the gradient's write, with one of the
    reads, at the speed of a copy into fresh memory.
    """
    warm, fresh = lap_s["copy_warm"], lap_s["copy_fresh"]
    return {"floor_warm": 2.5 * warm, "floor_fresh": 1.5 * warm + fresh}


def linear_floor(lap_s: dict[str, float]) -> dict[str, float]:
    """Seconds of the four GEMMs."""
    return {"floor_gemms": sum(lap_s.values())}
