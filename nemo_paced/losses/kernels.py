"""The arithmetic of a row of logits, in PyTorch: the reference of ``triton_kernels.py``.

Three passes over this rank's columns of both models' logits, each in row blocks that stay in cache:

    local_stats    what the ranks exchange: maxima, sums of exponentials, dot products
    mixture_sums   two more sums, for the divergences that hold a mixture M
    gradient       d loss / d student logits, in closed form

Exponentials are taken by ``softmax``, whose CPU kernel is twice as quick as ``exp``: the
probabilities *within this rank's columns*, which times the rank's share of the whole mass are those
of the whole vocabulary; the sum of exponentials is one over the largest of them. Each pass writes
into the same few buffers for all its blocks: fresh memory costs the CPU more than the arithmetic.

Axes: N rows (tokens), V this rank's columns that belong to the true vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import LOG_ZERO, row_blocks

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """Nine numbers of each row that forward keeps for backward: float32 [9, N], merged over ranks.

    Rows: maximum, log of the sum of shifted exponentials over the whole vocabulary, and this rank's
    share of the mass, of the teacher (0, 1, 2) and the student (3, 4, 5); then what the kind's
    gradient needs (6, 7, 8), see :func:`gradient`. Maximum and log-sum are kept apart: their sum
    would round the small one away at large logits.
    """

    numbers_9N: torch.Tensor

    def __getitem__(self, rows: slice) -> RowNumbers:
        return RowNumbers(self.numbers_9N[:, rows])

    def column(self, index: int) -> torch.Tensor:
        """Number ``index`` of each row, [N, 1]."""
        return self.numbers_9N[index, :, None]


class Buffers:
    """Float32 scratch blocks [rows, V] of one pass; a call with a slice of rows gives views."""

    def __init__(self, logits_NV: torch.Tensor, options: Options, count: int) -> None:
        rows = next(row_blocks(logits_NV, options.block_rows), slice(0, 0))
        self._blocks = logits_NV.new_empty(
            (count, rows.stop, options.valid), dtype=torch.float32
        ).unbind(0)

    def __call__(self, rows: slice) -> list[torch.Tensor]:
        return [block[: rows.stop - rows.start] for block in self._blocks]


def shift(
    logits_NV: torch.Tensor, max_N1: torch.Tensor, options: Options, out: torch.Tensor
) -> torch.Tensor:
    """(logits - maximum) / temperature of the valid columns, -inf made finite: ``out`` [N, V].

    The maximum is subtracted first: dividing logits near 1e4 would round their differences.
    """
    torch.sub(logits_NV[:, : options.valid], max_N1, out=out)
    if options.divergence.temperature != 1.0:
        out.div_(options.divergence.temperature)
    return out.clamp_min_(LOG_ZERO)


def row_max(logits_NV: torch.Tensor, options: Options) -> torch.Tensor:
    """Largest valid logit of each row, float32 [N, 1], with -inf made finite."""
    return logits_NV[:, : options.valid].amax(1, keepdim=True).float().clamp_min_(LOG_ZERO)


def local_stats(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: Options
) -> torch.Tensor:
    """Statistics of each row over this rank's columns, which the ranks exchange: [4 + dots, N].

    Float32: maximum and sum of exponentials of teacher, then of student; then, by kind, the dot
    products sum e^(zT-mT) [(zT-mT) - (zS-mS)] (forward KL) and sum e^(zS-mS) [(zS-mS) - (zT-mT)]
    (reverse KL), z being logits over temperature. Each maximum is this rank's own, of the logits,
    not divided; ``LOG_ZERO`` where it has no valid column.
    """
    forward, reverse = options.divergence.needs_forward_kl, options.divergence.needs_reverse_kl
    packed_KN = student_NV.new_zeros(
        (4 + forward + reverse, student_NV.shape[0]), dtype=torch.float32
    )
    if not options.valid:
        packed_KN[0], packed_KN[2] = LOG_ZERO, LOG_ZERO
        return packed_KN
    buffers = Buffers(student_NV, options, 3)
    for rows in row_blocks(student_NV, options.block_rows):
        t, s, p = buffers(rows)
        max_t_N1 = row_max(teacher_NV[rows], options)
        max_s_N1 = row_max(student_NV[rows], options)
        shift(teacher_NV[rows], max_t_N1, options, t)
        shift(student_NV[rows], max_s_N1, options, s)
        packed_KN[0, rows], packed_KN[2, rows] = max_t_N1[:, 0], max_s_N1[:, 0]
        torch.softmax(t, 1, out=p)
        sum_t = packed_KN[1, rows] = p.amax(1).reciprocal_()
        if forward or reverse:
            t.sub_(s)
        if forward:
            packed_KN[4, rows] = torch.linalg.vecdot(p, t).mul_(sum_t)
        torch.softmax(s, 1, out=p)
        sum_s = packed_KN[3, rows] = p.amax(1).reciprocal_()
        if reverse:
            packed_KN[-1, rows] = torch.linalg.vecdot(p, t).mul_(sum_s).neg_()
    return packed_KN


def probabilities(
    logits_NV: torch.Tensor, share_N1: torch.Tensor, options: Options, out: torch.Tensor
) -> torch.Tensor:
    """Probabilities, over the whole vocabulary, of this rank's valid columns: float32 [N, V]."""
    if options.divergence.temperature != 1.0 and options.valid:
        shift(logits_NV, row_max(logits_NV, options), options, out)
    else:
        # a row of -inf alone would give NaN; its share of 0 then wipes out what it gives
        out.copy_(logits_NV[:, : options.valid]).clamp_min_(LOG_ZERO)
    return torch.softmax(out, 1, out=out).mul_(share_N1)


