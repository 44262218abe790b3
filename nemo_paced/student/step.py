"""One optimizer step in two phases: the teacher forward, then the student forward and backward.

Loss = sum over response tokens of token_weight x divergence, where the token weight already holds
the problem's weight and the one global normaliser (``losses/reduction.py``). It is computed in the
student's output layer (``output_layer.py``): logits exist for a chunk of tokens at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nemo_paced.config import LossConfig, ResponseSource, StageConfig
from nemo_paced.data.packing import Cut, MicroBatch, TrainItem, cut_batch
from nemo_paced.losses.kinds import Divergence
from nemo_paced.losses.reduction import for_megatron
from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.pipeline import call_model, run_schedule
from nemo_paced.student.model import Student
from nemo_paced.student.output_layer import MicroBatchLoss
from nemo_paced.teacher.signal import TeacherSignal
from nemo_paced.teacher.source import TeacherSource


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one optimizer step, equal on all ranks but for the two times.

    Attributes:
        loss: the minimised sum over the global batch, token weights included; nats.
        grad_norm: global norm before clipping; ``None`` when the step was skipped (NaN or Inf in
            loss or gradients).
        token_divergence: mean divergence of a response token, unweighted; nats.
        logprob_gap: mean |trainer - server| log-probability of the sampled tokens, nats; NaN
            off-policy.
        tokens: response tokens of the global batch.
        cached: responses whose teacher signal came from the cache.
        teacher_s: seconds until this rank had the teacher's signal.
        student_s: seconds of this rank's forward, backward and update.
        padding_share: share of the student's positions that hold no token, over all ranks.
    """

    loss: float
    grad_norm: float | None
    token_divergence: float
    logprob_gap: float
    tokens: int
    cached: int
    teacher_s: float
    student_s: float
    padding_share: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite, so that the weights have been updated."""
        return self.grad_norm is not None and math.isfinite(self.loss)


@dataclass(frozen=True, slots=True)
class Step:
    """The step function: student, teacher, and how the loss is computed between them.

    Attributes:
        cut: how a batch becomes the student's micro-batches.
        vocab_size: tokens of the true vocabulary; logits above carry no mass in either model.
        parallel: the student's layout.
    """

    student: Student
    teacher: TeacherSource
    cut: Cut
    loss: LossConfig
    vocab_size: int
    parallel: Parallel

    def __call__(self, items: Sequence[TrainItem], stage: StageConfig, lr: float) -> StepResult:
        """Take one step on the items of a global batch (the same list on every rank); collective.

        Args:
            items: at least one.
            stage: whose responses the items hold, and the divergence to minimise.
            lr: the learning rate.
        """
        assert items, "a batch with nothing to train on is the caller's no-op"
        total_tokens = sum(len(item.response_ids) for item in items)
        prompts = sum(len(item.student_prompt_ids) for item in items)
        begin = time.perf_counter()
        stored = stage.responses is ResponseSource.references
        signal, cached = self.teacher.signal(items, stored=stored)
        self._finish_kernels()
        teacher_s = time.perf_counter() - begin

        self.student.zero_grad()
        for chunk in self.student.ddp_chunks:
            chunk.train()
        batches = cut_batch(items, self.cut, self.parallel, teacher=False)
        positions = sum(batch.tokens_BS.numel() for batch in batches)
        positions *= self.parallel.dp_size * self.parallel.cp_size
        divergence = self.loss.divergence(stage.divergence)
        reports = run_schedule(
            partial(self._forward_step, signal, divergence, positions),
            batches,
            self.student.ddp_chunks,
            self.parallel,
        )
        loss, divergence_sum, gap_sum, gap_count = self._sum_over_ranks(reports)
        grad_norm = None
        if math.isfinite(loss):
            self.student.set_learning_rate(lr)
            grad_norm = self.student.update()
        self._finish_kernels()
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            token_divergence=divergence_sum / max(total_tokens, 1),
            logprob_gap=gap_sum / gap_count if gap_count else math.nan,
            tokens=total_tokens,
            cached=cached,
            teacher_s=teacher_s,
            student_s=time.perf_counter() - begin - teacher_s,
            padding_share=1 - (prompts + total_tokens) / positions,
        )

    def _finish_kernels(self) -> None:
        """Wait for what is enqueued, which would be timed as a part of what comes after."""
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()

    def _forward_step(
        self,
        signal: TeacherSignal,
        divergence: Divergence,
        total_positions: int,
        data_iterator,
        model,
    ):
        batch: MicroBatch = next(data_iterator)
        loss = None
        if model.module.post_process:
            layer = self.student.chunks[-1].output_layer
            loss = MicroBatchLoss(
                batch=batch,
                teacher=signal.of(batch, self.teacher.kind.top_k),
                options=layer.options(divergence, signal.head_weight, self.vocab_size),
                chunk_size=self.loss.chunk_size,
                targets_N=batch.targets_N if batch.on_policy else None,
                gradient_scale=self._gradient_scale(batch, total_positions),
            )
            layer.loss = loss
        output = call_model(model, batch)
        return output, partial(self._report, loss, total_positions)

    def _gradient_scale(self, batch: MicroBatch, total_positions: int) -> torch.Tensor:
        """Gradient of a micro-batch's loss that backward will bring: what becomes of a 1."""
        one = torch.ones((), device=self.parallel.device)
        differentiate, _ = for_megatron(
            one, num_tokens=batch.tokens_BS.numel(), total_tokens=total_positions
        )
        return self.student.chunks[-1].config.grad_scale_func(differentiate).view(())

    @staticmethod
    def _report(
        loss: MicroBatchLoss | None, total_positions: int, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Megatron's ``loss_func``: (sum to differentiate, tokens, figures to report)."""
        assert loss is not None and loss.result is not None, "the output layer has computed it"
        result = loss.result
        gap = torch.zeros(2, dtype=torch.float64, device=output.device)
        if result.target_log_probs_N is not None:
            gap_N = (result.target_log_probs_N - loss.batch.server_logprobs_N).abs().double()
            gap = torch.stack([gap_N.nansum(), (~gap_N.isnan()).sum().double()])
        figures = torch.stack([output.detach().double().sum(), result.per_token_N.double().sum()])
        differentiate, num_tokens = for_megatron(
            output.view(()),
            num_tokens=loss.batch.tokens_BS.numel(),
            total_tokens=total_positions,
        )
        return differentiate, num_tokens, torch.cat([figures, gap])

    def _sum_over_ranks(self, reports: Sequence[torch.Tensor]) -> tuple[float, float, float, int]:
        total = torch.zeros(4, dtype=torch.float64, device=self.parallel.device)
        # tensor-parallel ranks report the same figures; count them once
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:
            total += torch.stack(list(reports)).sum(0)
        torch.distributed.all_reduce(total)
        loss, divergence_sum, gap_sum, gap_count = total.tolist()
        return loss, divergence_sum, gap_sum, int(gap_count)
