"""Per-token divergences between a teacher's and a student's next-token distributions.

Exact over the full vocabulary, under vocabulary-parallel tensor parallelism, with the gradient in
closed form. T and S are teacher and student after division of the logits by ``temperature`` (no
temperature^2 factor: the caller multiplies where it is wanted).

    forward_kl       KL(T || S)
    reverse_kl       KL(S || T)
    jsd              b KL(T || M) + (1-b) KL(S || M),  M = b T + (1-b) S,  b = jsd_beta
    skew_forward_kl  KL(T || a T + (1-a) S),  a = skew                      (arXiv 2402.03898)
    skew_reverse_kl  KL(S || a S + (1-a) T)
    adaptive_kl      (g_head forward_kl + g_tail reverse_kl) / (g_head + g_tail)  (arXiv 2404.02657)

Forward and reverse KL need, of each vocabulary shard, both maxima, both sums of exponentials and
the dot products sum e^(zT-mT) [(zT-mT) - (zS-mS)]: they travel in one all-gather. The mixtures need
both log-sum-exps first and two more sums after. Backward needs no collective: it recomputes each
row block from the logits and the few numbers a row that forward kept, and writes the gradient once,
in the dtype of the logits. Beyond a row block no float32 copy of the vocabulary axis exists.

Not covered: a gradient to the teacher (it is frozen), and second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.adaptive_kl import head_tail_gaps
from nemo_paced.losses.vocab_parallel import (
    Normalizer,
    all_gather,
    all_reduce,
    row_blocks,
    shifted,
    valid_columns,
)


class Divergence(Enum):
    """What is minimised between teacher and student; see the module's definitions."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skew_forward_kl = "skew_forward_kl"
    skew_reverse_kl = "skew_reverse_kl"
    adaptive_kl = "adaptive_kl"


@dataclass(frozen=True, slots=True)
class _Options:
    kind: Divergence
    tp_group: ProcessGroup | None
    temperature: float
    jsd_beta: float
    skew: float
    akl_head_mass: float
    valid: int  # columns of this rank that belong to the true vocabulary
    chunk_size: int | None


