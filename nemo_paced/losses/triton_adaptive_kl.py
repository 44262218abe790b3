"""Triton kernels of adaptive KL's head: the search of ``adaptive_kl.py``, by thresholds.

A histogram adds to places that the data choose, and threads would wait for each other at them. Here
the border is found digit by digit, two bits at a time: a pass over the teacher's logits sums up the
mass at or above each of three thresholds, and the number of sums beyond ``head_mass`` is the digit.
It is a digit of the border's logit, as logits order like their probabilities: bfloat16 takes 8
passes of 2 bytes a column, float16 10 and float32 16. One more pass reads both models' logits for
the gaps. The sums do not depend on what runs first, so a second call gives the same head.

Under tensor parallelism each pass has an all-reduce of three numbers a token (more collectives than
in ``adaptive_kl.py``, with less in them), then come the exchange that breaks ties by id and the sum
of the gaps.

Ties are tokens of equal logits, where PyTorch's search takes those of equal float32 probabilities.

Axes: N rows (tokens), V this rank's columns; otherwise as in ``triton_kernels.py``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from nemo_paced.losses.adaptive_kl import ties_taken
from nemo_paced.losses.kernels import RowNumbers
from nemo_paced.losses.options import Options
from nemo_paced.losses.triton_kernels import _LOG2_E, _lanes, _load_numbers, _logits, launch
from nemo_paced.losses.vocab_parallel import all_reduce

# the lowest bit that a logit can have as float32: digits below it need no pass
_LOWEST_BIT = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}
_SIGN = 2**31


@triton.jit
def _mass_kernel(
    student_ptr,
    teacher_ptr,
    stride_s,
    stride_t,
    width_s,
    width_t,
    valid,
    per_temperature,
    per_log2,
    numbers_ptr,
    thresholds_ptr,
    mass_ptr,
    COUNT: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    teacher_ptr += row * stride_t
    lanes = _lanes(THREADS, EACH)
    whole = valid // (THREADS * EACH) * (THREADS * EACH)
    max_t = tl.load(numbers_ptr + row)
    log2_sum_t = tl.load(numbers_ptr + rows + row) * _LOG2_E
    thresholds_ptr += row
    first = tl.load(thresholds_ptr)
    second = tl.load(thresholds_ptr + rows)
    third = tl.load(thresholds_ptr + 2 * rows)
    from_first = tl.zeros((THREADS, EACH), tl.float32)
    from_second = tl.zeros((THREADS, EACH), tl.float32)
    from_third = tl.zeros((THREADS, EACH), tl.float32)
    for MASKED in tl.static_range(2):  # whole tiles, then the rest
        for start in range(whole if MASKED else 0, valid if MASKED else whole, THREADS * EACH):
            z = _logits(teacher_ptr, start + lanes, width_t, valid, MASKED)
            t = tl.full((THREADS, EACH), 1.0, tl.float32)
            if not COUNT:
                t = tl.exp2((z - max_t) * per_log2 - log2_sum_t)
            from_first += tl.where(z >= first, t, 0.0)
            from_second += tl.where(z >= second, t, 0.0)
            from_third += tl.where(z >= third, t, 0.0)
    mass_ptr += row
    tl.store(mass_ptr, tl.sum(from_first))
    tl.store(mass_ptr + rows, tl.sum(from_second))
    tl.store(mass_ptr + 2 * rows, tl.sum(from_third))


@triton.jit
def _gaps_kernel(
    student_ptr,
    teacher_ptr,
    stride_s,
    stride_t,
    width_s,
    width_t,
    valid,
    per_temperature,
    per_log2,
    numbers_ptr,
    border_ptr,
    taken_ptr,
    gaps_ptr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    teacher_ptr += row * stride_t
    student_ptr += row * stride_s
    lanes = _lanes(THREADS, EACH)
    whole = valid // (THREADS * EACH) * (THREADS * EACH)
    max_t, log2_sum_t, max_s, log2_sum_s = _load_numbers(numbers_ptr + row, rows)
    border = tl.load(border_ptr + row)
    # ties of the columns to come that are in the head
    left = tl.load(taken_ptr + row)
    head = tl.zeros((THREADS,), tl.float32)
    tail = tl.zeros((THREADS,), tl.float32)
    for MASKED in tl.static_range(2):  # whole tiles, then the rest
        for start in range(whole if MASKED else 0, valid if MASKED else whole, THREADS * EACH):
            z_t = _logits(teacher_ptr, start + lanes, width_t, valid, MASKED)
            z_s = _logits(student_ptr, start + lanes, width_s, valid, MASKED)
            t = tl.exp2((z_t - max_t) * per_log2 - log2_sum_t)
            s = tl.exp2((z_s - max_s) * per_log2 - log2_sum_s)
            gap = tl.abs(t - s)
            tied = z_t == border
            ties = tl.sum(tied.to(tl.int32), 1)
            up_to_thread = tl.cumsum(ties, 0)
            position = tl.cumsum(tied.to(tl.int32), 1) + (up_to_thread - ties)[:, None]
            in_head = (z_t > border) | (tied & (position <= left))
            head += tl.sum(tl.where(in_head, gap, 0.0), 1)
            tail += tl.sum(tl.where(in_head, 0.0, gap), 1)
            left -= tl.sum(ties, 0)
    tl.store(gaps_ptr + row, tl.sum(head))
    tl.store(gaps_ptr + rows + row, tl.sum(tail))


def head_tail_gaps(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, numbers: RowNumbers, options: Options
) -> torch.Tensor:
    """Sums of |T - S| over the teacher's head and tail: float32 [2, N], no gradient.

    As :func:`nemo_paced.losses.adaptive_kl.head_tail_gaps`.
    """
    tp_group, chosen = options.tp_group, options.divergence
    numbers_9N = numbers.numbers_9N.contiguous()
    sums_3N = numbers_9N.new_empty((3, numbers_9N.shape[1]))

    def sums(key_3N: torch.Tensor, *, count: bool) -> torch.Tensor:
        arguments = numbers_9N, _float_of(key_3N), sums_3N
        launch(_mass_kernel, student_NV, teacher_NV, options, *arguments, COUNT=count)
        return sums_3N

    lowest = _LOWEST_BIT[teacher_NV.dtype]
    border_N = torch.zeros_like(sums_3N[0], dtype=torch.int64)
    above_N = torch.zeros_like(sums_3N[0])
    digits_3N = torch.arange(1, 4, device=border_N.device)[:, None]
    for shift in range(30, lowest - 1, -2):
        key_3N = border_N + (digits_3N << shift)
        mass_3N = all_reduce(sums(key_3N, count=False), tp_group)
        digit_N = (mass_3N > chosen.akl_head_mass).sum(0)
        # the mass from the first threshold that was not passed; where all were, as before
        next_N = mass_3N.gather(0, digit_N.clamp_max(2)[None])[0]
        above_N = torch.where(digit_N < 3, next_N, above_N)
        border_N += digit_N << shift

    # of a negative logit the bits below are ones
    logit_N = _float_of(torch.where(border_N < _SIGN, border_N | (1 << lowest) - 1, border_N))
    # rounding may leave the whole mass below head_mass near 1: then all is head
    logit_N = torch.where(border_N == 0, -math.inf, logit_N)
    from_N, beyond_N, _ = sums(border_N + (digits_3N - 1 << lowest), count=True)
    log_t_N = (logit_N - numbers_9N[0]) / chosen.temperature - numbers_9N[1]
    taken_N = ties_taken(from_N - beyond_N, log_t_N.exp(), above_N, chosen.akl_head_mass, tp_group)
    gaps_2N = torch.empty_like(sums_3N[:2])
    arguments = numbers_9N, logit_N, taken_N.int(), gaps_2N
    # one warp: no thread waits for another warp to count its ties
    launch(_gaps_kernel, student_NV, teacher_NV, options, *arguments, num_warps=1)
    return all_reduce(gaps_2N, tp_group)


def _float_of(key: torch.Tensor) -> torch.Tensor:
    """Float32 of keys (int64): their bits, changed so that keys order like the numbers."""
    bits = torch.where(key < _SIGN, 2 * _SIGN - 1 - key, key - _SIGN)
    return ((bits ^ _SIGN) - _SIGN).int().view(torch.float32)
