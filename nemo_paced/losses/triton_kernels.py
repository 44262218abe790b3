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

Not covered: logits on another device than the current one. Checked in Triton's interpreter against
the reference; run and timed on an H100 (benchmarks/README.md). Tile width and warps are guesses.

Axes: N rows (tokens), V this rank's columns; z logits, x logits less their maximum (not divided by
the temperature), t and s probabilities of teacher and student.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_paced.losses.kernels import TINY, RowNumbers
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import LOG_ZERO

# columns of a tile: 16 a thread, so that logits and running sums fit its registers
MAX_TILE = 4096
NUM_WARPS = 8

# as constexpr: Triton lets a kernel see globals of this type only
_LOG_ZERO = tl.constexpr(LOG_ZERO)
# logit of padding, below that of -inf: its exponential is 0 even in a row of nothing but -inf
_PADDING = tl.constexpr(2 * LOG_ZERO)
_TINY = tl.constexpr(TINY)


@triton.jit
def _logits(row_ptr, cols, width, valid):
    """Float32 logits of one tile, -inf made finite.

    What is read is bounded by ``width``, which tends to be a multiple of 16, and not by ``valid``,
    which is not: a bound that is no multiple would split the reads into single elements.
    """
    z = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    # a logit that is NaN must show in the loss
    z = tl.maximum(z, _LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(cols < valid, z, _PADDING)


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
    packed_ptr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lanes = tl.arange(0, TILE)
    max_t = tl.full((), _LOG_ZERO, tl.float32)
    max_s = tl.full((), _LOG_ZERO, tl.float32)
    # sums are kept for each lane and added up across lanes once, at the end
    sum_t = tl.zeros((TILE,), tl.float32)
    sum_s = tl.zeros((TILE,), tl.float32)
    forward = tl.zeros((TILE,), tl.float32)
    reverse = tl.zeros((TILE,), tl.float32)
    for start in range(0, valid, TILE):
        cols = start + lanes
        z_t = _logits(teacher_ptr + row * stride_t, cols, width_t, valid)
        z_s = _logits(student_ptr + row * stride_s, cols, width_s, valid)
        new_max_t = tl.maximum(max_t, tl.max(z_t, 0))
        new_max_s = tl.maximum(max_s, tl.max(z_s, 0))
        moved_t = max_t - new_max_t
        moved_s = max_s - new_max_s
        shrink_t = tl.exp(moved_t * per_temperature)
        shrink_s = tl.exp(moved_s * per_temperature)
        x_t = z_t - new_max_t
        x_s = z_s - new_max_s
        exp_t = tl.exp(x_t * per_temperature)
        exp_s = tl.exp(x_s * per_temperature)
        # the same move to a common maximum as that of the ranks' shards in divergence._merge
        if FORWARD:
            forward = (forward + sum_t * (moved_t - moved_s)) * shrink_t + exp_t * (x_t - x_s)
        if REVERSE:
            reverse = (reverse + sum_s * (moved_s - moved_t)) * shrink_s + exp_s * (x_s - x_t)
        sum_t = sum_t * shrink_t + exp_t
        sum_s = sum_s * shrink_s + exp_s
        max_t = new_max_t
        max_s = new_max_s
    packed_ptr += row
    tl.store(packed_ptr, max_t)
    tl.store(packed_ptr + rows, tl.sum(sum_t, 0))
    tl.store(packed_ptr + 2 * rows, max_s)
    tl.store(packed_ptr + 3 * rows, tl.sum(sum_s, 0))
    if FORWARD:
        tl.store(packed_ptr + 4 * rows, tl.sum(forward, 0) * per_temperature)
    if REVERSE:
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
    numbers_ptr,
    sums_ptr,
    share_t,
    share_s,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lanes = tl.arange(0, TILE)
    numbers_ptr += row
    max_t = tl.load(numbers_ptr)
    log_sum_t = tl.load(numbers_ptr + rows)
    max_s = tl.load(numbers_ptr + 3 * rows)
    log_sum_s = tl.load(numbers_ptr + 4 * rows)
    first = tl.zeros((TILE,), tl.float32)
    second = tl.zeros((TILE,), tl.float32)
    for start in range(0, valid, TILE):
        cols = start + lanes
        z_t = _logits(teacher_ptr + row * stride_t, cols, width_t, valid)
        z_s = _logits(student_ptr + row * stride_s, cols, width_s, valid)
        log_t = (z_t - max_t) * per_temperature - log_sum_t
        log_s = (z_s - max_s) * per_temperature - log_sum_s
        t = tl.exp(log_t)
        s = tl.exp(log_s)
        m = _mixture(t, s, share_t, share_s)
        log_m = tl.log(m)
        if KIND == "jsd":
            first += t * (log_t - log_m)
            second += s * (log_s - log_m)
        elif KIND == "skew_forward_kl":
            first += t * (log_t - log_m)
            second += s * (t / m)
        else:
            first += s * (log_s - log_m)
            second += s * (s / m)
    tl.store(sums_ptr + row, tl.sum(first, 0))
    tl.store(sums_ptr + rows + row, tl.sum(second, 0))


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
    numbers_ptr,
    scale_ptr,
    out_ptr,
    stride_out,
    share_t,
    share_s,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lanes = tl.arange(0, TILE)
    numbers_ptr += row
    max_t = tl.load(numbers_ptr)
    log_sum_t = tl.load(numbers_ptr + rows)
    max_s = tl.load(numbers_ptr + 3 * rows)
    log_sum_s = tl.load(numbers_ptr + 4 * rows)
    c6 = tl.load(numbers_ptr + 6 * rows)
    c7 = tl.load(numbers_ptr + 7 * rows)
    c8 = tl.load(numbers_ptr + 8 * rows)
    per_sum_t = tl.exp(-log_sum_t)
    per_sum_s = tl.exp(-log_sum_s)
    scale = tl.load(scale_ptr + row) * per_temperature
    # as wide as the student: the padded columns are written too
    for start in range(0, width_s, TILE):
        cols = start + lanes
        x_t = _logits(teacher_ptr + row * stride_t, cols, width_t, valid) - max_t
        x_s = _logits(student_ptr + row * stride_s, cols, width_s, valid) - max_s
        t = tl.exp(x_t * per_temperature) * per_sum_t
        s = tl.exp(x_s * per_temperature) * per_sum_s
        # the logits' difference is taken first: nearly equal, they would lose it to rounding
        gap = (x_s - x_t) * per_temperature - (c8 + log_sum_s - log_sum_t)
        log_s = x_s * per_temperature - log_sum_s
        m = _mixture(t, s, share_t, share_s)
        if FORWARD and REVERSE:
            grad = c6 * (s - t) + c7 * (s * gap)
        elif FORWARD:
            grad = s - t
        elif REVERSE:
            grad = s * gap
        elif KIND == "jsd":
            grad = share_s * (s * (log_s - tl.log(m) - c7))
        elif KIND == "skew_forward_kl":
            grad = share_s * (s * (c7 - t / m))
        else:
            grad = s * (log_s - tl.log(m) - c6 - share_s * (s / m - c7))
        grad = tl.where(cols < valid, grad * scale, 0.0)
        out = grad.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_out + cols, out, mask=cols < width_s)


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
    _launch(_local_stats_kernel, student_NV, teacher_NV, options, packed_KN, **constants)
    return packed_KN


def mixture_sums(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, numbers: RowNumbers, options: Options
) -> torch.Tensor:
    """Two sums of each row for divergences with a mixture, float32 [2, N].

    As :func:`nemo_paced.losses.kernels.mixture_sums`.
    """
    sums_2N = student_NV.new_empty((2, student_NV.shape[0]), dtype=torch.float32)
    _launch(
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
    _launch(
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


def _launch(
    kernel: Any,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    options: Options,
    *arguments: torch.Tensor | float,
    **constants: bool | str,
) -> None:
    """Launch one program for each row; ``arguments`` follow those that all kernels have."""
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
        *arguments,
        **constants,
        TILE=min(MAX_TILE, triton.next_power_of_2(width)),
        num_warps=NUM_WARPS,
    )


def _by_rows(logits_NV: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a row's columns lie side by side, as Megatron's do; else a copy."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
