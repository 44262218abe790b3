"""Divergence from a teacher cut down to its k likeliest tokens and the mass of all others.

All others count as one more outcome, and the divergence is exact between the two distributions over
these k + 1 outcomes. Merging outcomes can only bring two distributions closer (data-processing
inequality), so it is a lower bound of the full one for every kind but adaptive KL, and unlike a
renormalised top-k it leaves no student mass outside of the objective.

With q the student's k + 1 probabilities and g = dL / d log q, the gradient of a top token's logit
is its g, and that of any other token g_tail x (its share of the student's tail): no more is needed
of the student than one pass for the tail's log-sum-exp, excluding the top tokens (a difference
1 - sum would be rounding noise for a confident student). One all-gather of k + 2 numbers a token.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.divergence import finish, kernels_for, solve
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.options import Options
from nemo_paced.losses.vocab_parallel import (
    LOG_ZERO,
    all_gather,
    begin_all_gather,
    row_blocks,
    valid_columns,
)


@dataclass(frozen=True, slots=True)
class TopKTeacher:
    """The teacher's top-k signal of tokens [...], the same on every tensor-parallel rank.

    Attributes:
        log_probs: float32 [..., k], nats, at the distillation temperature; falling along k.
        ids: int32 [..., k], token ids in the whole vocabulary.
        tail_log_prob: float32 [...], log of the mass of all other tokens; ``LOG_ZERO`` for none.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor
    tail_log_prob: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> TopKTeacher:
        return TopKTeacher(self.log_probs[rows], self.ids[rows], self.tail_log_prob[rows])

    @staticmethod
    def cat(parts: Sequence[TopKTeacher]) -> TopKTeacher:
        """The signals joined along their first axis."""
        return TopKTeacher(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.ids for part in parts]),
            torch.cat([part.tail_log_prob for part in parts]),
        )

    @classmethod
    def empty(cls, k: int, device: torch.device) -> TopKTeacher:
        """The signal of no token: [0, k]."""
        none_NK = torch.zeros((0, k), device=device)
        return cls(none_NK, none_NK.int(), none_NK.new_zeros(0))

    @classmethod
    @torch.no_grad()
    def from_hidden(
        cls,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        k: int,
        *,
        chunk_size: int,
        tp_group: ProcessGroup | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> TopKTeacher:
        """Top-k signal of final hidden states [N, h] under an LM head [v/tp, h].

        Only the logits of ``chunk_size`` tokens exist at a time. Raises as :meth:`from_logits`.
        """
        parts = [
            cls.from_logits(
                chunk_CH @ weight_VH.t(),
                k,
                tp_group=tp_group,
                temperature=temperature,
                vocab_size=vocab_size,
            )
            for chunk_CH in hidden_NH.split(chunk_size)
        ]
        return cls.cat(parts)

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls,
        logits: torch.Tensor,
        k: int,
        *,
        tp_group: ProcessGroup | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> TopKTeacher:
        """Top-k signal of logits [..., v/tp]; two all-gathers, of 2 k and of 2 numbers a token.

        Raises:
            ValueError: k is not between 1 and the vocabulary's size, or a temperature not above 0.
        """
        width = logits.shape[-1]
        ranks = 1 if tp_group is None else tp_group.size()
        if not 0 < k <= (vocab_size or width * ranks):
            raise ValueError(f"k is {k}: it must lie between 1 and the vocabulary's size")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: it must be above 0")
        valid = valid_columns(width, vocab_size, tp_group)
        flat_NV = logits.reshape(-1, width)
        z_NK, ids_NK = _global_top(flat_NV, k, valid, tp_group)
        tail_2N = flat_NV.new_zeros((2, len(flat_NV)), dtype=torch.float32)
        local_NK = _local_ids(ids_NK, width, valid, tp_group)
        for rows in row_blocks(flat_NV, None):
            tail_2N[:, rows] = _tail(flat_NV[rows], local_NK[rows], valid, temperature)[0]
        # log-probabilities relative to the largest logit, which is the first of the top
        top_NK = (z_NK - z_NK[:, :1]) / temperature
        tail_N = _merge_tail(all_gather(tail_2N, tp_group), z_NK[:, 0], temperature)
        total_N = torch.logaddexp(top_NK.logsumexp(1), tail_N)
        axes = logits.shape[:-1]
        return cls(
            (top_NK - total_N[:, None]).view(*axes, k),
            ids_NK.int().view(*axes, k),
            (tail_N - total_N).clamp_min(LOG_ZERO).view(axes),
        )


def topk_divergence(
    student_logits: torch.Tensor,
    teacher: TopKTeacher,
    kind: Divergence | DivergenceKind | str,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Divergence of each token on the k + 1 outcomes: logits [..., v/tp] -> float32 [...], nats.

    Arguments as for :func:`~nemo_paced.losses.divergence.divergence`; the divergence's temperature
    must be that of the teacher's log-probabilities.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = student_logits.shape[-1]
    options = Options.of(kind, (width, width), tp_group=tp_group, vocab_size=vocab_size)
    k = teacher.ids.shape[-1]
    if teacher.ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"token axes differ: {tuple(student_logits.shape[:-1])} and "
            f"{tuple(teacher.ids.shape[:-1])}"
        )
    flat = TopKTeacher(
        teacher.log_probs.reshape(-1, k),
        teacher.ids.reshape(-1, k),
        teacher.tail_log_prob.reshape(-1),
    )
    value_N = _TopKFunction.apply(student_logits.reshape(-1, width), flat, options)
    return value_N.view(student_logits.shape[:-1])


class _TopKFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_NV: torch.Tensor, teacher: TopKTeacher, options: Options
    ) -> torch.Tensor:
        solved = finish(solve_topk(student_NV, teacher, options))
        ctx.save_for_backward(student_NV)
        ctx.solved, ctx.options = solved, options
        return solved.value_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (student_NV,) = ctx.saved_tensors
        grad_NV = torch.empty_like(student_NV)
        ctx.solved.write_gradient(student_NV, grad_N.float(), ctx.options, grad_NV)
        return grad_NV, None, None


