"""The teacher's signal for the loss: final hidden states, or each position's likeliest tokens.

Hidden states give the exact loss. A top-k with the mass of the rest is 16 times smaller (h = 4,096
in bf16, k = 64) and gives a lower bound of the loss, for every divergence but adaptive KL.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo_paced.data.packing import MicroBatch
from nemo_paced.losses.linear_divergence import HiddenTeacher, TopKChunks, default_chunk
from nemo_paced.losses.topk import TopKTeacher
from nemo_paced.teacher.kind import SignalKind

# The signal of one response: hidden states [tokens, h] in the model's dtype, or its top-k.
ResponseSignal = torch.Tensor | TopKTeacher


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """The teacher's part of a batch's loss; empty but on the student's last pipeline stage.

    Attributes:
        by_response: signals of this rank's responses, by response id.
        head_weight: the teacher's LM head [v/tp, h], cut in the student's layout.
    """

    by_response: Mapping[str, ResponseSignal]
    head_weight: torch.Tensor | None

    def of(self, batch: MicroBatch, k: int) -> HiddenTeacher | TopKChunks:
        """The signal of a micro-batch's N response tokens on this rank, in the batch's order.

        Args:
            k: tokens of the top-k; 0: the signal is hidden states.
        """
        head = self.head_weight
        assert head is not None, "only the last pipeline stage has a teacher signal"
        parts = [self.by_response[response_id] for response_id, _ in batch.spans]
        for part, (response_id, length) in zip(parts, batch.spans, strict=True):
            tokens = len(part.ids if isinstance(part, TopKTeacher) else part)
            assert tokens == length, f"teacher and student disagree on length of {response_id}"
        if k:
            none = TopKTeacher.empty(k, head.device)
            top = [part for part in parts if isinstance(part, TopKTeacher)]
            whole = TopKTeacher.cat([none, *top])
            return TopKChunks(whole if batch.local_N is None else whole[batch.local_N])
        none_NH = head.new_zeros(0, head.shape[1])
        hidden = [part for part in parts if isinstance(part, torch.Tensor)]
        whole_NH = torch.cat([none_NH, *hidden])
        return HiddenTeacher(whole_NH if batch.local_N is None else whole_NH[batch.local_N], head)


def cut_top_k(
    hidden: Mapping[str, torch.Tensor],
    head_weight: torch.Tensor,
    kind: SignalKind,
    tp_group: torch.distributed.ProcessGroup,
) -> dict[str, TopKTeacher]:
    """Top-k signals from hidden states [tokens, h], both by response id.

    Collective over ``tp_group``, whose ranks give the same responses in the same order.

    Args:
        head_weight: the teacher's LM head [v/tp, h].
    """
    if not hidden:
        return {}
    top = TopKTeacher.from_hidden(
        torch.cat(list(hidden.values())),
        head_weight,
        kind.top_k,
        chunk_size=default_chunk(head_weight),
        tp_group=tp_group,
        temperature=kind.temperature,
        vocab_size=kind.vocab_size,
    )
    lengths = [len(part) for part in hidden.values()]
    ends = itertools.accumulate(lengths)
    return {
        name: top[end - length : end]
        for name, length, end in zip(hidden, lengths, ends, strict=True)
    }
