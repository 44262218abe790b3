"""Numbers of parameters that a rank holds: exact, by Megatron's cuts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.shapes import Layout


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters of one rank, by kind.

    Attributes:
        dense: linear layers, norms and routers, the same on all data-parallel ranks.
        experts: the experts that lie on the rank, the same on its expert-data-parallel ranks.
        vocabulary: embedding and LM head, which count in none of the others.
    """

    dense: int
    experts: int
    vocabulary: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.vocabulary


def stage_parameters(shape: Architecture, layout: Layout, stage: int, padded: int) -> Parameters:
    """Parameters of a rank of pipeline stage ``stage``.

    Args:
        padded: rows of the vocabulary over all tensor-parallel ranks, padding included.
    """
    layers = layout.layers(shape.num_layers, stage)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    # a tied head is the embedding itself, unless that lies on another stage
    heads = int(is_first) + int(is_last and not (shape.tied and is_first))
    sparse = _sparse_layers(shape, layers)
    of_layers = len(layers) * _attention(shape, layout.tensor)
    of_layers += (len(layers) - sparse) * _mlp(shape, layout.tensor) + sparse * _router(shape)
    return Parameters(
        dense=of_layers + is_last * shape.hidden_size,
        experts=sparse * (_experts(shape) // layout.expert),
        vocabulary=heads * padded // layout.tensor * shape.hidden_size,
    )


def model_parameters(shape: Architecture) -> int:
    """Number of parameters of the whole model, its vocabulary as in ``config.json``."""
    return stage_parameters(shape, Layout(), 0, shape.vocab_size).total


def active_parameters(shape: Architecture) -> int:
    """Number of the layers' parameters that one token meets; without embedding and LM head."""
    sparse = _sparse_layers(shape, range(shape.num_layers))
    used = 0
    if shape.experts is not None:
        used = _experts(shape) // shape.experts.count * shape.experts.per_token + _router(shape)
    dense = (shape.num_layers - sparse) * _mlp(shape, 1)
    return shape.num_layers * _attention(shape, 1) + dense + sparse * used


def _attention(shape: Architecture, tensor: int) -> int:
    """Parameters of one layer's attention on a rank, with both norms of the layer."""
    h, q, kv = shape.hidden_size, shape.q_width, shape.kv_width
    weights = (q + 2 * kv) // tensor * h + q // tensor * h
    bias = shape.qkv_bias * (q + 2 * kv) // tensor
    return weights + bias + 2 * h + shape.qk_norm * 2 * shape.head_dim


def _mlp(shape: Architecture, tensor: int) -> int:
    return 3 * shape.ffn_hidden_size // tensor * shape.hidden_size


def _router(shape: Architecture) -> int:
    return shape.experts.count * shape.hidden_size if shape.experts else 0


def _experts(shape: Architecture) -> int:
    """Parameters of all experts of one layer; tensor parallelism cuts none of them."""
    if shape.experts is None:
        return 0
    return shape.experts.count * 3 * shape.experts.ffn_hidden_size * shape.hidden_size


def _sparse_layers(shape: Architecture, layers: Iterable[int]) -> int:
    return sum(layer in shape.experts.layers for layer in layers) if shape.experts else 0