@dataclass(frozen=True, slots=True)
class SolvedTopK:
    """Top-k divergence of each row and what its gradient is computed from; O = k + 1 outcomes.

    Attributes:
        value_N: float32, nats.
        grad_NO: d value / d log of the student's outcome, at temperature 1.
        local_NK: int64, columns of the top tokens on this rank, see :func:`_local_ids`.
        max_N: the student's largest logit, which its logits are taken relative to.
        tail_N: log-mass of the student's tail, on the same footing.
        log_sum_N: log-mass of all its tokens, likewise.
    """

    value_N: torch.Tensor
    grad_NO: torch.Tensor
    local_NK: torch.Tensor
    max_N: torch.Tensor
    tail_N: torch.Tensor
    log_sum_N: torch.Tensor

    def write_gradient(
        self,
        student_NV: torch.Tensor,
        scale_N: torch.Tensor,
        options: Options,
        out_NV: torch.Tensor,
    ) -> None:
        """Write scale x d value / d student logits to ``out_NV``, maybe ``student_NV`` itself."""
        valid, temperature = options.valid, options.divergence.temperature
        grad_NO = self.grad_NO * (scale_N / temperature)[:, None]
        for rows in row_blocks(student_NV, options.block_rows):
            z = student_NV[rows, :valid].float() - self.max_N[rows, None]
            # without a tail every token is a top one, and what overflows here is overwritten
            share = z.div_(temperature).sub_(self.tail_N[rows, None]).exp_().clamp_max_(1.0)
            padded = torch.nn.functional.pad(share.mul_(grad_NO[rows, -1:]), (0, 1))
            padded.scatter_(1, self.local_NK[rows], grad_NO[rows, :-1])
            out_NV[rows, :valid] = padded[:, :valid]
            out_NV[rows, valid:] = 0


