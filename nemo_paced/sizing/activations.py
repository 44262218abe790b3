"""What a layer keeps for backward, tensor by tensor.

Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", eq. 2)
count 34 s b h + 5 a s^2 b bytes for a layer of GPT in 16 bits. Here the layers differ (grouped
queries, SwiGLU, RMSNorm, no dropout, no biases), no score matrix is kept, and what runs is one of:

    gpu   Transformer Engine: norms fused with the linear layer behind them, flash attention;
          SwiGLU and rotary embedding unfused. Not measured.
    cpu   Megatron's local spec: RMSNorm in float32, PyTorch's scaled_dot_product_attention.
          Checked against a tracker of tensors (tests/distributed/test_sizing.py).

All counts are bytes a token of the rank (s b / CP tokens), with e bytes an activation. What is h
wide is divided by TP under sequence parallelism, what belongs to heads or MLP columns always.
"""

from __future__ import annotations

from nemo_paced.config import Recompute
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.shapes import Accelerator, Layout, Work


def layer_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Kept by one layer for backward, bytes a token."""
    if layout.recompute is Recompute.full:
        return boundary_bytes(shape, layout, work)
    return (
        _norms(shape, layout, work) + _attention(shape, layout, work) + (_mlp(shape, layout, work))
    )


def recomputed_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """What a layer holds for a moment while it is computed again, bytes a token."""
    if layout.recompute is Recompute.none:
        return 0.0
    if layout.recompute is Recompute.selective:
        return _core(shape, layout, work)
    return (
        _norms(shape, layout, work)
        + _qkv(shape, layout, work)
        + _core(shape, layout, work)
        + _mlp(shape, layout, work)
    )


def boundary_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Of the hidden states between layers, bytes a token."""
    return work.precision_bytes * shape.hidden_size / _sequence_cut(layout)


def final_norm_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Kept by the norm behind the last layer, bytes a token."""
    return _norms(shape, layout, work) / 2


def backward_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Gradients of activations at the widest place of a layer's backward, bytes a token."""
    widest = max(3 * _mlp_width(shape, layout), 4 * shape.q_width / layout.tensor)
    return work.precision_bytes * widest


def _norms(shape: Architecture, layout: Layout, work: Work) -> float:
    """Input and output of both norms; unfused: the float32 input and the normed value too."""
    e, h = work.precision_bytes, shape.hidden_size
    kept = 2 * e if work.accelerator is Accelerator.gpu else 4 + 2 * e
    return 2 * kept * h / _sequence_cut(layout)


def _attention(shape: Architecture, layout: Layout, work: Work) -> float:
    core = 0.0
    if layout.recompute is Recompute.none:
        core = _core(shape, layout, work)
    return _qkv(shape, layout, work) + core


def _qkv(shape: Architecture, layout: Layout, work: Work) -> float:
    """Queries, keys and values as the core takes them, and what their norms keep."""
    e = work.precision_bytes
    q, kv = shape.q_width / layout.tensor, shape.kv_width / layout.tensor
    if work.accelerator is Accelerator.gpu:
        # the projection's output (values are a view of it), rotated queries and keys, the queries
        # that their norm has read
        return e * ((q + 2 * kv) + (q + kv) + shape.qk_norm * q)
    # the same, and what the norms of queries and keys keep: float32 input and normed value
    kept = e * ((q + 2 * kv) + (q + kv))
    if shape.qk_norm:
        keys_input = 0 if e == 4 else 4 * kv  # in float32 a view of the projection's output
        kept += 4 * q + keys_input + e * (q + kv)
    return kept


def _core(shape: Architecture, layout: Layout, work: Work) -> float:
    """Between the scores and the output projection."""
    heads, output = shape.num_heads / layout.tensor, shape.q_width / layout.tensor
    # log-sum-exp of each row; on the CPU the output once more, with its axes in another order
    copies = 1 if work.accelerator is Accelerator.gpu else 2
    return copies * work.precision_bytes * output + 4 * heads


def _mlp(shape: Architecture, layout: Layout, work: Work) -> float:
    """Gate and up, silu(gate), up + 0 (Megatron adds an offset), their product."""
    kept = 5 * work.precision_bytes * _mlp_width(shape, layout)
    if shape.experts:  # the permuted input and output of the experts, router probabilities
        e, rows = work.precision_bytes, shape.experts.per_token
        kept += (2 * rows * e * shape.hidden_size + 8 * shape.experts.count) / layout.tensor
    return kept


def _mlp_width(shape: Architecture, layout: Layout) -> float:
    """Columns that a token of a rank goes through; experts take evenly of all ranks' tokens."""
    if shape.experts:
        return shape.experts.per_token * shape.experts.ffn_hidden_size / layout.tensor
    return shape.ffn_hidden_size / layout.tensor


def _sequence_cut(layout: Layout) -> int:
    return layout.tensor if layout.sequence_parallel else 1
