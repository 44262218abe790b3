"""The student's output layer, whose forward is the loss.

A ColumnParallelLinear that, given what a micro-batch's loss needs, returns that loss instead of
logits: LM head and divergence are one operation there (``losses/linear_divergence.py``), and DDP's
hooks, tied embeddings, sequence parallelism and ``main_grad`` see a layer like any other, as the
head's weight is read in the layer's forward and gets its gradient from autograd. Without a loss set
it returns logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from nemo_paced.data.packing import MicroBatch
from nemo_paced.losses.kinds import Divergence
from nemo_paced.losses.linear_divergence import LinearLoss, TeacherSignal, linear_loss
from nemo_paced.losses.options import Options


@dataclass(slots=True)
class MicroBatchLoss:
    """What the loss of one micro-batch needs and, after the layer's forward, what it was.

    Attributes:
        targets_N: tokens to report log-probabilities of; ``None``: none.
    """

    batch: MicroBatch
    teacher: TeacherSignal
    options: Options
    chunk_size: int | None
    targets_N: torch.Tensor | None
    result: LinearLoss | None = None


class DivergenceOutputLayer(ColumnParallelLinear):
    """[s, b, h] -> the loss as [1, 1], where ``self.loss`` is set."""

    loss: MicroBatchLoss | None = None

    @classmethod
    def install(cls, gpt: GPTModel) -> None:
        """Put such a layer in place of the output layer of a last stage, with the same weight."""
        replaced = gpt.output_layer
        assert not replaced.gradient_accumulation_fusion, "the loss hands its gradient to autograd"
        layer = cls(
            replaced.input_size,
            replaced.output_size,
            config=gpt.config,
            init_method=gpt.config.output_layer_init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=replaced.tp_group,
        )
        layer.weight = replaced.weight  # None where a tied embedding of this stage is passed in
        gpt.output_layer = layer

    def options(
        self, divergence: Divergence, teacher_head: torch.Tensor | None, vocab_size: int
    ) -> Options:
        """What :class:`MicroBatchLoss` takes, checked against both heads' parts on this rank."""
        assert teacher_head is not None, "the last stage holds the teacher's head"
        widths = self.output_size_per_partition, teacher_head.shape[0]
        return Options.of(divergence, widths, tp_group=self.tp_group, vocab_size=vocab_size)

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        if self.loss is None:
            return super().forward(input_, weight, runtime_gather_output)
        loss, self.loss = self.loss, None
        result = linear_loss(
            self._response_hidden(input_, loss.batch),
            self.weight if weight is None else weight,
            loss.teacher,
            loss.batch.token_weights_N,
            loss.options,
            chunk_size=loss.chunk_size,
            targets_N=loss.targets_N,
        )
        loss.result = result
        # GPTModel swaps the first two axes of what it takes for logits
        return result.loss.view(1, 1), None

    def _response_hidden(self, hidden_SBH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [N, h] of the response tokens; their gradient is summed over the group."""
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
            return hidden_SBH[batch.positions_N, batch.rows_N]
        hidden_NH = hidden_SBH[batch.positions_N, batch.rows_N]
        return copy_to_tensor_model_parallel_region(hidden_NH, group=self.tp_group)
