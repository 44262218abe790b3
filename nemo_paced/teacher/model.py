"""The frozen teacher in the training engine: final hidden states of response tokens.

Phase 1 of a step runs the teacher forward over all micro-batches and keeps, on its last pipeline
stage, one hidden state per response token: V / (TP h) times smaller than a rank's share of its
logits. This model has no LM head: that lies with the student's last stage, in the student's layout
(``source.py``), where the loss turns hidden states into logits. Hidden states are keyed by response
id, as the two models see different prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_paced.data.packing import MicroBatch
from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.pipeline import call_model, run_schedule


class HiddenStates(torch.nn.Module):
    """Module in place of the output layer that hands the final hidden states through.

    GPTModel has no switch for this: ``post_process=False`` would also drop the final norm.
    """

    weight = None  # GPTModel reads it off the output layer of a last stage with tied embeddings

    def __init__(self, sequence_parallel: bool, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.tp_group = tp_group

    @classmethod
    def install(cls, gpt: GPTModel, parallel: Parallel) -> None:
        """Take the LM head out of a last stage's model, before its weights are loaded."""
        gpt.output_layer = cls(gpt.config.sequence_parallel, parallel.tp_group)

    def forward(
        self, hidden_SBH: torch.Tensor, weight: object = None, runtime_gather_output: object = None
    ) -> tuple[torch.Tensor, None]:
        """[s, b, h], or [s/tp, b, h] under sequence parallelism -> ([s, b, h], no bias)."""
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_SBH, None


class Teacher:
    """A frozen GPTModel (this rank's pipeline stage) whose output is its final hidden state.

    Args:
        gpt: on a last stage with :class:`HiddenStates` in place of the output layer.
        parallel: its own layout, which may differ from the student's.
    """

    def __init__(self, gpt: GPTModel, parallel: Parallel) -> None:
        self.gpt = gpt.requires_grad_(False).eval()
        self.parallel = parallel

    @torch.no_grad()
    def hidden_states(self, micro_batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
        """Run all micro-batches through the teacher; collective over its data-parallel replica.

        Returns:
            Final hidden states [tokens of the response, h] by response id, in the model's dtype, on
            all tensor-parallel ranks of the last stage; empty on the other stages.
        """
        collected = run_schedule(
            self._forward_step,
            micro_batches,
            [self.gpt],
            self.parallel,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return {name: hidden for part in collected for name, hidden in part.items()}

    @staticmethod
    def _forward_step(data_iterator, model):
        batch: MicroBatch = next(data_iterator)
        hidden_BSH = call_model(model, batch)

        def keep_response_tokens(hidden_BSH: torch.Tensor, non_loss_data: bool) -> dict:
            hidden_NH = hidden_BSH[batch.rows_N, batch.positions_N]
            lengths = [length for _, length in batch.spans]
            names = [response_id for response_id, _ in batch.spans]
            return dict(zip(names, hidden_NH.split(lengths), strict=True)) if names else {}

        return hidden_BSH, keep_response_tokens
