"""The frozen teacher in the training engine: final hidden states of response tokens.

Phase 1 of a step runs the teacher forward over all micro-batches and keeps, on the last pipeline
stage, one hidden state per response token: V / (TP h) times smaller than a rank's share of its
logits. In phase 2 the loss turns them into logits with the teacher's own LM head, a chunk of tokens
at a time, beside the student's. What crosses is keyed by response id: the two models see different
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_paced.data.packing import MicroBatch
from nemo_paced.losses.linear_divergence import HiddenTeacher
from nemo_paced.parallel import Parallel
from nemo_paced.pipeline import run_schedule


class HiddenStates(torch.nn.Module):
    """Stands where the output layer stood: hands the final hidden states through.

    GPTModel has no switch for this: ``post_process=False`` would also drop the final norm.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.weight = weight  # a last stage with tied embeddings reads it off its output layer
        self.sequence_parallel = sequence_parallel
        self.tp_group = tp_group

    def forward(
        self, hidden_SBH: torch.Tensor, weight: object = None, runtime_gather_output: object = None
    ) -> tuple[torch.Tensor, None]:
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_SBH, None


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """What the loss needs of the teacher, by response.

    Attributes:
        hidden: response id -> [tokens of the response, h], the model's dtype; empty on ranks that
            are not of the last pipeline stage.
        head_weight: the teacher's LM head, this rank's columns [v/tp, h]; ``None`` likewise.
    """

    hidden: dict[str, torch.Tensor]
    head_weight: torch.Tensor | None

    def of(self, spans: Sequence[tuple[str, int]]) -> HiddenTeacher:
        """The signal of a micro-batch's response tokens, in the order of its ``spans``."""
        assert self.head_weight is not None, "only the last pipeline stage has a teacher signal"
        parts = [self.hidden[response_id] for response_id, _ in spans]
        for part, (response_id, length) in zip(parts, spans, strict=True):
            assert len(part) == length, f"teacher and student disagree on length of {response_id}"
        empty = self.head_weight.new_zeros(0, self.head_weight.shape[1])
        return HiddenTeacher(torch.cat(parts) if parts else empty, self.head_weight)


class Teacher:
    """A frozen GPTModel (this rank's pipeline stage) whose output is its final hidden state."""

    def __init__(self, gpt: GPTModel, parallel: Parallel) -> None:
        self.parallel = parallel
        self.gpt = gpt.requires_grad_(False).eval()
        self.head_weight: torch.Tensor | None = None
        if gpt.post_process:
            self.head_weight = _head_weight(gpt).detach()
            gpt.output_layer = HiddenStates(
                self.head_weight, gpt.config.sequence_parallel, parallel.tp_group
            )

    @torch.no_grad()
    def signal(self, micro_batches: Sequence[MicroBatch]) -> TeacherSignal:
        """Run forward over all micro-batches; collective over the data-parallel replica."""
        collected = run_schedule(
            self._forward_step,
            micro_batches,
            self.gpt,
            self.parallel,
            forward_only=True,
            collect_non_loss_data=True,
        )
        hidden: dict[str, torch.Tensor] = {}
        for part in collected:
            hidden.update(part)
        return TeacherSignal(hidden, self.head_weight)

    @staticmethod
    def _forward_step(data_iterator, model):
        batch: MicroBatch = next(data_iterator)
        hidden_BSH = model(batch.tokens_BS, batch.position_ids_BS, attention_mask=None)

        def keep_response_tokens(hidden_BSH: torch.Tensor, non_loss_data: bool) -> dict:
            hidden_NH = hidden_BSH[batch.rows_N, batch.positions_N]
            lengths = [length for _, length in batch.spans]
            names = [response_id for response_id, _ in batch.spans]
            return dict(zip(names, hidden_NH.split(lengths), strict=True)) if names else {}

        return hidden_BSH, keep_response_tokens


def _head_weight(gpt: GPTModel) -> torch.Tensor:
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight
