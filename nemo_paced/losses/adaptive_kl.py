"""Head and tail gaps of adaptive KL (arXiv 2404.02657) when the vocabulary is split over ranks.

The head of a row is the set of tokens in order of falling teacher probability (ties by lower id)
whose cumulative mass stays at or below ``head_mass``; the first token is always in it. Sorting
would need the whole vocabulary on one rank. Positive floats order like their bits, so the head's
border is found by radix selection instead: three histograms of mass over 10, 11 and 10 bits, each
summed over the ranks, then one exchange to break ties by id. These make five collectives with the
sum of the gaps, whatever the data; a flat teacher's head may hold half of the vocabulary at no
further cost. On a GPU ``triton_adaptive_kl.py`` takes its place.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.kernels import Buffers, RowNumbers, log_probs, probabilities
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import all_gather, all_reduce, row_blocks

# (right shift, buckets) of the three rounds over the 31 value bits, most significant first
_ROUNDS = ((21, 1024), (10, 2048), (0, 1024))


def head_tail_gaps(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, numbers: RowNumbers, options: Options
) -> torch.Tensor:
    """Sums of |T - S| over the teacher's head and tail: float32 [2, N], no gradient.

    Args:
        student_NV, teacher_NV: logits [N, v/tp].
        numbers: maxima, log-sums and shares of the mass of both models' rows.
    """
    tp_group, head_mass = options.tp_group, options.divergence.akl_head_mass

    buffers = Buffers(teacher_NV, options, 2)

    def teacher(rows: slice) -> torch.Tensor:
        # exp of numbers that all ranks share, so that equal logits have equal bits on every rank
        own = numbers[rows]
        t = log_probs(teacher_NV[rows], own.column(0), own.column(1), options, buffers(rows)[0])
        return t.exp_()

    def blocks():
        return row_blocks(teacher_NV, options.block_rows)

    num_rows = teacher_NV.shape[0]
    border_N = torch.zeros(num_rows, dtype=torch.int32, device=teacher_NV.device)
    above_N = torch.zeros(num_rows, dtype=torch.float32, device=teacher_NV.device)
    for shift, buckets in _ROUNDS:
        mass_NB = above_N.new_zeros((num_rows, buckets))
        for rows in blocks():
            _add_histogram(mass_NB[rows], teacher(rows), border_N[rows], shift, buckets)
        all_reduce(mass_NB, tp_group)
        for rows in blocks():
            border_N[rows], above_N[rows] = _descend(
                mass_NB[rows], border_N[rows], above_N[rows], head_mass, shift
            )
    count_N = torch.zeros_like(above_N)
    for rows in blocks():
        count_N[rows] = (teacher(rows).view(torch.int32) == border_N[rows, None]).sum(1).float()
    value_N = border_N.view(torch.float32)
    taken_N = ties_taken(count_N, value_N, above_N, head_mass, tp_group)

    gaps_2N = above_N.new_zeros((2, num_rows))
    for rows in blocks():
        t = teacher(rows)
        s = probabilities(student_NV[rows], numbers[rows].column(5), options, buffers(rows)[1])
        gap = s.sub_(t).abs_()
        bits = t.view(torch.int32)
        tied = bits == border_N[rows, None]
        in_head = (bits > border_N[rows, None]) | (tied & (tied.cumsum(1) <= taken_N[rows, None]))
        gaps_2N[0, rows] = torch.where(in_head, gap, 0.0).sum(1)
        gaps_2N[1, rows] = torch.where(in_head, 0.0, gap).sum(1)
    return all_reduce(gaps_2N, tp_group)


def _add_histogram(
    mass_NB: torch.Tensor, t: torch.Tensor, border_N: torch.Tensor, shift: int, buckets: int
) -> None:
    """Add the mass of tokens that share the border's higher bits to buckets of their next bits."""
    bits = t.view(torch.int32)
    bucket = (bits >> shift) & (buckets - 1)
    higher = shift + buckets.bit_length() - 1
    if higher < 31:
        t = torch.where((bits >> higher) == (border_N >> higher)[:, None], t, 0.0)
    mass_NB.scatter_add_(1, bucket.long(), t)


def _descend(
    mass_NB: torch.Tensor,
    border_N: torch.Tensor,
    above_N: torch.Tensor,
    head_mass: float,
    shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Border [N] with the bits of the bucket where ``head_mass`` is passed, and mass above it."""
    from_top_NB = mass_NB.flip(1).cumsum(1) + above_N[:, None]
    passed_NB = from_top_NB > head_mass
    last = mass_NB.shape[1] - 1
    # rounding may leave the whole mass below head_mass near 1: then the lowest bucket
    position_N = torch.where(passed_NB.any(1), passed_NB.int().argmax(1), last)
    before_N = (position_N - 1).clamp_min(0)
    mass_before_N = from_top_NB.gather(1, before_N[:, None])[:, 0]
    above_N = torch.where(position_N > 0, mass_before_N, above_N)
    return border_N | ((last - position_N).int() << shift), above_N


def ties_taken(
    count_N: torch.Tensor,
    value_N: torch.Tensor,
    above_N: torch.Tensor,
    head_mass: float,
    tp_group: ProcessGroup | None,
) -> torch.Tensor:
    """How many of this rank's ``count_N`` tokens at the border are in the head: lower ids first.

    Args:
        value_N: probability of each of them.
        above_N: mass of the tokens above the border.
    """
    count_RN = all_gather(count_N[None], tp_group)[:, 0]
    rank = 0 if tp_group is None else tp_group.rank()
    room_N = ((head_mass - above_N) / value_N.clamp_min(1e-38)).floor().clamp_min(0)
    # the first token is in the head even if it alone holds more than head_mass
    room_N = torch.where(above_N == 0, room_N.clamp_min(1), room_N)
    return (room_N - count_RN[:rank].sum(0)).clamp(min=0).minimum(count_N)