@dataclass(slots=True)
class _RowStats:
    """What rows keep between forward and backward, merged over the group; each float32 [N]."""

    teacher: Normalizer
    student: Normalizer
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    kind: Divergence | str,
    *,
    tp_group: ProcessGroup | None = None,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    akl_head_mass: float = 0.5,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Divergence of each token.

    Args:
        student_logits: [..., v/tp], any float dtype; the gradient has the same dtype.
        teacher_logits: [..., v/tp]; without a group its padded width may differ.
        kind: a :class:`Divergence` or its value.
        tp_group: the group over which the vocabulary is split in equal parts; ``None``: not split.
        vocab_size: the true vocabulary: columns at or above it carry no mass and no gradient in
            either model. ``None``: all columns count.
        chunk_size: rows of a block; ``None``: as many as stay in cache.

    Returns:
        float32 [...], nats, the same on every rank of the group. Differentiate a function of it
        that is the same on every rank; each rank then holds its own columns' gradient.

    Raises:
        ValueError: shapes that do not fit, or a parameter out of range.
    """
    _check(student_logits, teacher_logits, tp_group, temperature, vocab_size)
    options = _Options(
        kind=Divergence(kind),
        tp_group=tp_group,
        temperature=temperature,
        jsd_beta=jsd_beta,
        skew=skew,
        akl_head_mass=akl_head_mass,
        valid=min(
            valid_columns(student_logits.shape[-1], vocab_size, tp_group), teacher_logits.shape[-1]
        ),
        chunk_size=chunk_size,
    )
    flat = _DivergenceFunction.apply(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.detach().reshape(-1, teacher_logits.shape[-1]),
        options,
    )
    return flat.view(student_logits.shape[:-1])


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tp_group: ProcessGroup | None,
    temperature: float,
    vocab_size: int | None,
) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"token axes differ: {tuple(student.shape)} and {tuple(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    widths = student.shape[-1], teacher.shape[-1]
    if tp_group is not None and widths[0] != widths[1]:
        raise ValueError(
            f"local vocabulary widths differ, {widths[0]} and {widths[1]}: under a tensor-parallel "
            "group both models' shards must hold the same columns"
        )
    if vocab_size is None and widths[0] != widths[1]:
        raise ValueError(
            f"padded vocabularies differ, {widths[0]} and {widths[1]}: give vocab_size"
        )
    if vocab_size is not None and tp_group is None and vocab_size > min(widths):
        raise ValueError(f"vocab_size {vocab_size} is above the {min(widths)} columns given")


class _DivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: _Options
    ) -> torch.Tensor:
        stats = _row_stats(student_NV, teacher_NV, options)
        if options.kind is Divergence.forward_kl:
            value_N, extra_2N = stats.forward_kl, None
        elif options.kind is Divergence.reverse_kl:
            value_N, extra_2N = stats.reverse_kl, None
        elif options.kind is Divergence.adaptive_kl:
            gaps_2N = head_tail_gaps(
                student_NV,
                teacher_NV,
                stats.student,
                stats.teacher,
                temperature=options.temperature,
                head_mass=options.akl_head_mass,
                valid=options.valid,
                tp_group=options.tp_group,
                chunk_size=options.chunk_size,
            )
            extra_2N = gaps_2N / gaps_2N.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
            value_N = extra_2N[0] * stats.forward_kl + extra_2N[1] * stats.reverse_kl
        else:
            value_N, extra_2N = _mixture(student_NV, teacher_NV, stats, options)
        ctx.save_for_backward(student_NV, teacher_NV)
        ctx.stats, ctx.extra_2N, ctx.options = stats, extra_2N, options
        return value_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        student_NV, teacher_NV = ctx.saved_tensors
        options: _Options = ctx.options
        scale_N = grad_N.float() / options.temperature
        grad_NV = torch.empty_like(student_NV)
        grad_NV[:, options.valid :] = 0
        for rows in _blocks(student_NV, options):
            log_s, log_t = _log_probs(student_NV, teacher_NV, rows, ctx.stats, options)
            extra = None if ctx.extra_2N is None else ctx.extra_2N[:, rows, None]
            block = _gradient(log_s, log_t, rows, ctx.stats, extra, options)
            grad_NV[rows, : options.valid] = block.mul_(scale_N[rows, None])
        return grad_NV, None, None


def _blocks(logits_NV: torch.Tensor, options: _Options):
    return row_blocks(logits_NV, options.chunk_size)


def _row_stats(student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: _Options) -> _RowStats:
    """One pass over the logits, one all-gather.

    Packed: maxima and sums of exponentials of both, and one dot product (both for adaptive KL).
    """
    kind, valid = options.kind, options.valid
    needs_forward = kind in (Divergence.forward_kl, Divergence.adaptive_kl)
    needs_reverse = kind in (Divergence.reverse_kl, Divergence.adaptive_kl)
    count = 4 + needs_forward + needs_reverse
    packed = student_NV.new_zeros((count, student_NV.shape[0]), dtype=torch.float32)
    for rows in _blocks(student_NV, options):
        t, packed[0, rows] = shifted(teacher_NV[rows, :valid], options.temperature)
        s, packed[2, rows] = shifted(student_NV[rows, :valid], options.temperature)
        exp_t, exp_s = t.exp(), s.exp()
        packed[1, rows] = exp_t.sum(1)
        packed[3, rows] = exp_s.sum(1)
        if needs_forward or needs_reverse:
            difference = t.sub_(s)
            if needs_forward:
                packed[4, rows] = exp_t.mul_(difference).sum(1)
            if needs_reverse:
                packed[count - 1, rows] = exp_s.mul_(difference).sum(1).neg_()
    gathered_RCN = all_gather(packed, options.tp_group)
    return _merge(gathered_RCN, needs_forward, needs_reverse, options.temperature)


def _merge(
    gathered_RCN: torch.Tensor, needs_forward: bool, needs_reverse: bool, temperature: float
) -> _RowStats:
    max_t_RN, sum_t_RN, max_s_RN, sum_s_RN = gathered_RCN[:, :4].unbind(1)
    max_t_N, max_s_N = max_t_RN.amax(0), max_s_RN.amax(0)
    shift_t_RN, shift_s_RN = (max_t_RN - max_t_N) / temperature, (max_s_RN - max_s_N) / temperature
    scale_t_RN, scale_s_RN = shift_t_RN.exp(), shift_s_RN.exp()
    sum_t_N = (scale_t_RN * sum_t_RN).sum(0)
    sum_s_N = (scale_s_RN * sum_s_RN).sum(0)
    log_sum_t_N, log_sum_s_N = sum_t_N.log(), sum_s_N.log()
    # each rank's dot product was taken on its own maxima; a rank without columns adds nothing
    moved_RN = shift_t_RN - shift_s_RN
    forward_N = reverse_N = torch.zeros_like(sum_t_N)
    if needs_forward:
        dot_RN = gathered_RCN[:, 4] + sum_t_RN * moved_RN
        forward_N = (scale_t_RN * dot_RN).sum(0) / sum_t_N - log_sum_t_N + log_sum_s_N
    if needs_reverse:
        dot_RN = gathered_RCN[:, -1] - sum_s_RN * moved_RN
        reverse_N = (scale_s_RN * dot_RN).sum(0) / sum_s_N - log_sum_s_N + log_sum_t_N
    return _RowStats(
        Normalizer(max_t_N, log_sum_t_N), Normalizer(max_s_N, log_sum_s_N), forward_N, reverse_N
    )


def _log_probs(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    rows: slice,
    stats: _RowStats,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a row block, student and teacher, float32."""
    valid, temperature = options.valid, options.temperature
    return (
        stats.student.log_probs(student_NV, rows, valid=valid, temperature=temperature),
        stats.teacher.log_probs(teacher_NV, rows, valid=valid, temperature=temperature),
    )


