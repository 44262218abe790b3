"""The declarative table: Megatron parameter <-> Hugging Face tensors, and how ranks cut them.

Hugging Face parameter names stand here alone, but for those that an import ignores; import, export
and weight refit walk these rows. Expert names are those of the files on the hub, one tensor an
expert (transformers 5 merges them in memory and writes them apart again).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class ParameterLayout(Enum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over ranks."""

    replicated = "replicated"  # every rank holds all of it
    row = "row"  # columns of the weight (input features) are split
    vocabulary = "vocabulary"  # rows are split after padding to the layout's multiple
    qkv = "qkv"  # each key-value group is [its query heads, key, value]; groups are split
    gate_up = "gate_up"  # each rank holds its part of gate above its part of up


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    In the names ``{layer}`` stands for the layer's number: in Hugging Face's counted over all
    stages, in Megatron's within the chunk.

    Attributes:
        megatron: its name in the local layer spec; ``{expert}`` is counted over the experts that a
            rank holds.
        hf: names of the Hugging Face tensors.
        layout: how it is made of those, and cut over tensor-parallel ranks.
        shapes: of those tensors, in the letters of :meth:`Architecture.sizes`.
        transformer_engine: its name in the Transformer Engine spec, where that differs.
        expert: number of the expert that it belongs to, counted over all ranks; ``None``: to none.
            Experts are never cut, each lies whole on one rank of the expert-parallel group.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: ParameterLayout
    shapes: tuple[str, ...]
    transformer_engine: str | None = None
    expert: int | None = None

    def of_expert(self, expert: int) -> ParameterRow:
        """This row for one expert; its Hugging Face names keep ``{layer}`` open."""
        names = tuple(name.replace("{expert}", str(expert)) for name in self.hf)
        return replace(self, hf=names, expert=expert)

    def local_names(self, layer: int | None, expert: int | None) -> list[str]:
        """Names under one of which a rank's chunk holds the parameter.

        Args:
            layer: counted within the chunk; ``None`` for a parameter of no layer.
            expert: counted over the experts that the rank holds; ``None`` for no expert's.
        """
        names = (self.megatron, self.transformer_engine)
        return [name.format(layer=layer, expert=expert) for name in names if name]


_ATTENTION = "decoder.layers.{layer}.self_attention"
_MLP = "decoder.layers.{layer}.mlp"
_HF = "model.layers.{layer}"
_HF_EXPERT = f"{_HF}.mlp.experts.{{expert}}"
_QKV_HF = tuple(f"{_HF}.self_attn.{part}_proj" for part in "qkv")

EMBEDDING = ParameterRow(
    "embedding.word_embeddings.weight",
    ("model.embed_tokens.weight",),
    ParameterLayout.vocabulary,
    ("v h",),
)
FINAL_NORM = ParameterRow(
    "decoder.final_layernorm.weight", ("model.norm.weight",), ParameterLayout.replicated, ("h",)
)
OUTPUT = ParameterRow(
    "output_layer.weight", ("lm_head.weight",), ParameterLayout.vocabulary, ("v h",)
)
ATTENTION = (
    ParameterRow(
        "decoder.layers.{layer}.input_layernorm.weight",
        (f"{_HF}.input_layernorm.weight",),
        ParameterLayout.replicated,
        ("h",),
        transformer_engine=f"{_ATTENTION}.linear_qkv.layer_norm_weight",
    ),
    ParameterRow(
        f"{_ATTENTION}.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _QKV_HF),
        ParameterLayout.qkv,
        ("q h", "k h", "k h"),
    ),
    ParameterRow(
        f"{_ATTENTION}.linear_proj.weight",
        (f"{_HF}.self_attn.o_proj.weight",),
        ParameterLayout.row,
        ("h q",),
    ),
)
QKV_BIAS = (
    ParameterRow(
        f"{_ATTENTION}.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV_HF),
        ParameterLayout.qkv,
        ("q", "k", "k"),
    ),
)
QK_NORMS = tuple(
    ParameterRow(
        f"{_ATTENTION}.{part}_layernorm.weight",
        (f"{_HF}.self_attn.{part}_norm.weight",),
        ParameterLayout.replicated,
        ("d",),
    )
    for part in "qk"
)
MLP = (
    ParameterRow(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (f"{_HF}.post_attention_layernorm.weight",),
        ParameterLayout.replicated,
        ("h",),
        transformer_engine=f"{_MLP}.linear_fc1.layer_norm_weight",
    ),
    ParameterRow(
        f"{_MLP}.linear_fc1.weight",
        (f"{_HF}.mlp.gate_proj.weight", f"{_HF}.mlp.up_proj.weight"),
        ParameterLayout.gate_up,
        ("f h", "f h"),
    ),
    ParameterRow(
        f"{_MLP}.linear_fc2.weight", (f"{_HF}.mlp.down_proj.weight",), ParameterLayout.row, ("h f",)
    ),
)
ROUTER = (
    ParameterRow(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (f"{_HF}.post_attention_layernorm.weight",),
        ParameterLayout.replicated,
        ("h",),
    ),
    ParameterRow(
        f"{_MLP}.router.weight",
        (f"{_HF}.mlp.gate.weight",),
        ParameterLayout.replicated,
        ("e h",),
    ),
)
# The local names are SequentialMLP's; Transformer Engine's are TEGroupedMLP's, which has one weight
# an expert too.
EXPERT = (
    ParameterRow(
        f"{_MLP}.experts.local_experts.{{expert}}.linear_fc1.weight",
        (f"{_HF_EXPERT}.gate_proj.weight", f"{_HF_EXPERT}.up_proj.weight"),
        ParameterLayout.gate_up,
        ("m h", "m h"),
        transformer_engine=f"{_MLP}.experts.linear_fc1.weight{{expert}}",
    ),
    ParameterRow(
        f"{_MLP}.experts.local_experts.{{expert}}.linear_fc2.weight",
        (f"{_HF_EXPERT}.down_proj.weight",),
        ParameterLayout.row,
        ("h m",),
        transformer_engine=f"{_MLP}.experts.linear_fc2.weight{{expert}}",
    ),
)