def log_probs(
    logits_NV: torch.Tensor,
    max_N1: torch.Tensor,
    log_sum_N1: torch.Tensor,
    options: Options,
    out: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of this rank's valid columns: float32 [N, V]."""
    return shift(logits_NV, max_N1, options, out).sub_(log_sum_N1)


def _both(
    logits_NV: torch.Tensor,
    numbers: RowNumbers,
    first: int,
    options: Options,
    p: torch.Tensor,
    log_p,
) -> None:
    """Write one model's probabilities to ``p`` and their logarithms to ``log_p``: [N, V].

    Args:
        first: of the model's row numbers: 0 for the teacher, 3 for the student.
    """
    probabilities(logits_NV, numbers.column(first + 2), options, p)
    log_probs(logits_NV, numbers.column(first), numbers.column(first + 1), options, log_p)


def _mixture(t: torch.Tensor, s: torch.Tensor, options: Options, out: torch.Tensor) -> torch.Tensor:
    """The mixture M of T and S, never 0: where both underflow, whatever multiplies it is 0 too."""
    share_t, share_s = options.divergence.mixture_shares
    return torch.mul(t, share_t, out=out).add_(s, alpha=share_s).clamp_min_(TINY)


def mixture_sums(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, numbers: RowNumbers, options: Options
) -> torch.Tensor:
    """Two sums of each row over this rank's columns, for divergences with a mixture M: [2, N].

    Float32; value and gradient need them. jsd: KL(T || M), KL(S || M); skew_forward_kl:
    KL(T || M), sum S T / M; skew_reverse_kl: KL(S || M), sum S^2 / M.
    """
    sums_2N = student_NV.new_zeros((2, student_NV.shape[0]), dtype=torch.float32)
    buffers = Buffers(student_NV, options, 5)
    for rows in row_blocks(student_NV, options.block_rows):
        t, log_t, s, log_s, m = buffers(rows)
        _both(teacher_NV[rows], numbers[rows], 0, options, t, log_t)
        _both(student_NV[rows], numbers[rows], 3, options, s, log_s)
        _mixture(t, s, options, m)
        if options.divergence.kind is DivergenceKind.skew_forward_kl:
            sums_2N[1, rows] = torch.linalg.vecdot(s, torch.div(t, m, out=log_s))
        if options.divergence.kind is DivergenceKind.skew_reverse_kl:
            sums_2N[1, rows] = torch.linalg.vecdot(s, torch.div(s, m, out=log_t))
        m.log_()
        if options.divergence.kind is DivergenceKind.skew_reverse_kl:
            sums_2N[0, rows] = torch.linalg.vecdot(s, log_s.sub_(m))
        else:
            sums_2N[0, rows] = torch.linalg.vecdot(t, log_t.sub_(m))
        if options.divergence.kind is DivergenceKind.jsd:
            sums_2N[1, rows] = torch.linalg.vecdot(s, log_s.sub_(m))
    return sums_2N


def gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    numbers: RowNumbers,
    scale_N: torch.Tensor,
    options: Options,
    out_NV: torch.Tensor,
) -> None:
    """Write scale x d loss / d student logits to ``out_NV``, which may be ``student_NV`` itself.

    With u = dL/dS it is S (u - sum S u) for each kind. With c6, c7, c8 the numbers of
    :class:`RowNumbers`, a the skew, b the JSD's share of the teacher and M the mixture:

        forward, reverse, both KLs   c6 (S - T) + c7 S (log S - log T - c8)
        jsd                          (1-b) S (log S - log M - c7)
        skew_forward_kl              (1-a) S (c7 - T / M)
        skew_reverse_kl              S (log S - log M - c6 - a (S / M - c7))

    all divided by the temperature. Padded columns get 0.
    """
    scale_N = scale_N / options.divergence.temperature
    buffers = Buffers(student_NV, options, 5)
    write = _gradient_of(options.divergence)
    for rows in row_blocks(student_NV, options.block_rows):
        out = out_NV[rows, : options.valid]
        blocks = buffers(rows)
        scale_N1 = scale_N[rows, None]
        write(student_NV[rows], teacher_NV[rows], numbers[rows], scale_N1, options, blocks, out)
        out_NV[rows, options.valid :] = 0


