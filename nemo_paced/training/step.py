"""One optimizer step in two phases: the teacher forward, then the student forward and backward.

Loss = sum over response tokens of token_weight x divergence, where the token weight already holds
the problem's weight and the one global normaliser (``losses/reduction.py``). Megatron divides
gradients by the number of response tokens that the loss functions report, summed over the global
batch; the loss is multiplied by that same number first, so what remains is exactly the sum, however
the batch is cut into micro-batches and data-parallel ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nemo_paced.config import LossConfig, ModelConfig, StageConfig
from nemo_paced.data.packing import (
    MicroBatch,
    TrainItem,
    micro_batches,
    num_micro_batches,
    padded_length,
    rank_items,
)
from nemo_paced.losses.divergence import Divergence, divergence
from nemo_paced.losses.vocab_parallel import target_log_probs
from nemo_paced.parallel import Parallel
from nemo_paced.pipeline import run_schedule
from nemo_paced.teacher.model import Teacher, TeacherSignal
from nemo_paced.training.student import Student


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured, equal on all ranks.

    Attributes:
        loss: the minimised sum; nats.
        grad_norm: global norm before clipping; ``None`` when the step was skipped (NaN or Inf) or
            when there was nothing to train on.
        token_divergence: mean divergence of a response token, unweighted; nats.
        logprob_gap: mean |trainer - server| log-probability of the sampled tokens, nats; NaN
            off-policy.
        tokens: response tokens of the global batch.
    """

    loss: float
    grad_norm: float | None
    token_divergence: float
    logprob_gap: float
    tokens: int
    teacher_s: float
    student_s: float

    @property
    def finite(self) -> bool:
        return self.grad_norm is not None and math.isfinite(self.loss)


@dataclass(frozen=True, slots=True)
class Step:
    """The step function: student, teacher, and how the loss is computed between them.

    Attributes:
        vocab_size: the true vocabulary; columns above carry no mass in either model.
    """

    student: Student
    teacher: Teacher
    model: ModelConfig
    loss: LossConfig
    teacher_micro_batch_size: int
    vocab_size: int
    parallel: Parallel

    def __call__(self, items: Sequence[TrainItem], stage: StageConfig, lr: float) -> StepResult:
        """Train on the items of the global batch (the same list on every rank), at rate ``lr``."""
        assert items, "a batch with nothing to train on is the caller's no-op"
        total_tokens = sum(len(item.response_ids) for item in items)
        begin = time.perf_counter()
        signal = self.teacher.signal(self._cut(items, teacher=True))
        teacher_s = time.perf_counter() - begin

        self.student.zero_grad()
        self.student.ddp.train()
        reports = run_schedule(
            partial(self._forward_step, signal, Divergence(stage.divergence.value), total_tokens),
            self._cut(items, teacher=False),
            self.student.ddp,
            self.parallel,
        )
        loss, divergence_sum, gap_sum, gap_count = self._sum_over_ranks(reports)
        grad_norm = None
        if math.isfinite(loss):
            self.student.set_learning_rate(lr)
            grad_norm = self.student.update()
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            token_divergence=divergence_sum / max(total_tokens, 1),
            logprob_gap=gap_sum / gap_count if gap_count else math.nan,
            tokens=total_tokens,
            teacher_s=teacher_s,
            student_s=time.perf_counter() - begin - teacher_s,
        )

    def _cut(self, items: Sequence[TrainItem], *, teacher: bool) -> list[MicroBatch]:
        size = self.teacher_micro_batch_size if teacher else self.model.micro_batch_size
        dp_size = self.parallel.dp_size
        return micro_batches(
            rank_items(items, dp_rank=self.parallel.dp_rank, dp_size=dp_size),
            teacher=teacher,
            micro_batch_size=size,
            count=num_micro_batches(len(items), micro_batch_size=size, dp_size=dp_size),
            # sequence parallelism cuts the sequence into tensor-parallel parts
            sequence_length=padded_length(
                items, teacher=teacher, multiple_of=math.lcm(8, self.parallel.tp_size)
            ),
            device=self.parallel.device,
        )

    def _forward_step(
        self, signal: TeacherSignal, kind: Divergence, total_tokens: int, data_iterator, model
    ):
        batch: MicroBatch = next(data_iterator)
        logits_BSV = model(batch.tokens_BS, batch.position_ids_BS, attention_mask=None)
        return logits_BSV, partial(self._loss, batch, signal, kind, total_tokens)

    def _loss(
        self,
        batch: MicroBatch,
        signal: TeacherSignal,
        kind: Divergence,
        total_tokens: int,
        logits_BSV: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Megatron's ``loss_func``: (sum to differentiate, response tokens, figures to report)."""
        student_NV = logits_BSV[batch.rows_N, batch.positions_N]
        per_token_N = divergence(
            student_NV,
            signal.logits_NV(batch.spans),
            kind,
            tp_group=self.parallel.tp_group,
            temperature=self.loss.temperature,
            jsd_beta=self.loss.jsd_beta,
            skew=self.loss.skew,
            akl_head_mass=self.loss.akl_head_mass,
            vocab_size=self.vocab_size,
            chunk_size=self.loss.chunk_size,
        )
        loss = (batch.token_weights_N * per_token_N).sum()
        gap_N = self._logprob_gap(batch, student_NV)
        figures = torch.stack(
            [
                loss.detach().double(),
                per_token_N.detach().double().sum(),
                gap_N.double().nansum(),
                (~gap_N.isnan()).sum().double(),
            ]
        )
        num_tokens = torch.tensor(batch.num_tokens, dtype=torch.int, device=loss.device)
        return loss * total_tokens, num_tokens, figures

    @torch.no_grad()
    def _logprob_gap(self, batch: MicroBatch, student_NV: torch.Tensor) -> torch.Tensor:
        if bool(batch.server_logprobs_N.isnan().all()):
            return batch.server_logprobs_N
        logprobs_N = target_log_probs(
            student_NV, batch.targets_N, tp_group=self.parallel.tp_group, vocab_size=self.vocab_size
        )
        return (logprobs_N - batch.server_logprobs_N).abs()

    def _sum_over_ranks(self, reports: Sequence[torch.Tensor]) -> tuple[float, float, float, int]:
        total = torch.zeros(4, dtype=torch.float64, device=self.parallel.device)
        # tensor-parallel ranks report the same figures; count them once
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:
            total += torch.stack(list(reports)).sum(0)
        torch.distributed.all_reduce(total)
        loss, divergence_sum, gap_sum, gap_count = total.tolist()
        return loss, divergence_sum, gap_sum, int(gap_count)
