"""Per-token divergences between a teacher's and a student's next-token distributions.

Exact over the full vocabulary, under vocabulary-parallel tensor parallelism, with the gradient in
closed form; the kinds are defined at :class:`~nemo_paced.losses.kinds.Divergence`. T and S are
teacher and student after division of the logits by its temperature (no temperature^2 factor: the
caller multiplies where it is wanted).

Which numbers, and why one collective
    Forward and reverse KL need of each vocabulary shard both maxima, both sums of exponentials and
    one dot product, sum e^(zT-mT) [(zT-mT) - (zS-mS)] or its mirror image: five numbers a token.
    A maximum and sums cannot share an all-reduce, so the five travel in one all-gather and each
    rank merges all of them by itself: a shard with maximum m' moved to the common m has its sum
    multiplied by e^(m'-m), and its dot product D becomes
    e^(mT'-mT) {D + sumT [(mT'-mT) - (mS'-mS)]}. The mixtures (JSD, skew) need both log-sum-exps
    before they can form M, and two sums after: one all-reduce of two numbers more. Adaptive KL
    finds the teacher's head by radix selection (``adaptive_kl.py``; on a GPU by thresholds,
    ``triton_adaptive_kl.py``, with more collectives). Dot products are taken on
    shifted logits: unshifted, a KL of 5e-5 comes out 1e-3 wrong at a logit offset of 1e4 in
    float32; shifted, 6e-7.

Backward needs no collective: it recomputes each row block from the logits and the few numbers a row
that forward kept, and writes the gradient once, in the dtype of the logits. Beyond a row block no
float32 copy of the vocabulary axis exists.

Not covered: a gradient to the teacher (it is frozen), and second derivatives.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses import adaptive_kl as torch_adaptive_kl
from nemo_paced.losses import kernels as torch_kernels
from nemo_paced.losses.kernels import TINY, RowNumbers
from nemo_paced.losses.kinds import KL_SHARES, Divergence, DivergenceKind
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import begin_all_gather, begin_all_reduce

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Solved:
    """Divergence of each row, nats, float32 [N], and what its gradient is computed from."""

    value_N: torch.Tensor
    numbers: RowNumbers


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    kind: Divergence | DivergenceKind | str,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Divergence of each token over the full vocabulary; its gradient goes to the student alone.

    Args:
        student_logits: [..., v/tp], any float dtype; the gradient has the same dtype.
        teacher_logits: [..., v/tp]; without a group its padded width may differ.
        kind: a :class:`~nemo_paced.losses.kinds.Divergence`, or the kind of one with the default
            parameters.
        tp_group: the group over which the vocabulary is split in equal parts; ``None``: not split.
        vocab_size: the true vocabulary: columns at or above it carry no mass and no gradient in
            either model. ``None``: all columns count.
        chunk_size: rows of a block; ``None``: as many as stay in cache.

    Returns:
        float32 [...], nats, the same on every rank of the group. Differentiate a function of it
        that is the same on every rank; each rank then holds its own columns' gradient.

    Raises:
        ValueError: shapes that do not fit each other or ``vocab_size``, a ``chunk_size`` below 1,
            or an unknown kind.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"token axes differ: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    options = Options.of(
        kind,
        (student_logits.shape[-1], teacher_logits.shape[-1]),
        tp_group=tp_group,
        vocab_size=vocab_size,
        block_rows=chunk_size,
    )
    flat = _DivergenceFunction.apply(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.detach().reshape(-1, teacher_logits.shape[-1]),
        options,
    )
    return flat.view(student_logits.shape[:-1])


class _DivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: Options
    ) -> torch.Tensor:
        solved = finish(solve(student_NV, teacher_NV, options))
        ctx.save_for_backward(student_NV, teacher_NV, solved.numbers.numbers_9N)
        ctx.options = options
        return solved.value_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        student_NV, teacher_NV, numbers_9N = ctx.saved_tensors
        grad_NV = torch.empty_like(student_NV)
        kernels_for(student_NV).gradient(
            student_NV, teacher_NV, RowNumbers(numbers_9N), grad_N.float(), ctx.options, grad_NV
        )
        return grad_NV, None, None


def kernels_for(logits: torch.Tensor) -> ModuleType:
    """The module of kernels: Triton's for CUDA tensors, PyTorch's for all others."""
    if logits.device.type == "cuda":
        from nemo_paced.losses import triton_kernels

        return triton_kernels
    return torch_kernels


def adaptive_kl_for(logits: torch.Tensor) -> ModuleType:
    """The module that finds adaptive KL's head: as :func:`kernels_for`."""
    if logits.device.type == "cuda":
        from nemo_paced.losses import triton_adaptive_kl

        return triton_adaptive_kl
    return torch_adaptive_kl