def _gradient_of(divergence: Divergence) -> Callable[..., None]:
    if divergence.is_mixture:
        return _mixture_gradient
    if divergence.needs_both_kls:
        return _both_kls_gradient
    return _forward_kl_gradient if divergence.needs_forward_kl else _reverse_kl_gradient


def _forward_kl_gradient(student_NV, teacher_NV, numbers, scale_N1, options, blocks, out) -> None:
    s, t = blocks[:2]
    probabilities(student_NV, numbers.column(5) * scale_N1, options, s)
    probabilities(teacher_NV, numbers.column(2) * scale_N1, options, t)
    torch.sub(s, t, out=out)


def _reverse_kl_gradient(student_NV, teacher_NV, numbers, scale_N1, options, blocks, out) -> None:
    s, log_s, log_t = blocks[:3]
    probabilities(student_NV, numbers.column(5) * scale_N1, options, s)
    shift(student_NV, numbers.column(3), options, log_s)
    # both log-sums and the KL are one number a row each: one addition for the three
    shift(teacher_NV, numbers.column(0), options, log_t).add_(
        numbers.column(8) + numbers.column(4) - numbers.column(1)
    )
    torch.mul(log_s.sub_(log_t), s, out=out)


def _both_kls_gradient(student_NV, teacher_NV, numbers, scale_N1, options, blocks, out) -> None:
    s, log_s, t, log_t = blocks[:4]
    _both(student_NV, numbers, 3, options, s, log_s)
    _both(teacher_NV, numbers, 0, options, t, log_t)
    log_s.sub_(log_t).sub_(numbers.column(8)).mul_(s).mul_(numbers.column(7) * scale_N1)
    torch.add(s.sub_(t).mul_(numbers.column(6) * scale_N1), log_s, out=out)


def _mixture_gradient(student_NV, teacher_NV, numbers, scale_N1, options, blocks, out) -> None:
    s, log_s, t, m, ratio = blocks
    chosen = options.divergence
    _both(student_NV, numbers, 3, options, s, log_s)
    probabilities(teacher_NV, numbers.column(2), options, t)
    _mixture(t, s, options, m)
    if chosen.kind is DivergenceKind.jsd:
        log_s.sub_(m.log_()).sub_(numbers.column(7)).mul_(scale_N1 * (1 - chosen.jsd_beta))
        torch.mul(log_s, s, out=out)
    elif chosen.kind is DivergenceKind.skew_forward_kl:
        t.div_(m).neg_().add_(numbers.column(7)).mul_(scale_N1 * (1 - chosen.skew))
        torch.mul(t, s, out=out)
    else:
        torch.div(s, m, out=ratio).sub_(numbers.column(7)).mul_(chosen.skew)
        log_s.sub_(m.log_()).sub_(numbers.column(6)).sub_(ratio).mul_(scale_N1)
        torch.mul(log_s, s, out=out)
