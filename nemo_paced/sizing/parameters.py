"""How many parameters a rank holds: exact, by Megatron's cuts."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_paced.sizing.shapes import Layout, ModelShape


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of one rank.

    Attributes:
        dense: what is the same on all its data-parallel ranks: linear layers, norms, routers.
        experts: experts, shared by the ranks of fewer replicas.
        vocabulary: embedding and LM head, part of none of the others.
    """

    dense: int
    experts: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.vocabulary


def stage_parameters(shape: ModelShape, layout: Layout, stage: int, padded: int) -> Parameters:
    """Of a rank of pipeline stage ``stage``; ``padded``: rows of the vocabulary over all ranks."""
    layers = shape.num_layers // layout.pipeline
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    # a tied head is the embedding, but where that lies on another stage
    heads = int(is_first) + int(is_last and not (shape.tied and is_first))
    return Parameters(
        dense=layers * _layer(shape, layout.tensor) + is_last * shape.hidden_size,
        experts=layers * _experts(shape, layout),
        vocabulary=heads * padded // layout.tensor * shape.hidden_size,
    )


def model_parameters(shape: ModelShape) -> int:
    """Of the whole model, its vocabulary as in ``config.json``."""
    return stage_parameters(shape, Layout(), 0, shape.vocab_size).total


def active_parameters(shape: ModelShape) -> int:
    """Of the layers that one token goes through: no embedding, no LM head."""
    per_expert = 3 * shape.ffn_hidden_size * shape.hidden_size
    return shape.num_layers * (_layer(shape, 1) + shape.experts_per_token * per_expert)


def _layer(shape: ModelShape, tensor: int) -> int:
    """One layer without its experts."""
    h, q, kv = shape.hidden_size, shape.q_width, shape.kv_width
    attention = (q + 2 * kv) // tensor * h + q // tensor * h
    bias = shape.qkv_bias * (q + 2 * kv) // tensor
    norms = 2 * h + shape.qk_norm * 2 * shape.head_dim
    if shape.num_experts:
        mlp = shape.num_experts * h  # the router
    else:
        mlp = 3 * shape.ffn_hidden_size // tensor * h
    return attention + bias + norms + mlp


def _experts(shape: ModelShape, layout: Layout) -> int:
    per_expert = 3 * shape.ffn_hidden_size // layout.tensor * shape.hidden_size
    return shape.num_experts // layout.expert * per_expert
