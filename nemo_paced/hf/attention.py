"""Core attention for machines without Transformer Engine: packed sequences, context parallelism.

Megatron's own (``DotProductAttention``) knows neither and builds the whole matrix of scores. This
one is torch's ``scaled_dot_product_attention`` behind the same interface. Under context parallelism
keys and values of the group are gathered: right and simple. On a GPU it serves only where there is
no Transformer Engine, and a teacher whose FP8 is PyTorch's.

Axes: S positions on this rank, B rows, N heads of this rank, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import scaled_dot_product_attention


class CoreAttention(MegatronModule):
    """Causal softmax(Q K^T / sqrt(D)) V, behind the interface of Megatron's core attention.

    Dropout is not applied, whatever the arguments say.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal, "these models are causal"
        assert pg_collection is not None, "process groups are passed down"
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend from this rank's positions to all earlier ones of their sequences.

        Args:
            query: [s, b, n, d], or [t, n, d] for packed sequences (t positions on this rank).
            key, value: as ``query``, with the rank's key-value heads for n.

        Returns:
            [s, b, n d], or [t, n d].
        """
        assert attention_mask is None and attention_bias is None, "causal, and nothing else"
        if packed_seq_params is None:
            sequences = [query.shape[0] * self.cp_group.size()]
            attended = self._attend(query, key, value, sequences)
            return attended.flatten(-2)
        ends = packed_seq_params.cu_seqlens_q
        sequences = (ends[1:] - ends[:-1]).tolist()
        row = self._attend(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), sequences)
        return row.squeeze(1).flatten(-2)

    def _attend(
        self,
        query_SBND: torch.Tensor,
        key_SBND: torch.Tensor,
        value_SBND: torch.Tensor,
        sequences: Sequence[int],
    ) -> torch.Tensor:
        """Attention of sequences that lie one behind another along S; returns [S, B, N, D].

        Args:
            sequences: their whole lengths. Under context parallelism a rank holds two pieces of
                each, one from its front and the mirrored one from its end.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        queries = query_SBND.split([length // size for length in sequences])
        if size == 1:
            keys = key_SBND.split(list(sequences))
            values = value_SBND.split(list(sequences))
        else:
            keys = self._gather(key_SBND, sequences)
            values = self._gather(value_SBND, sequences)
        parts = []
        for length, query, key, value in zip(sequences, queries, keys, values, strict=True):
            if size == 1:
                parts.append(self._causal(query, key, value))
                continue
            piece = length // (2 * size)
            numbers = (rank, 2 * size - 1 - rank)
            for number, part in zip(numbers, query.split(piece), strict=True):
                seen = (number + 1) * piece  # keys up to and including the piece's own
                parts.append(self._causal(part, key[:seen], value[:seen]))
        return torch.cat(parts)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of queries that are the last of the keys' positions; [S, B, N, D]."""
        asked, seen = query.shape[0], key.shape[0]
        mask = None
        if asked != seen:
            mask = torch.ones(asked, seen, dtype=torch.bool, device=query.device)
            mask = mask.tril(seen - asked)
        attended_BNSD = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended_BNSD.permute(2, 0, 1, 3)

    def _gather(self, local: torch.Tensor, sequences: Sequence[int]) -> list[torch.Tensor]:
        """Each whole sequence, put together from the two pieces of it that every rank holds."""
        size = self.cp_group.size()
        everywhere = gather_from_sequence_parallel_region(
            local, tensor_parallel_output_grad=True, group=self.cp_group
        )
        held = [rank.split([n // size for n in sequences]) for rank in everywhere.chunk(size)]
        whole = []
        for of_ranks in zip(*held, strict=True):
            fronts, ends = zip(*(part.chunk(2) for part in of_ranks), strict=True)
            whole.append(torch.cat([*fronts, *reversed(ends)]))
        return whole
