"""The student's output layer, whose forward is the loss.

It is a ColumnParallelLinear that, given what a micro-batch's loss needs, returns that loss instead
of logits: LM head and divergence are one operation there (``losses/linear_divergence.py``). The
head's gradient goes straight into Megatron's float32 buffer, as under Megatron's own
``gradient_accumulation_fusion`` but in the layer's forward, where the chunks' logits are: no
gradient of the head's size is made, scaled, rounded and added. That buffer is reduced when the last
micro-batch's backward has passed, and every forward comes before that. DDP's hooks, tied embeddings
and sequence parallelism see a layer like any other. Without a loss set the layer returns logits.
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
from nemo_paced.losses.linear_divergence import LinearLoss, TeacherInput, linear_loss
from nemo_paced.losses.options import Options


@dataclass(slots=True)
class MicroBatchLoss:
    """Inputs of one micro-batch's loss and, after the output layer's forward, its result.

    Attributes:
        batch: the student's sequences, with the weights of their response tokens.
        teacher: its signal for the N response tokens of this rank.
        chunk_size: tokens whose logits exist at a time; ``None``: chosen by the loss.
        targets_N: int64, tokens to report log-probabilities of; ``None``: none.
        gradient_scale: float32 scalar, what backward will bring as the gradient of the loss;
            ``None``: not known, or the head is not in a buffer of Megatron's.
        result: ``None`` until the layer has run.
    """

    batch: MicroBatch
    teacher: TeacherInput
    options: Options
    chunk_size: int | None
    targets_N: torch.Tensor | None
    gradient_scale: torch.Tensor | None = None
    result: LinearLoss | None = None


class DivergenceOutputLayer(ColumnParallelLinear):
    """Output layer that maps hidden states [s, b, h] to a loss, or to logits [s, b, v/tp].

    Under sequence parallelism it takes [s/tp, b, h], as Megatron's does. Where ``self.loss`` is set
    the next forward returns that loss as [1, 1] and unsets it.
    """

    loss: MicroBatchLoss | None = None

    @classmethod
    def install(cls, gpt: GPTModel) -> None:
        """Put such a layer in place of the output layer of a last stage, with the same weight."""
        replaced = gpt.output_layer
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
        """Loss options for :class:`MicroBatchLoss`, checked against both heads on this rank.

        Args:
            teacher_head: [v/tp, h], cut like the student's.
            vocab_size: the true vocabulary, over all ranks.

        Raises:
            ValueError: heads of different widths, or narrower than the vocabulary.
        """
        assert teacher_head is not None, "the last stage holds the teacher's head"
        widths = self.output_size_per_partition, teacher_head.shape[0]
        return Options.of(divergence, widths, tp_group=self.tp_group, vocab_size=vocab_size)

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """The loss [1, 1] (float32), or logits where no loss is set; never a bias."""
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
            gradient_scale=loss.gradient_scale,
        )
        loss.result = result
        # GPTModel swaps the first two axes of what it takes for logits
        return result.loss.view(1, 1), None

    def _response_hidden(self, hidden_SBH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [N, h] of response tokens; backward sums their gradient over the group."""
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self.tp_group
            )
            return hidden_SBH[batch.positions_N, batch.rows_N]
        hidden_NH = hidden_SBH[batch.positions_N, batch.rows_N]
        return copy_to_tensor_model_parallel_region(hidden_NH, group=self.tp_group)
