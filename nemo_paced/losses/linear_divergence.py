"""LM head and divergence in one: no logits beyond a chunk of tokens, in forward or backward.

    loss = sum_n token_weights[n] x divergence(hidden_T[n] W_T^T, hidden_S[n] W_S^T)

The loss walks chunks of tokens. A chunk's student and teacher logits come out of two GEMMs, the row
numbers travel in the collectives of :mod:`~nemo_paced.losses.divergence`, the gradient of the
logits is written over the student's logits, and two GEMMs more turn it into the chunk's gradient of
the hidden states and its part of the head's. As the loss is one scalar, the gradient is known up to
the factor that backward brings: it is taken in forward, so nothing is computed twice (four GEMMs in
all, where recomputing would take six) and what lives until backward is as large as the inputs.
Under tensor parallelism one chunk's collective runs while the next chunk's GEMMs do.

Memory beyond the inputs: two models' logits of one chunk (of two under tensor parallelism), the
gradients of hidden states and head, and the head's in float32 while chunks are summed up. The
teacher's part may instead be its top-k (:mod:`~nemo_paced.losses.topk`).

Peak memory above the inputs, gradients included, in U = one float32 [N, v], forward KL in float32
on a CPU, as measured by ``benchmarks/losses.py`` (its README has times and settings); collectives
under tensor parallelism as counted by ``tests/distributed/test_losses.py``, of the others by their
sources:

    ============================  ======  ==============================================
    from hidden states, N = 512   peak    collectives
    ============================  ======  ==============================================
    ``linear_divergence``         1.40    one a chunk (JSD, skew: two); one for hidden
    logits, then ``divergence``   3.04    one (two); one for hidden
    plain PyTorch                 8.00    no tensor parallelism
    Liger, chunks of 64           1.63    no tensor parallelism
    ----------------------------  ------  ----------------------------------------------
    from logits, N = 256
    ``divergence``                1.08    one (two), of five (four and two) numbers a token
    ModelOpt LogitsKLLoss         7.00    several all-reduces
    TRL generalised JSD           7.00    no tensor parallelism
    ============================  ======  ==============================================

The peak of ``linear_divergence`` grows with the tokens by the gradient of hidden states alone.

Not covered: a gradient to teacher or token weights, biases of the heads, second derivatives, a
second backward of the same graph (it raises).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.divergence import kernels_for, solve
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.options import Options
from nemo_paced.losses.topk import TopKTeacher, solve_topk
from nemo_paced.losses.vocab_parallel import group_size, sum_gradient, target_log_probs

# elements of one model's logits in a chunk: enough tokens for efficient GEMMs
CPU_CHUNK_ELEMENTS = 2**25
GPU_CHUNK_ELEMENTS = 2**27


@dataclass(frozen=True, slots=True)
class ChunkAnswer:
    """Divergence of each of a chunk's C tokens, and the way to its gradient.

    Attributes:
        value_C: float32, nats.
        write_gradient: given float32 scales [C], overwrites the chunk's student logits [C, v/tp]
            with scale x d value / d logits.
    """

    value_C: torch.Tensor
    write_gradient: Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class HiddenTeacher:
    """The teacher as final hidden states [N, h] and LM head [v/tp, h] (this rank's columns)."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor

    def solve(
        self, student_CV: torch.Tensor, rows: slice, options: Options
    ) -> Generator[None, None, ChunkAnswer]:
        """Divergence of a chunk of student logits [C, v/tp]; yields while ranks exchange."""
        teacher_CV = self.hidden_NH[rows] @ self.weight_VH.t()
        solved = yield from solve(student_CV, teacher_CV, options)

        def write_gradient(scale_C: torch.Tensor) -> None:
            kernels_for(student_CV).gradient(
                student_CV, teacher_CV, solved.numbers, scale_C, options, student_CV
            )

        return ChunkAnswer(solved.value_N, write_gradient)


@dataclass(frozen=True, slots=True)
class TopKChunks:
    """The teacher as its k likeliest tokens and the mass of the rest, of N tokens."""

    teacher: TopKTeacher

    def solve(
        self, student_CV: torch.Tensor, rows: slice, options: Options
    ) -> Generator[None, None, ChunkAnswer]:
        """Top-k divergence of a chunk of student logits [C, v/tp]; yields while ranks exchange."""
        solved = yield from solve_topk(student_CV, self.teacher[rows], options)

        def write_gradient(scale_C: torch.Tensor) -> None:
            solved.write_gradient(student_CV, scale_C, options, student_CV)

        return ChunkAnswer(solved.value_N, write_gradient)


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
            a chunk more).
    """
    loss, per_token_N, log_probs_N = _LinearFunction.apply(
        student_hidden_NH,
        student_weight_VH,
        teacher,
        token_weights_N.detach().float(),
        options,
        chunk_size or default_chunk(student_weight_VH),
        targets_N,
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
    """Tokens of a chunk for an LM head [v/tp, h]: bounded logits, efficient GEMMs."""
    on_gpu = weight_VH.device.type == "cuda"
    return max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CPU_CHUNK_ELEMENTS) // weight_VH.shape[0])


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
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = hidden_NH.shape[0]
        per_token_N = hidden_NH.new_empty(num_tokens, dtype=torch.float32)
        log_probs_N = torch.empty_like(per_token_N)
        gradients = _Gradients(hidden_NH, weight_VH, ctx.needs_input_grad, wants_gradient)

        def chunk_steps(rows: slice) -> Generator[None, None, None]:
            student_CV = hidden_NH[rows] @ weight_VH.t()
            if targets_N is not None:
                log_probs_N[rows] = target_log_probs(
                    student_CV, targets_N[rows], options.valid, options.tp_group
                )
            answer = yield from teacher.solve(student_CV, rows, options)
            per_token_N[rows] = answer.value_C
            if gradients.wanted:
                answer.write_gradient(token_weights_N[rows])
                gradients.add(rows, student_CV)

        chunks = (
            slice(begin, min(begin + chunk_size, num_tokens))
            for begin in range(0, num_tokens, chunk_size)
        )
        _run(map(chunk_steps, chunks), ahead=int(group_size(options.tp_group) > 1))
        # not by save_for_backward: backward hands the gradients over instead of copying them
        ctx.gradients = gradients.results()
        ctx.mark_non_differentiable(per_token_N, log_probs_N)
        return (token_weights_N * per_token_N).sum(), per_token_N, log_probs_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_divergence: its gradient was handed over by a first backward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_loss)
        return (*gradients, *[None] * 6)


class _Gradients:
    """Gradients of the unscaled loss in hidden states and LM head, collected chunk by chunk."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        needs: tuple[bool, ...],
        wanted: bool,
    ) -> None:
        self.student_hidden_NH, self.student_weight_VH = hidden_NH, weight_VH
        self.hidden_NH = torch.empty_like(hidden_NH) if wanted and needs[0] else None
        # the head's is summed in float32: bfloat16 would lose what the later chunks add
        self.weight_VH = (
            torch.empty_like(weight_VH, dtype=torch.float32) if wanted and needs[1] else None
        )
        self._nothing_added = True

    @property
    def wanted(self) -> bool:
        return self.hidden_NH is not None or self.weight_VH is not None

    def add(self, rows: slice, grad_logits_CV: torch.Tensor) -> None:
        """Add what the gradient of a chunk's logits [C, v/tp] gives."""
        if self.hidden_NH is not None:
            torch.mm(grad_logits_CV, self.student_weight_VH, out=self.hidden_NH[rows])
        if self.weight_VH is not None:
            product = grad_logits_CV.t(), self.student_hidden_NH[rows]
            if self._nothing_added and grad_logits_CV.dtype == torch.float32:
                torch.mm(*product, out=self.weight_VH)
            else:
                _add_product(self._zeroed_if_empty(), *product)
            self._nothing_added = False

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden states [N, h] and head [v/tp, h] in the dtypes of these."""
        if self.weight_VH is None:
            return self.hidden_NH, None
        return self.hidden_NH, self._zeroed_if_empty().to(self.student_weight_VH.dtype)

    def _zeroed_if_empty(self) -> torch.Tensor:
        assert self.weight_VH is not None, "asked only where the head wants a gradient"
        return self.weight_VH.zero_() if self._nothing_added else self.weight_VH


def _add_product(sum_VH: torch.Tensor, a_VC: torch.Tensor, b_CH: torch.Tensor) -> None:
    """Add the product a b to ``sum_VH``, which is float32."""
    if a_VC.dtype == sum_VH.dtype:
        sum_VH.addmm_(a_VC, b_CH)
    elif sum_VH.device.type == "cuda":
        torch.addmm(sum_VH, a_VC, b_CH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:  # the CPU has no GEMM from 16 bits into float32: one rounding a chunk
        sum_VH.add_(a_VC @ b_CH)


def _run(chunks: Iterator[Generator[None, None, None]], *, ahead: int) -> None:
    """Run chunks in order, each begun, up to its first collective, ``ahead`` chunks early."""
    begun: deque[Generator[None, None, None]] = deque()
    for steps in chunks:
        next(steps, None)
        begun.append(steps)
        if len(begun) > ahead:
            deque(begun.popleft(), maxlen=0)  # to its end
    for steps in begun:
        deque(steps, maxlen=0)