def solve(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: Options
) -> Generator[None, None, Solved]:
    """Divergence of each row of logits [N, v/tp]; a generator that yields while ranks exchange.

    While it waits the caller may do other work; every rank must resume its generators in the same
    order. :func:`finish` runs one through. What it returns also holds what the gradient needs.
    """
    kernels, chosen = kernels_for(student_NV), options.divergence
    gather = begin_all_gather(
        kernels.local_stats(student_NV, teacher_NV, options), options.tp_group
    )
    yield
    numbers, forward_N, reverse_N = _merge(gather.wait(), options)
    c_3N = numbers.numbers_9N[6:]
    if chosen.is_mixture:
        reduce = begin_all_reduce(
            kernels.mixture_sums(student_NV, teacher_NV, numbers, options), options.tp_group
        )
        yield
        c_3N[:2] = reduce.wait()
        beta = chosen.jsd_beta
        is_jsd = chosen.kind is DivergenceKind.jsd
        value_N = beta * c_3N[0] + (1 - beta) * c_3N[1] if is_jsd else c_3N[0].clone()
        return Solved(value_N, numbers)
    c_3N[2] = reverse_N
    if chosen.kind is DivergenceKind.adaptive_kl:
        head_tail_gaps = adaptive_kl_for(student_NV).head_tail_gaps
        gaps_2N = head_tail_gaps(student_NV, teacher_NV, numbers, options)
        c_3N[:2] = gaps_2N / gaps_2N.sum(0).clamp_min(TINY)
    else:
        c_3N[0], c_3N[1] = KL_SHARES[chosen.kind]
    return Solved(c_3N[0] * forward_N + c_3N[1] * reverse_N, numbers)


def finish(steps: Generator[None, None, _Result]) -> _Result:
    """Run a generator like that of :func:`solve` to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def _merge(
    gathered_RKN: torch.Tensor, options: Options
) -> tuple[RowNumbers, torch.Tensor, torch.Tensor]:
    """Row numbers 0 to 5, forward KL [N] and reverse KL [N] (0 where the kind needs none).

    Args:
        gathered_RKN: ``local_stats`` of every rank, [ranks, 4 + dots, N].
    """
    chosen = options.divergence
    # two of each, of teacher and student: a step for both is one small kernel in place of two
    max_R2N, sum_R2N = gathered_RKN[:, 0:4:2], gathered_RKN[:, 1:4:2]
    max_2N = max_R2N.amax(0)
    shift_R2N = (max_R2N - max_2N) / chosen.temperature
    scale_R2N = shift_R2N.exp()
    moved_sum_R2N = scale_R2N * sum_R2N
    sum_2N = moved_sum_R2N.sum(0)
    log_sum_2N = sum_2N.log()
    # each rank's dot product was taken on its own maxima; a rank without columns adds nothing
    moved_RN = shift_R2N[:, 0] - shift_R2N[:, 1]
    gap_N = log_sum_2N[1] - log_sum_2N[0]
    forward_N = reverse_N = torch.zeros_like(gap_N)
    if chosen.needs_forward_kl:
        dot_RN = gathered_RKN[:, 4] + sum_R2N[:, 0] * moved_RN
        forward_N = (scale_R2N[:, 0] * dot_RN).sum(0) / sum_2N[0] + gap_N
    if chosen.needs_reverse_kl:
        dot_RN = gathered_RKN[:, -1] - sum_R2N[:, 1] * moved_RN
        reverse_N = (scale_R2N[:, 1] * dot_RN).sum(0) / sum_2N[1] - gap_N
    rank = 0 if options.tp_group is None else options.tp_group.rank()
    numbers_9N = gathered_RKN.new_zeros((9, gathered_RKN.shape[-1]))
    numbers_9N[0:4:3], numbers_9N[1:5:3] = max_2N, log_sum_2N
    numbers_9N[2:6:3] = moved_sum_R2N[rank] / sum_2N
    return RowNumbers(numbers_9N), forward_N, reverse_N
