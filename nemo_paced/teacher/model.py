"""The frozen teacher in the training engine: final hidden states of response tokens.

Phase 1 of a step runs the teacher forward over all micro-batches and keeps, on the last pipeline
stage, one hidden state per response token: V / (TP h) times smaller than a rank's share of its
logits. In phase 2 the loss turns them into logits with the teacher's own LM head, a chunk of tokens
at a time, beside the student's. With ``teacher.top_k`` the likeliest tokens and the mass of the
rest cross instead: small enough for a disk (``cache.py``), and a lower bound of the loss. What
crosses is keyed by response id: the two models see different prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_paced.data.packing import MicroBatch
from nemo_paced.losses.linear_divergence import HiddenTeacher, TopKChunks, default_chunk
from nemo_paced.losses.topk import TopKTeacher
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
class SignalKind:
    """What crosses from teacher to loss.

    Attributes:
        top_k: tokens of the top-k; 0: final hidden states, from which the loss is exact.
        temperature: of the distribution that a top-k is cut from.
        vocab_size: the true vocabulary.
    """

    top_k: int
    temperature: float
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """What the loss needs of the teacher, by response id; empty but on the last pipeline stage.

    Attributes:
        hidden: [tokens of the response, h], the model's dtype.
        top_k: of the tokens of the response, instead of hidden states.
        head_weight: the teacher's LM head, this rank's columns [v/tp, h].
    """

    hidden: dict[str, torch.Tensor]
    top_k: dict[str, TopKTeacher]
    head_weight: torch.Tensor | None

    def of(self, spans: Sequence[tuple[str, int]], k: int) -> HiddenTeacher | TopKChunks:
        """The signal of a micro-batch's response tokens, in the order of its ``spans``."""
        head = self.head_weight
        assert head is not None, "only the last pipeline stage has a teacher signal"
        held = self.top_k if k else self.hidden
        for response_id, length in spans:
            part = held[response_id]
            tokens = len(part.ids if isinstance(part, TopKTeacher) else part)
            assert tokens == length, f"teacher and student disagree on length of {response_id}"
        names = [response_id for response_id, _ in spans]
        if k:
            none = TopKTeacher.empty(k, head.device)
            return TopKChunks(TopKTeacher.cat([none, *(self.top_k[name] for name in names)]))
        empty = head.new_zeros(0, head.shape[1])
        return HiddenTeacher(torch.cat([empty, *(self.hidden[name] for name in names)]), head)


class Teacher:
    """A frozen GPTModel (this rank's pipeline stage) whose output is its final hidden state."""

    def __init__(self, gpt: GPTModel, parallel: Parallel, kind: SignalKind) -> None:
        self.parallel = parallel
        self.kind = kind
        self.gpt = gpt.requires_grad_(False).eval()
        self.head_weight: torch.Tensor | None = None
        if gpt.post_process:
            self.head_weight = _head_weight(gpt).detach()
            gpt.output_layer = HiddenStates(
                self.head_weight, gpt.config.sequence_parallel, parallel.tp_group
            )

    @property
    def bytes_per_token(self) -> int:
        """Of the signal of one response token."""
        if self.kind.top_k:
            return TopKTeacher.empty(self.kind.top_k, torch.device("cpu")).bytes_per_token
        return self.gpt.config.hidden_size * self.gpt.config.params_dtype.itemsize

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
        by_response: dict[str, Any] = {}
        for part in collected:
            by_response.update(part)
        if self.kind.top_k:
            return TeacherSignal({}, by_response, self.head_weight)
        return TeacherSignal(by_response, {}, self.head_weight)

    def _forward_step(self, data_iterator, model):
        batch: MicroBatch = next(data_iterator)
        hidden_BSH = model(batch.tokens_BS, batch.position_ids_BS, attention_mask=None)

        def keep_response_tokens(hidden_BSH: torch.Tensor, non_loss_data: bool) -> dict:
            hidden_NH = hidden_BSH[batch.rows_N, batch.positions_N]
            names = [response_id for response_id, _ in batch.spans]
            lengths = [length for _, length in batch.spans]
            if not names:
                return {}
            if not self.kind.top_k:
                return dict(zip(names, hidden_NH.split(lengths), strict=True))
            top = self._top_k(hidden_NH)
            ends = itertools.accumulate(lengths)
            return {
                name: top[end - length : end]
                for name, length, end in zip(names, lengths, ends, strict=True)
            }

        return hidden_BSH, keep_response_tokens

    def _top_k(self, hidden_NH: torch.Tensor) -> TopKTeacher:
        assert self.head_weight is not None, "the last stage holds the head"
        return TopKTeacher.from_hidden(
            hidden_NH,
            self.head_weight,
            self.kind.top_k,
            chunk_size=default_chunk(self.head_weight),
            tp_group=self.parallel.tp_group,
            temperature=self.kind.temperature,
            vocab_size=self.kind.vocab_size,
        )


def _head_weight(gpt: GPTModel) -> torch.Tensor:
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight
