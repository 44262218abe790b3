"""LM head and divergence in one: no logits beyond a chunk of tokens, in forward or backward.

    loss = sum_n token_weights[n] x divergence(hidden_T[n] W_T^T, hidden_S[n] W_S^T)

The loss walks chunks of tokens, and a chunk in parts. A part's student and teacher logits come out
of two GEMMs, the row numbers travel in the collectives of :mod:`~nemo_paced.losses.divergence`, and
the gradient of the logits is written over the student's. When it is there for all of the chunk, two
GEMMs more turn it into the gradient of the hidden states and the chunk's share of the head's. As
the loss is one scalar, the gradient is known up to the factor that backward brings: it is taken in
forward, so nothing is computed twice (four GEMMs in all, where recomputing would take six) and what
lives until backward is as large as the inputs. Under tensor parallelism one part's collective runs
while the next part's GEMMs do.

The head's gradient is summed over chunks in float32. A trainer that keeps gradients in float32 and
knows the factor ahead, as Megatron's does, has them summed up in its own buffer
(``gradient_scale`` of :func:`linear_loss`); everybody else gets a tensor in the head's dtype, made
of the sum and the factor in one pass.

Memory beyond the inputs: the student's logits of a chunk and the teacher's of a part of it (of two
under tensor parallelism), the gradient of the hidden states and, without a buffer, the head's in
float32 (``chunks.py`` has the sizes). The teacher's part may instead be its top-k
(:mod:`~nemo_paced.losses.topk`).

Peak memory above the inputs, gradients included, in U = one float32 [N, v], forward KL in float32
on a CPU, as measured by ``benchmarks/losses.py`` (its README has times and settings); collectives
under tensor parallelism as counted by ``tests/distributed/test_losses.py``, of the others by their
sources:

    ============================  ======  ==============================================
    from hidden states, N = 512   peak    collectives
    ============================  ======  ==============================================
    ``linear_divergence``         1.17    one a part (JSD, skew: two); one for hidden
    logits, then ``divergence``   3.04    one (two); one for hidden
    plain PyTorch                 8.00    no tensor parallelism
    Liger, chunks of 64           1.63    no tensor parallelism
    ----------------------------  ------  ----------------------------------------------
    from logits, N = 256
    ``divergence``                1.08    one (two), of five (four and two) numbers a token
    ModelOpt LogitsKLLoss         7.00    several all-reduces
    TRL generalised JSD           7.00    no tensor parallelism
    ============================  ======  ==============================================

The peak of ``linear_divergence`` grows with the tokens by the gradient of hidden states alone. With
a buffer for the head's gradient it is 0.67 beyond that.

Not covered: a gradient to teacher or token weights, biases of the heads, second derivatives, a
second backward of the same graph (it raises).

Axes: N tokens, C those of a chunk, P those of a part of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.chunks import tokens_of_chunk, tokens_of_part
from nemo_paced.losses.divergence import kernels_for, solve
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.options import Options
from nemo_paced.losses.topk import TopKTeacher, solve_topk
from nemo_paced.losses.vocab_parallel import (
    all_gather,
    group_size,
    own_logits,
    sum_gradient,
    target_log_probs,
)


@dataclass(frozen=True, slots=True)
class PartAnswer:
    """Divergence of each of P tokens, and the way to its gradient.

    Attributes:
        value_P: float32, nats.
        max_P: float32, the student's largest logit over the whole vocabulary.
        log_sum_P: float32, log of the sum of e^((logit - max) / temperature).
        write_gradient: given float32 scales [P], overwrites the part's student logits [P, v/tp]
            with scale x d value / d logits.
    """

    value_P: torch.Tensor
    max_P: torch.Tensor
    log_sum_P: torch.Tensor
    write_gradient: Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class HiddenTeacher:
    """The teacher as final hidden states [N, h] and LM head [v/tp, h] (this rank's columns)."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor

    def solve(
        self, student_PV: torch.Tensor, rows: slice, options: Options
    ) -> Generator[None, None, PartAnswer]:
        """Divergence of a part's student logits [P, v/tp]; yields while ranks exchange."""
        teacher_PV = self.hidden_NH[rows] @ self.weight_VH.t()
        solved = yield from solve(student_PV, teacher_PV, options)

        def write_gradient(scale_P: torch.Tensor) -> None:
            kernels_for(student_PV).gradient(
                student_PV, teacher_PV, solved.numbers, scale_P, options, student_PV
            )

        max_P, log_sum_P = solved.numbers.numbers_9N[3:5]
        return PartAnswer(solved.value_N, max_P, log_sum_P, write_gradient)


@dataclass(frozen=True, slots=True)
class TopKChunks:
    """The teacher as its k likeliest tokens and the mass of the rest, of N tokens."""

    teacher: TopKTeacher

    def solve(
        self, student_PV: torch.Tensor, rows: slice, options: Options
    ) -> Generator[None, None, PartAnswer]:
        """Top-k divergence of a part's student logits [P, v/tp]; yields while ranks exchange."""
        solved = yield from solve_topk(student_PV, self.teacher[rows], options)

        def write_gradient(scale_P: torch.Tensor) -> None:
            solved.write_gradient(student_PV, scale_P, options, student_PV)

        return PartAnswer(solved.value_N, solved.max_N, solved.log_sum_N, write_gradient)


TeacherInput = HiddenTeacher | TopKChunks


@dataclass(frozen=True, slots=True)
class LinearLoss:
    """Result of :func:`linear_loss`, the same on every rank of the tensor-parallel group.

    Attributes:
        loss: float32 scalar, sum of token weight x divergence.
        per_token_N: float32, divergence of each token, nats; no gradient.
        target_log_probs_N: float32, the student's log-probability of each target at temperature 1,
            nats; no gradient; ``None`` where no targets were given.
    """

    loss: torch.Tensor
    per_token_N: torch.Tensor
    target_log_probs_N: torch.Tensor | None


def linear_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: Divergence | DivergenceKind | str,
    token_weights: torch.Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    return_per_token: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of token divergences, computed from hidden states and LM heads.

    Args:
        student_hidden: [..., h], the same on every rank of the group.
        student_weight: [v/tp, h], this rank's rows of the student's LM head.
        teacher_hidden: [..., h'].
        teacher_weight: [v/tp, h'], the same columns of the vocabulary as the student's.
        token_weights: [...], float32: problem weight and normaliser of each token.
        kind, tp_group, vocab_size: as for :func:`~nemo_paced.losses.divergence.divergence`.
        chunk_size: tokens of which logits exist at a time; ``None``: chosen by width and device.
        return_per_token: also return the detached per-token loss [...].

    Returns:
        float32 scalar, nats, the same on every rank. The gradient of ``student_hidden`` is summed
        over the group (one all-reduce), that of ``student_weight`` is this rank's rows'.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weights)
    options = Options.of(
        kind,
        (student_weight.shape[0], teacher_weight.shape[0]),
        tp_group=tp_group,
        vocab_size=vocab_size,
    )
    result = linear_loss(
        sum_gradient(student_hidden.reshape(-1, student_hidden.shape[-1]), tp_group),
        student_weight,
        HiddenTeacher(
            teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight.detach()
        ),
        token_weights.reshape(-1),
        options,
        chunk_size=chunk_size,
    )
    if return_per_token:
        return result.loss, result.per_token_N.view(token_weights.shape)
    return result.loss


def linear_loss(
    student_hidden_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    teacher: TeacherInput,
    token_weights_N: torch.Tensor,
    options: Options,
    *,
    chunk_size: int | None = None,
    targets_N: torch.Tensor | None = None,
    gradient_scale: torch.Tensor | None = None,
) -> LinearLoss:
    """Weighted sum of token divergences for any teacher signal; the hidden gradient is not reduced.

    A rank's gradient of ``student_hidden_NH`` is its own columns' part: the caller sums it over the
    tensor-parallel group, as after any column-parallel layer (all-reduce, or reduce-scatter under
    sequence parallelism).

    Args:
        student_hidden_NH: [N, h], the same on every rank of the group.
        student_weight_VH: [v/tp, h], this rank's rows of the student's LM head.
        teacher: hidden states with an LM head, or top-k, of the same N tokens.
        token_weights_N: problem weight and normaliser of each token; no gradient.
        chunk_size: as for :func:`linear_divergence`.
        targets_N: int64 ids in the whole vocabulary, to report log-probabilities of (one all-gather
            more; at a temperature other than 1 one a part, and another pass over the logits).
        gradient_scale: float32 scalar, the factor that backward will bring, or ``None``: not known.
            With it the head's gradient is added to ``student_weight_VH.main_grad``, float32
            [v/tp, h], in this call; backward, which must follow and bring that factor (else it
            raises), hands over the hidden gradient alone.
    """
    loss, per_token_N, log_probs_N = _LinearFunction.apply(
        student_hidden_NH,
        student_weight_VH,
        teacher,
        token_weights_N.detach().float(),
        options,
        chunk_size or default_chunk(student_weight_VH),
        targets_N,
        gradient_scale if torch.is_grad_enabled() else None,
        torch.is_grad_enabled(),
    )
    return LinearLoss(loss, per_token_N, None if targets_N is None else log_probs_N)


def _check(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    token_weights: torch.Tensor,
) -> None:
    shapes = student_hidden.shape[:-1], teacher_hidden.shape[:-1], token_weights.shape
    if len(set(shapes)) > 1:
        text = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"token axes of student, teacher and token_weights differ: {text}")
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"{name}_hidden is {hidden.shape[-1]} wide and {name}_weight {weight.shape[-1]}"
            )


def default_chunk(weight_VH: torch.Tensor) -> int:
    """Tokens of a chunk for an LM head [v/tp, h], where none are asked for."""
    return tokens_of_chunk(weight_VH.shape[0], on_gpu=weight_VH.device.type == "cuda")


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher: TeacherInput,
        token_weights_N: torch.Tensor,
        options: Options,
        chunk_size: int,
        targets_N: torch.Tensor | None,
        gradient_scale: torch.Tensor | None,
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = hidden_NH.shape[0]
        per_token_N = hidden_NH.new_empty(num_tokens, dtype=torch.float32)
        scale_N = token_weights_N if gradient_scale is None else token_weights_N * gradient_scale
        targets = None if targets_N is None else _Targets(targets_N, options)
        gradients = _Gradients(
            hidden_NH,
            weight_VH,
            ctx.needs_input_grad if wants_gradient else (False, False),
            into_main_grad=gradient_scale is not None,
        )

        def part_steps(rows: slice, student_PV: torch.Tensor) -> Generator[None, None, None]:
            torch.mm(hidden_NH[rows], weight_VH.t(), out=student_PV)
            answer = yield from teacher.solve(student_PV, rows, options)
            per_token_N[rows] = answer.value_P
            if targets is not None:
                targets.read(rows, student_PV, answer)
            if gradients.wanted:
                answer.write_gradient(scale_N[rows])

        # one buffer for all chunks: their logits, then the gradient of these
        buffer_CV = hidden_NH.new_empty((min(chunk_size, num_tokens), weight_VH.shape[0]))
        for chunk in _slices(0, num_tokens, chunk_size):
            student_CV = buffer_CV[: chunk.stop - chunk.start]
            parts = _slices(chunk.start, chunk.stop, tokens_of_part(chunk_size))
            of_parts = student_CV.split(tokens_of_part(chunk_size))
            _run(map(part_steps, parts, of_parts), ahead=int(group_size(options.tp_group) > 1))
            gradients.add(chunk, student_CV)
        # not by save_for_backward: backward hands the gradients over instead of copying them
        ctx.gradients = gradients.hidden_NH, gradients.head_sum()
        ctx.weight_VH, ctx.gradient_scale = weight_VH, gradient_scale
        log_probs_N = per_token_N.new_empty(0) if targets is None else targets.log_probs()
        ctx.mark_non_differentiable(per_token_N, log_probs_N)
        return (token_weights_N * per_token_N).sum(), per_token_N, log_probs_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_divergence: its gradient was handed over by a first backward"
            )
        (hidden_NH, head_VH), ctx.gradients = ctx.gradients, None
        if ctx.gradient_scale is None:
            if hidden_NH is not None:
                hidden_NH.mul_(grad_loss)
            if head_VH is not None:
                head_VH = _scaled(head_VH, grad_loss, ctx.weight_VH.dtype)
        else:
            # looked at by the device: the host would have to wait for forward
            torch._assert_async(
                torch.isclose(grad_loss, ctx.gradient_scale),
                "linear_loss: backward brings another factor than gradient_scale has said",
            )
            if head_VH is not None:
                head_VH = _in_place_of_main_grad(ctx.weight_VH)
        return (hidden_NH, head_VH, *[None] * 7)


