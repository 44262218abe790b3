"""What the length of a row of tokens is a multiple of, for packing and for planning alike."""

from __future__ import annotations

import math

# Every new length is a new plan of cuDNN's attention, and another size for the allocator to place:
# a step's rows take few of them. Small beside rows of thousands of tokens.
GPU_STEP = 256
CPU_STEP = 8


def row_multiple(*, tp_size: int, cp_size: int, on_gpu: bool) -> int:
    """The number of tokens that a row is padded to a multiple of, before context parallelism.

    Sequence parallelism cuts what a rank holds of a row into tensor-parallel parts.
    """
    return math.lcm(GPU_STEP if on_gpu else CPU_STEP, cp_pieces(cp_size) * tp_size)


def cp_pieces(cp_size: int) -> int:
    """Into how many equal pieces context parallelism cuts a sequence: two for each rank."""
    return 2 * cp_size if cp_size > 1 else 1


def round_up(number: int, multiple_of: int) -> int:
    """The smallest multiple that is not below a number."""
    return -(-number // multiple_of) * multiple_of