def solve_topk(
    student_NV: torch.Tensor, teacher: TopKTeacher, options: Options
) -> Generator[None, None, SolvedTopK]:
    """Divergence of each row of student logits [N, v/tp] on the teacher's k + 1 outcomes.

    A generator that yields while ranks exchange, like :func:`~nemo_paced.losses.divergence.solve`.
    """
    tp_group, temperature, valid = options.tp_group, options.divergence.temperature, options.valid
    local_NK = _local_ids(teacher.ids.long(), student_NV.shape[1], valid, tp_group)
    k = local_NK.shape[1]
    packed = student_NV.new_zeros((2 + k, len(student_NV)), dtype=torch.float32)
    for rows in row_blocks(student_NV, options.block_rows):
        packed[:2, rows], top_NK = _tail(student_NV[rows], local_NK[rows], valid, temperature)
        packed[2:, rows] = top_NK.t()
    gather = begin_all_gather(packed, tp_group)
    yield
    gathered_RKN = gather.wait()
    z_NK = gathered_RKN[:, 2:].amax(0).t()  # only the owner's entry is above LOG_ZERO
    max_N = torch.maximum(z_NK.amax(1), gathered_RKN[:, 0].amax(0))
    top_NK = (z_NK - max_N[:, None]) / temperature
    tail_N = _merge_tail(gathered_RKN[:, :2], max_N, temperature)
    # these log-probabilities up to a constant are the logits of a small vocabulary of its own
    student_NO = torch.cat([top_NK, tail_N[:, None]], 1)
    teacher_NO = torch.cat([teacher.log_probs, teacher.tail_log_prob[:, None]], 1)
    coarse = Options(replace(options.divergence, temperature=1.0), tp_group=None, valid=k + 1)
    solved = finish(solve(student_NO, teacher_NO, coarse))
    grad_NO = torch.empty_like(student_NO)
    kernels_for(student_NO).gradient(
        student_NO, teacher_NO, solved.numbers, torch.ones_like(max_N), coarse, grad_NO
    )
    log_sum_N = solved.numbers.numbers_9N[3:5].sum(0)
    return SolvedTopK(solved.value_N, grad_NO, local_NK, max_N, tail_N, log_sum_N)


def _tail(
    logits_NV: torch.Tensor, local_NK: torch.Tensor, valid: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of exponentials [2, N] outside the top tokens, and the top's logits [N, K].

    All are of this rank's columns; logits of top tokens that another rank owns are ``LOG_ZERO``.
    """
    # the column added at the end takes what is scattered for tokens of other ranks
    z = torch.nn.functional.pad(logits_NV[:, :valid].float(), (0, 1), value=LOG_ZERO)
    top_NK = z.gather(1, local_NK).clamp_min_(LOG_ZERO)
    z.scatter_(1, local_NK, LOG_ZERO)
    max_N = z.amax(1).clamp_min_(LOG_ZERO)
    sum_N = z.sub_(max_N[:, None]).div_(temperature).exp_().sum(1)
    sum_N = torch.where(max_N > LOG_ZERO / 2, sum_N, 0.0)
    return torch.stack([max_N, sum_N]), top_NK


def _merge_tail(tail_R2N: torch.Tensor, max_N: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log of the tail's mass over all ranks, relative to ``max_N``."""
    moved_RN = (tail_R2N[:, 0] - max_N) / temperature
    largest_N = moved_RN.amax(0)
    sum_N = ((moved_RN - largest_N).exp() * tail_R2N[:, 1]).sum(0)
    return (sum_N.log() + largest_N).clamp_min(LOG_ZERO)


def _global_top(
    logits_NV: torch.Tensor, k: int, valid: int, tp_group: ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits over all ranks, falling, float32 [N, K], and their ids, int64 [N, K]."""
    num_rows, width = logits_NV.shape
    local = min(k, valid)
    values_NK = logits_NV.new_full((num_rows, k), LOG_ZERO, dtype=torch.float32)
    # float64 holds ids exactly; sent as int64 they would need a collective of their own
    ids_NK = torch.zeros((num_rows, k), dtype=torch.float64, device=logits_NV.device)
    first = 0 if tp_group is None else tp_group.rank() * width
    if local:
        top = logits_NV[:, :valid].topk(local, dim=1)
        values_NK[:, :local] = top.values.float().clamp_min(LOG_ZERO)
        ids_NK[:, :local] = (top.indices + first).double()
    gathered_R2NK = all_gather(torch.stack([values_NK.double(), ids_NK]), tp_group)
    values_NRK = gathered_R2NK[:, 0].movedim(0, 1).flatten(1)
    ids_NRK = gathered_R2NK[:, 1].movedim(0, 1).flatten(1)
    best = values_NRK.topk(k, dim=1)
    return best.values.float(), ids_NRK.gather(1, best.indices).long()


def _local_ids(
    ids_NK: torch.Tensor, width: int, valid: int, tp_group: ProcessGroup | None
) -> torch.Tensor:
    """This rank's column of each token id; ``valid`` (one past the last) for tokens of others."""
    local_NK = ids_NK - (0 if tp_group is None else tp_group.rank() * width)
    return torch.where((local_NK >= 0) & (local_NK < valid), local_NK, valid)
