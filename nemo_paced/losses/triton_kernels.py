"""Triton kernels of a row of logits: each pass reads the logits once and keeps no block.

A pass in PyTorch goes over a row block several times and writes its intermediate blocks to memory;
on a GPU memory is what the time goes into. Here one program holds one row and walks its vocabulary
in tiles that stay in registers. Through memory go only

    local_stats    both models' logits, read once: the maxima are not known before the sums, so the
                   sums and dot products are moved along whenever a tile holds a larger logit
    mixture_sums   both models' logits, read once
    gradient       both models' logits, read once, and the gradient, written once

in the dtype of the logits; the arithmetic is in float32. The three functions and what they return
are those of ``kernels.py``, their reference in PyTorch.

A program is bound by its instructions before memory is, so a column has few of them. A tile is one
load of 16 bytes a thread and model; maxima and sums are each thread's own, so no thread waits for
another before the row ends, and sums are moved once for the columns of a load. Whole tiles have no
masks; the rest has. Exponentials and logarithms are taken in base two, which are one instruction
each, with the temperature in the factor. At 31 to 48 registers an SM holds 40 to 64 warps, whose
loads (32 bytes a thread in flight) cover the latency: no tile is fetched ahead.
``benchmarks/sass.py`` counts the instructions, and a test holds the counts.

Not covered: logits on another device than the current one. Rows that do not begin at a multiple of
16 bytes are read element by element. Checked in Triton's interpreter against the reference.

Axes: N rows (tokens), V this rank's columns; z logits, x logits less their maximum (not divided by
the temperature), t and s probabilities of teacher and student; tiles are [threads, columns of one].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from nemo_paced.losses.kernels import TINY, RowNumbers
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import LOG_ZERO

# few: the programs of a chunk of 900 rows all run at once, evenly over the SMs
NUM_WARPS = 4
WARP = 32
# of one load: a thread's columns of a tile
LOAD_BYTES = 16
LOG2_E = 1 / math.log(2)

# as constexpr: Triton lets a kernel see globals of this type only
_LOG_ZERO = tl.constexpr(LOG_ZERO)
# logit of padding, below that of -inf: its exponential is 0 even in a row of nothing but -inf
_PADDING = tl.constexpr(2 * LOG_ZERO)
_TINY = tl.constexpr(TINY)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit
def _lanes(THREADS: tl.constexpr, EACH: tl.constexpr):
    """Columns of the first tile, those of one thread side by side."""
    return tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]


@triton.jit
def _load_numbers(numbers_ptr, rows):
    """(max, log2 of the sum) of a row's teacher, then of its student."""
    max_t, max_s = tl.load(numbers_ptr), tl.load(numbers_ptr + 3 * rows)
    log2_sum_t = tl.load(numbers_ptr + rows) * _LOG2_E
    log2_sum_s = tl.load(numbers_ptr + 4 * rows) * _LOG2_E
    return max_t, log2_sum_t, max_s, log2_sum_s