def _mixture(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, stats: _RowStats, options: _Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value [N] of JSD or a skew KL, and the two sums [2, N] that it and its gradient need."""
    sums_2N = student_NV.new_zeros((2, student_NV.shape[0]), dtype=torch.float32)
    for rows in _blocks(student_NV, options):
        log_s, log_t = _log_probs(student_NV, teacher_NV, rows, stats, options)
        log_m = _log_mixture(log_s, log_t, options)
        if options.kind is Divergence.jsd:
            sums_2N[0, rows] = (log_t.exp() * (log_t - log_m)).sum(1)
            sums_2N[1, rows] = (log_s.exp() * (log_s - log_m)).sum(1)
        elif options.kind is Divergence.skew_forward_kl:
            sums_2N[0, rows] = (log_t.exp() * (log_t - log_m)).sum(1)
            sums_2N[1, rows] = (log_s + log_t - log_m).exp().sum(1)
        else:
            sums_2N[0, rows] = (log_s.exp() * (log_s - log_m)).sum(1)
            sums_2N[1, rows] = (2 * log_s - log_m).exp().sum(1)
    all_reduce(sums_2N, options.tp_group)
    if options.kind is Divergence.jsd:
        beta = options.jsd_beta
        return beta * sums_2N[0] + (1 - beta) * sums_2N[1], sums_2N
    return sums_2N[0].clone(), sums_2N


def _log_mixture(log_s: torch.Tensor, log_t: torch.Tensor, options: _Options) -> torch.Tensor:
    share_t = {
        Divergence.jsd: options.jsd_beta,
        Divergence.skew_forward_kl: options.skew,
        Divergence.skew_reverse_kl: 1 - options.skew,
    }[options.kind]
    share = torch.tensor([share_t, 1 - share_t], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_t + share[0], log_s + share[1])


def _gradient(
    log_s: torch.Tensor,
    log_t: torch.Tensor,
    rows: slice,
    stats: _RowStats,
    extra_2N1: torch.Tensor | None,
    options: _Options,
) -> torch.Tensor:
    """d value / d (student logits / temperature) of a row block.

    With u = dL/dS it is S (u - sum S u) for each kind; the sums were kept by forward.
    """
    kind = options.kind
    if kind is Divergence.forward_kl:
        return log_s.exp_().sub_(log_t.exp_())
    s = log_s.exp()
    reverse_N1 = stats.reverse_kl[rows, None]
    if kind is Divergence.reverse_kl:
        return log_s.sub_(log_t).sub_(reverse_N1).mul_(s)
    assert extra_2N1 is not None, "every other kind keeps two numbers a row"
    if kind is Divergence.adaptive_kl:
        forward_part = (s - log_t.exp()) * extra_2N1[0]
        return forward_part + s * (log_s - log_t - reverse_N1) * extra_2N1[1]
    log_m = _log_mixture(log_s, log_t, options)
    if kind is Divergence.jsd:
        return s * (log_s - log_m - extra_2N1[1]) * (1 - options.jsd_beta)
    a = options.skew
    if kind is Divergence.skew_forward_kl:
        return s * (extra_2N1[1] - (log_t - log_m).exp()) * (1 - a)
    ratio = (log_s - log_m).exp()
    return s * (log_s - log_m - extra_2N1[0] - a * (ratio - extra_2N1[1]))