def _slices(begin: int, end: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` from ``begin`` to ``end``; the last may be shorter."""
    return (slice(first, min(first + size, end)) for first in range(begin, end, size))


def _scaled(sum_VH: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``factor`` x ``sum_VH`` in ``dtype``, in one pass; in place where that is float32."""
    out_VH = sum_VH if dtype == sum_VH.dtype else torch.empty_like(sum_VH, dtype=dtype)
    return torch.mul(sum_VH, factor, out=out_VH)


def _in_place_of_main_grad(weight_VH: Any) -> torch.Tensor | None:
    """Gradient for autograd of a head whose ``main_grad`` has its gradient already.

    Megatron's DDP does not read it, but its hook wants to see one when reductions overlap. Where
    the same parameter is the embedding (``zero_out_wgrad``) the hook does add what comes: that is
    to be the embedding's gradient alone.
    """
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True
    return None if getattr(weight_VH, "zero_out_wgrad", False) else torch.empty_like(weight_VH)


class _Targets:
    """Log-probabilities of N target tokens at temperature 1, out of what the loss knows anyway.

    At temperature 1 its row numbers lack the target's logit alone, which one rank holds: those of
    all tokens meet in one collective. At another one the sums of exponentials are not those asked
    for, and the logits are gone over once more.
    """

    def __init__(self, ids_N: torch.Tensor, options: Options) -> None:
        self._ids_N, self._options = ids_N, options
        self._at_one = options.divergence.temperature == 1.0
        # logit, maximum and log-sum; at another temperature the log-probability and zeros
        self._numbers_3N = torch.zeros((3, len(ids_N)), device=ids_N.device)

    def read(self, rows: slice, student_PV: torch.Tensor, answer: PartAnswer) -> None:
        """Take what is needed of a part's logits [P, v/tp], before they are overwritten."""
        ids_P, valid, tp_group = self._ids_N[rows], self._options.valid, self._options.tp_group
        numbers_3P = self._numbers_3N[:, rows]
        if self._at_one:
            numbers_3P[0] = own_logits(student_PV, ids_P, valid, tp_group)
            numbers_3P[1], numbers_3P[2] = answer.max_P, answer.log_sum_P
        else:
            numbers_3P[0] = target_log_probs(student_PV, ids_P, valid, tp_group)

    def log_probs(self) -> torch.Tensor:
        """Float32 [N], nats."""
        logit_N, max_N, log_sum_N = self._numbers_3N
        if self._at_one and len(logit_N):
            # only the owner's entry is above LOG_ZERO
            logit_N = all_gather(logit_N, self._options.tp_group).amax(0)
        return (logit_N - max_N) - log_sum_N


class _Gradients:
    """Gradients in hidden states and LM head, collected chunk by chunk."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        needs: tuple[bool, ...],
        *,
        into_main_grad: bool,
    ) -> None:
        self.student_hidden_NH, self.student_weight_VH = hidden_NH, weight_VH
        self.hidden_NH = torch.empty_like(hidden_NH) if needs[0] else None
        # the head's is summed in float32: bfloat16 would lose what the later chunks add
        self._head_VH: torch.Tensor | None = None
        self._is_empty = not into_main_grad
        if needs[1] and into_main_grad:
            self._head_VH = weight_VH.main_grad  # type: ignore[attr-defined]
        elif needs[1]:
            self._head_VH = torch.empty_like(weight_VH, dtype=torch.float32)

    @property
    def wanted(self) -> bool:
        return self.hidden_NH is not None or self._head_VH is not None

    def add(self, rows: slice, grad_logits_CV: torch.Tensor) -> None:
        """Add what the gradient of a chunk's logits [C, v/tp] gives."""
        if self.hidden_NH is not None:
            torch.mm(grad_logits_CV, self.student_weight_VH, out=self.hidden_NH[rows])
        if self._head_VH is not None:
            hidden_CH = self.student_hidden_NH[rows]
            _add_product(self._head_VH, grad_logits_CV.t(), hidden_CH, beta=int(not self._is_empty))
            self._is_empty = False

    def head_sum(self) -> torch.Tensor | None:
        """The head's gradient [v/tp, h], float32, of all that was added."""
        if self._head_VH is not None and self._is_empty:
            self._head_VH.zero_()
        return self._head_VH


def _add_product(sum_VH: torch.Tensor, a_VC: torch.Tensor, b_CH: torch.Tensor, beta: int) -> None:
    """``sum_VH`` = beta x ``sum_VH`` + a b; it is float32, and with beta 0 it is not read."""
    if a_VC.dtype == sum_VH.dtype:
        torch.addmm(sum_VH, a_VC, b_CH, beta=beta, out=sum_VH)
    elif sum_VH.device.type == "cuda":
        torch.addmm(sum_VH, a_VC, b_CH, beta=beta, out_dtype=sum_VH.dtype, out=sum_VH)
    else:  # the CPU has no GEMM from 16 bits into float32: one rounding a chunk
        product_VH = a_VC @ b_CH
        sum_VH.add_(product_VH) if beta else sum_VH.copy_(product_VH)


def _run(parts: Iterator[Generator[None, None, None]], *, ahead: int) -> None:
    """Run parts in order, each begun, up to its first collective, ``ahead`` parts early."""
    begun: deque[Generator[None, None, None]] = deque()
    for steps in parts:
        next(steps, None)
        begun.append(steps)
        if len(begun) > ahead:
            deque(begun.popleft(), maxlen=0)  # to its end
    for steps in begun:
        deque(steps, maxlen=0)