@triton.jit
def _logits(row_ptr, cols, width, valid, MASKED: tl.constexpr):
    """Float32 logits of one tile, -inf made finite.

    What is read of the rest is bounded by ``width``, which tends to be a multiple of 16, and not by
    ``valid``, which is not: a bound that is no multiple would split the reads into single elements.
    """
    if MASKED:
        z = tl.load(row_ptr + cols, mask=cols < width, other=0.0)
    else:
        z = tl.load(row_ptr + cols)
    if z.dtype == tl.bfloat16:  # the upper half of a float32: converted, each second one costs more
        bits = z.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        z = bits.to(tl.float32, bitcast=True)
    z = z.to(tl.float32)
    # a logit that is NaN must show in the loss
    z = tl.maximum(z, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(cols < valid, z, _PADDING) if MASKED else z


@triton.jit
def _log2(x):
    """Base-2 logarithm by the hardware's one instruction, which the interpreter does not have."""
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _reciprocal(x):
    """1 / x of normal positive numbers.

    The hardware's reciprocal would be a fourth instruction of the narrowest pipe, which has the
    exponentials and the logarithm. The bits of x are close to its logarithm: negated, with the
    constant, they are 1 / x within 5 %; each step of Newton's method squares the error.
    """
    guess = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(3):
        guess *= 2.0 - x * guess
    return guess


@triton.jit
def _mixture(t, s, share_t, share_s):
    """The mixture M of T and S, never 0: where both underflow, whatever multiplies it is 0 too."""
    return tl.maximum(share_t * t + share_s * s, _TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _local_stats_kernel(
    student_ptr,
    teacher_ptr,
    stride_s,
    stride_t,
    width_s,
    width_t,
    valid,
    per_temperature,
    per_log2,
    packed_ptr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    teacher_ptr += row * stride_t
    student_ptr += row * stride_s
    lanes = _lanes(THREADS, EACH)
    whole = valid // (THREADS * EACH) * (THREADS * EACH)
    # maxima and sums are each thread's own until the end, so that no thread waits for another
    max_t = tl.full((THREADS,), _LOG_ZERO, tl.float32)
    max_s = tl.full((THREADS,), _LOG_ZERO, tl.float32)
    sum_t = tl.zeros((THREADS,), tl.float32)
    sum_s = tl.zeros((THREADS,), tl.float32)
    forward = tl.zeros((THREADS,), tl.float32)
    reverse = tl.zeros((THREADS,), tl.float32)
    for MASKED in tl.static_range(2):  # whole tiles, then the rest
        for start in range(whole if MASKED else 0, valid if MASKED else whole, THREADS * EACH):
            z_t = _logits(teacher_ptr, start + lanes, width_t, valid, MASKED)
            z_s = _logits(student_ptr, start + lanes, width_s, valid, MASKED)
            new_max_t = tl.maximum(max_t, tl.max(z_t, 1))
            new_max_s = tl.maximum(max_s, tl.max(z_s, 1))
            moved_t = max_t - new_max_t
            moved_s = max_s - new_max_s
            shrink_t = tl.exp2(moved_t * per_log2)
            shrink_s = tl.exp2(moved_s * per_log2)
            x_t = z_t - new_max_t[:, None]
            x_s = z_s - new_max_s[:, None]
            exp_t = tl.exp2(x_t * per_log2)
            exp_s = tl.exp2(x_s * per_log2)
            gap = x_t - x_s
            # the same move to a common maximum as that of the ranks' shards in divergence._merge
            if FORWARD:
                forward = (forward + sum_t * (moved_t - moved_s)) * shrink_t
                forward += tl.sum(exp_t * gap, 1)
            if REVERSE:
                reverse = (reverse + sum_s * (moved_s - moved_t)) * shrink_s
                reverse -= tl.sum(exp_s * gap, 1)
            sum_t = sum_t * shrink_t + tl.sum(exp_t, 1)
            sum_s = sum_s * shrink_s + tl.sum(exp_s, 1)
            max_t = new_max_t
            max_s = new_max_s
    row_max_t = tl.max(max_t, 0)
    row_max_s = tl.max(max_s, 0)
    moved_t = max_t - row_max_t
    moved_s = max_s - row_max_s
    shrink_t = tl.exp2(moved_t * per_log2)
    shrink_s = tl.exp2(moved_s * per_log2)
    packed_ptr += row
    tl.store(packed_ptr, row_max_t)
    tl.store(packed_ptr + rows, tl.sum(sum_t * shrink_t, 0))
    tl.store(packed_ptr + 2 * rows, row_max_s)
    tl.store(packed_ptr + 3 * rows, tl.sum(sum_s * shrink_s, 0))
    if FORWARD:
        forward = (forward + sum_t * (moved_t - moved_s)) * shrink_t
        tl.store(packed_ptr + 4 * rows, tl.sum(forward, 0) * per_temperature)
    if REVERSE:
        reverse = (reverse + sum_s * (moved_s - moved_t)) * shrink_s
        tl.store(packed_ptr + (4 + FORWARD) * rows, tl.sum(reverse, 0) * per_temperature)


@triton.jit
def _mixture_sums_kernel(
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
    sums_ptr,
    share_t,
    share_s,
    KIND: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    teacher_ptr += row * stride_t
    student_ptr += row * stride_s
    lanes = _lanes(THREADS, EACH)
    whole = valid // (THREADS * EACH) * (THREADS * EACH)
    max_t, log2_sum_t, max_s, log2_sum_s = _load_numbers(numbers_ptr + row, rows)
    first = tl.zeros((THREADS, EACH), tl.float32)
    second = tl.zeros((THREADS, EACH), tl.float32)
    for MASKED in tl.static_range(2):  # whole tiles, then the rest
        for start in range(whole if MASKED else 0, valid if MASKED else whole, THREADS * EACH):
            z_t = _logits(teacher_ptr, start + lanes, width_t, valid, MASKED)
            z_s = _logits(student_ptr, start + lanes, width_s, valid, MASKED)
            log2_t = (z_t - max_t) * per_log2 - log2_sum_t
            log2_s = (z_s - max_s) * per_log2 - log2_sum_s
            t = tl.exp2(log2_t)
            s = tl.exp2(log2_s)
            m = _mixture(t, s, share_t, share_s)
            log2_m = _log2(m)
            if KIND == "jsd":
                first += t * (log2_t - log2_m)
                second += s * (log2_s - log2_m)
            elif KIND == "skew_forward_kl":
                first += t * (log2_t - log2_m)
                second += s * (t * _reciprocal(m))
            else:
                first += s * (log2_s - log2_m)
                second += s * (s * _reciprocal(m))
    if KIND == "jsd":
        second *= _LN_2
    tl.store(sums_ptr + row, tl.sum(first) * _LN_2)
    tl.store(sums_ptr + rows + row, tl.sum(second))


@triton.jit
def _gradient_kernel(
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
    scale_ptr,
    out_ptr,
    stride_out,
    share_t,
    share_s,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    THREADS: tl.constexpr,
    EACH: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    teacher_ptr += row * stride_t
    student_ptr += row * stride_s
    out_ptr += row * stride_out
    lanes = _lanes(THREADS, EACH)
    whole = valid // (THREADS * EACH) * (THREADS * EACH)
    numbers_ptr += row
    max_t = tl.load(numbers_ptr)
    log_sum_t = tl.load(numbers_ptr + rows)
    max_s = tl.load(numbers_ptr + 3 * rows)
    log_sum_s = tl.load(numbers_ptr + 4 * rows)
    c6 = tl.load(numbers_ptr + 6 * rows)
    c7 = tl.load(numbers_ptr + 7 * rows)
    c8 = tl.load(numbers_ptr + 8 * rows)
    log2_sum_s = log_sum_s * _LOG2_E
    per_sum_t = tl.exp2(-log_sum_t * _LOG2_E)
    per_sum_s = tl.exp2(-log2_sum_s)
    mean_gap = c8 + log_sum_s - log_sum_t
    scale = tl.load(scale_ptr + row) * per_temperature
    for MASKED in tl.static_range(2):  # whole tiles, then the rest
        # as wide as the student: the padded columns are written too
        for start in range(whole if MASKED else 0, width_s if MASKED else whole, THREADS * EACH):
            cols = start + lanes
            x_t = _logits(teacher_ptr, cols, width_t, valid, MASKED) - max_t
            x_s = _logits(student_ptr, cols, width_s, valid, MASKED) - max_s
            t = tl.exp2(x_t * per_log2) * per_sum_t
            s = tl.exp2(x_s * per_log2) * per_sum_s
            # the logits' difference is taken first: nearly equal, they would lose it to rounding
            gap = (x_s - x_t) * per_temperature - mean_gap
            m = _mixture(t, s, share_t, share_s)
            if FORWARD and REVERSE:
                grad = c6 * (s - t) + c7 * (s * gap)
            elif FORWARD:
                grad = s - t
            elif REVERSE:
                grad = s * gap
            elif KIND == "jsd":
                log2_ratio = (x_s * per_log2 - log2_sum_s) - _log2(m)
                grad = share_s * (s * (log2_ratio * _LN_2 - c7))
            elif KIND == "skew_forward_kl":
                per_root_m = tl.rsqrt(m)
                grad = share_s * (s * (c7 - (t * per_root_m) * per_root_m))
            else:
                log2_ratio = (x_s * per_log2 - log2_sum_s) - _log2(m)
                per_root_m = tl.rsqrt(m)
                over_m = (s * per_root_m) * per_root_m - c7
                grad = s * (log2_ratio * _LN_2 - c6 - share_s * over_m)
            grad *= scale
            if MASKED:
                grad = tl.where(cols < valid, grad, 0.0).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + cols, grad, mask=cols < width_s)
            else:
                tl.store(out_ptr + cols, grad.to(out_ptr.dtype.element_ty))


def local_stats(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, options: Options
) -> torch.Tensor:
    """Statistics of each row that the ranks exchange, float32 [4 + dots, N].

    As :func:`nemo_paced.losses.kernels.local_stats`.
    """
    forward, reverse = options.divergence.needs_forward_kl, options.divergence.needs_reverse_kl
    packed_KN = student_NV.new_empty(
        (4 + forward + reverse, student_NV.shape[0]), dtype=torch.float32
    )
    constants = {"FORWARD": forward, "REVERSE": reverse}
    launch(_local_stats_kernel, student_NV, teacher_NV, options, packed_KN, **constants)
    return packed_KN


def mixture_sums(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, numbers: RowNumbers, options: Options
) -> torch.Tensor:
    """Two sums of each row for divergences with a mixture, float32 [2, N].

    As :func:`nemo_paced.losses.kernels.mixture_sums`.
    """
    sums_2N = student_NV.new_empty((2, student_NV.shape[0]), dtype=torch.float32)
    launch(
        _mixture_sums_kernel,
        student_NV,
        teacher_NV,
        options,
        numbers.numbers_9N.contiguous(),
        sums_2N,
        *options.divergence.mixture_shares,
        KIND=options.divergence.kind.value,
    )
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

    As :func:`nemo_paced.losses.kernels.gradient`.
    """
    rows_NV, chosen = _by_rows(out_NV), options.divergence
    launch(
        _gradient_kernel,
        student_NV,
        teacher_NV,
        options,
        numbers.numbers_9N.contiguous(),
        scale_N.contiguous(),
        rows_NV,
        rows_NV.stride(0),
        *(chosen.mixture_shares if chosen.is_mixture else (0.0, 0.0)),
        FORWARD=chosen.needs_forward_kl,
        REVERSE=chosen.needs_reverse_kl,
        KIND=chosen.kind.value,
    )
    if rows_NV is not out_NV:
        out_NV.copy_(rows_NV)


def launch(
    kernel: Any,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    options: Options,
    *arguments: torch.Tensor | float,
    num_warps: int | None = None,
    **constants: bool | str,
) -> None:
    """Launch one program for each row; ``arguments`` follow those that all kernels have."""
    num_warps = num_warps or NUM_WARPS
    student_NV, teacher_NV = _by_rows(student_NV), _by_rows(teacher_NV)
    num_rows, width = student_NV.shape
    if not num_rows:  # CUDA has no empty grid
        return
    kernel[(num_rows,)](
        student_NV,
        teacher_NV,
        student_NV.stride(0),
        teacher_NV.stride(0),
        width,
        teacher_NV.shape[1],
        options.valid,
        1 / options.divergence.temperature,
        LOG2_E / options.divergence.temperature,
        *arguments,
        **constants,
        THREADS=WARP * num_warps,
        EACH=LOAD_BYTES // max(student_NV.element_size(), teacher_NV.element_size()),
        num_warps=num_warps,
        # products and sums in one instruction, which Triton 3.10 no longer does unasked
        enable_fp_fusion=True,
    )


def _by_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a row's columns lie side by side, as Megatron's do; else a copy."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
