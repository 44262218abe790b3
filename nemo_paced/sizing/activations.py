"""Bytes of activations that a layer keeps for backward, tensor by tensor.

Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", eq. 2)
count 34 s b h + 5 a s^2 b bytes for a layer of GPT in 16 bits. Here the layers differ (grouped
queries, SwiGLU, RMSNorm, no dropout, no biases), no score matrix is kept, and layers run on one of:

    gpu   Transformer Engine: norms fused with the linear layer behind them, flash attention,
          fused SwiGLU. Not measured.
    cpu   Megatron's local spec: RMSNorm in float32, PyTorch's scaled_dot_product_attention.
          Checked against a tracker of tensors (tests/distributed/test_sizing.py).

All counts are bytes a token of the rank (s b / CP tokens), with e bytes an activation. What is h
wide is divided by TP under sequence parallelism, what belongs to heads or MLP columns always. Full
recomputation is counted as of one layer at a time (``model.recompute_num_layers=1``).
"""

from __future__ import annotations

from nemo_paced.config import Recompute
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.shapes import Accelerator, Layout, Work


def layer_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes a token that one layer keeps for backward."""
    if layout.recompute is Recompute.full:
        return boundary_bytes(shape, layout, work)
    return (
        _norms(shape, layout, work) + _attention(shape, layout, work) + (_mlp(shape, layout, work))
    )


def recomputed_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes a token that a layer holds for a moment while it is computed again."""
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
    """Bytes a token of the hidden states between layers."""
    return work.precision_bytes * shape.hidden_size / _sequence_cut(layout)


def final_norm_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes a token that the norm behind the last layer keeps."""
    return _norms(shape, layout, work) / 2


def backward_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes a token of activations' gradients at the widest place of a layer's backward."""
    widest = max(3 * _mlp_width(shape, layout), 4 * shape.q_width / layout.tensor)
    return work.precision_bytes * widest


def _norms(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes of both norms' input and output; unfused: of float32 input and normed value too."""
    e, h = work.precision_bytes, shape.hidden_size
    kept = 2 * e if work.accelerator is Accelerator.gpu else 4 + 2 * e
    return 2 * kept * h / _sequence_cut(layout)


def _attention(shape: Architecture, layout: Layout, work: Work) -> float:
    core = _core(shape, layout, work)
    if layout.recompute is Recompute.selective:
        # the output stays where the projection behind it keeps it, as on a GPU
        core = core - _scales(shape, layout) if work.accelerator is Accelerator.gpu else 0.0
    return _qkv(shape, layout, work) + core


def _qkv(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes of queries, keys and values as the core takes them, and of what their norms keep."""
    e = work.precision_bytes
    q, kv = shape.q_width / layout.tensor, shape.kv_width / layout.tensor
    if work.accelerator is Accelerator.gpu:
        # the projection's output (values are a view of it), rotated queries and keys, the queries
        # that their norm has read
        return e * ((q + 2 * kv) + (q + kv) + shape.qk_norm * q)
    # projection's output and rotated queries and keys as above, and what the norms of queries and
    # keys keep: float32 input and normed value
    kept = e * ((q + 2 * kv) + (q + kv))
    if shape.qk_norm:
        keys_input = 0 if e == 4 else 4 * kv  # in float32 a view of the projection's output
        kept += 4 * q + keys_input + e * (q + kv)
    return kept


def _core(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes that attention itself keeps, between the scores and the output projection."""
    # output and log-sum-exp; on the CPU the output once more, with its axes in another order
    copies = 1 if work.accelerator is Accelerator.gpu else 2
    output = shape.q_width / layout.tensor
    return copies * work.precision_bytes * output + _scales(shape, layout)


def _scales(shape: Architecture, layout: Layout) -> float:
    """Bytes of the float32 log-sum-exp of each head."""
    return 4 * shape.num_heads / layout.tensor


def _mlp(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes of gate and up and of what the projection behind them reads.

    Unfused: of silu(gate) and up + 0 (Megatron adds an offset) too.
    """
    tensors = 3 if work.accelerator is Accelerator.gpu else 5
    kept = tensors * work.precision_bytes * _mlp_width(shape, layout)
    if shape.experts:  # the permuted input and output of the experts, router probabilities
        e, rows = work.precision_bytes, shape.experts.per_token
        kept += (2 * rows * e * shape.hidden_size + 8 * shape.experts.count) / layout.tensor
    return kept


def _mlp_width(shape: Architecture, layout: Layout) -> float:
    """MLP columns that a token goes through on a rank; experts take evenly of all ranks' tokens."""
    if shape.experts:
        return shape.experts.per_token * shape.experts.ffn_hidden_size / layout.tensor
    return shape.ffn_hidden_size / layout.tensor


def _sequence_cut(layout: Layout) -> int:
    return layout.tensor if layout.sequence_parallel else 1
