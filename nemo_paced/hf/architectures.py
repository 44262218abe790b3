"""Hugging Face families as one declarative table: names, shapes and how tensor parallelism cuts.

Import, export and weight refit all walk it, and no other file knows a Hugging Face parameter name.
A family differs from another only in a few switches (bias on q, k and v; norms on q and k), so one
table of rows serves all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nemo_paced.errors import ConfigError


class Layout(Enum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over ranks."""

    replicated = "replicated"
    row = "row"  # columns of the weight (input features) are split
    vocabulary = "vocabulary"  # rows are split after padding to the layout's multiple
    qkv = "qkv"  # [query heads, key, value] a key-value group, groups are split
    gate_up = "gate_up"  # each rank holds its part of gate above its part of up


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter; ``{layer}`` stands for the layer's number, counted over all stages.

    Attributes:
        megatron: its name in the local layer spec.
        transformer_engine: its name in the Transformer Engine spec, where that differs.
        hf: the Hugging Face tensors that it is made of.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    transformer_engine: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron


_ATTENTION = "decoder.layers.{layer}.self_attention"
_MLP = "decoder.layers.{layer}.mlp"
_HF = "model.layers.{layer}"
_QKV_HF = tuple(f"{_HF}.self_attn.{part}_proj" for part in "qkv")

_EMBEDDING = Row(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.vocabulary
)
_FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.replicated)
_OUTPUT = Row("output_layer.weight", ("lm_head.weight",), Layout.vocabulary)
_QKV_BIAS = Row(
    f"{_ATTENTION}.linear_qkv.bias", tuple(f"{name}.bias" for name in _QKV_HF), Layout.qkv
)
_QK_NORMS = tuple(
    Row(
        f"{_ATTENTION}.{part}_layernorm.weight",
        (f"{_HF}.self_attn.{part}_norm.weight",),
        Layout.replicated,
    )
    for part in "qk"
)
_LAYER = (
    Row(
        "decoder.layers.{layer}.input_layernorm.weight",
        (f"{_HF}.input_layernorm.weight",),
        Layout.replicated,
        transformer_engine=f"{_ATTENTION}.linear_qkv.layer_norm_weight",
    ),
    Row(f"{_ATTENTION}.linear_qkv.weight", tuple(f"{n}.weight" for n in _QKV_HF), Layout.qkv),
    Row(f"{_ATTENTION}.linear_proj.weight", (f"{_HF}.self_attn.o_proj.weight",), Layout.row),
    Row(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (f"{_HF}.post_attention_layernorm.weight",),
        Layout.replicated,
        transformer_engine=f"{_MLP}.linear_fc1.layer_norm_weight",
    ),
    Row(
        f"{_MLP}.linear_fc1.weight",
        (f"{_HF}.mlp.gate_proj.weight", f"{_HF}.mlp.up_proj.weight"),
        Layout.gate_up,
    ),
    Row(f"{_MLP}.linear_fc2.weight", (f"{_HF}.mlp.down_proj.weight",), Layout.row),
)


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart."""

    qkv_bias: bool = False  # default where config.json does not say (`attention_bias`)
    qk_norm: bool = False


FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "LlamaForCausalLM": Family(),
}


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of one model, read from its ``config.json``.

    Attributes:
        vocab_size: rows of its embedding (which may exceed the tokenizer's highest id).
        rope_scaling: ``None`` or the ``llama3`` parameters.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_base: float
    rope_scaling: dict[str, Any] | None
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @staticmethod
    def from_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
        """Read a Hugging Face configuration.

        Raises:
            ConfigError: an architecture, activation or rope scaling that is not supported, or a
                key that is not there.
        """
        name = (config.get("architectures") or ["?"])[0]
        if name not in FAMILIES:
            raise ConfigError(
                f"{where}: architecture {name} is not supported; choose of {', '.join(FAMILIES)}"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(
                f"{where}: hidden_act {config['hidden_act']!r}: only silu is supported"
            )
        if config.get("use_sliding_window"):
            raise ConfigError(f"{where}: use_sliding_window is true: not supported")
        if config.get("mlp_bias"):
            raise ConfigError(f"{where}: mlp_bias is true: not supported")
        _require(config, _REQUIRED, where)
        family = FAMILIES[name]
        heads = config["num_attention_heads"]
        rope_base, rope_scaling = _rope(config, where)
        return Architecture(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            tied=config.get("tie_word_embeddings", False),
            qkv_bias=_qkv_bias(config, family, where),
            qk_norm=family.qk_norm,
        )

    def check_layout(self, tensor: int, pipeline: int, *, prefix: str = "model") -> None:
        """Refuse a layout that does not divide the model, naming key, value and model."""
        for size, of in (
            (self.num_heads, "attention heads"),
            (self.num_kv_heads, "key-value heads"),
            (self.ffn_hidden_size, "MLP columns"),
        ):
            if size % tensor:
                raise ConfigError(
                    f"{prefix}.tensor_model_parallel_size is {tensor}, which does not divide the "
                    f"{size} {of} of this {self.name}; choose a divisor of "
                    f"{self.num_heads} and {self.num_kv_heads}, or use pipeline parallelism"
                )
        if self.num_layers % pipeline:
            raise ConfigError(
                f"{prefix}.pipeline_model_parallel_size is {pipeline}, which does not divide the "
                f"{self.num_layers} layers of this {self.name}"
            )

    def rows(self) -> Iterator[tuple[Row, int | None]]:
        """Every Megatron parameter of the whole model with its layer, in one fixed order."""
        yield _EMBEDDING, None
        layer_rows: tuple[Row, ...] = _LAYER
        if self.qkv_bias:
            layer_rows += (_QKV_BIAS,)
        if self.qk_norm:
            layer_rows += _QK_NORMS
        for layer in range(self.num_layers):
            for row in layer_rows:
                yield row, layer
        yield _FINAL_NORM, None
        if not self.tied:
            yield _OUTPUT, None

    def hf_shapes(self, row: Row) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors of a row."""
        h, q, kv = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        if row.layout is Layout.vocabulary:
            return [(self.vocab_size, h)]
        if row.layout is Layout.qkv:
            tail = () if row is _QKV_BIAS else (h,)
            return [(size, *tail) for size in (q, kv, kv)]
        if row.layout is Layout.gate_up:
            return [(self.ffn_hidden_size, h)] * 2
        if row.layout is Layout.row:
            return [(h, q if "linear_proj" in row.megatron else self.ffn_hidden_size)]
        return [(self.head_dim,) if row in _QK_NORMS else (h,)]


def _require(config: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} is missing")


def _qkv_bias(config: dict[str, Any], family: Family, where: str) -> bool:
    bias = bool(config.get("attention_bias", family.qkv_bias))
    if bias and not family.qkv_bias:
        raise ConfigError(f"{where}: attention_bias is true: not supported for this architecture")
    return bias


def _rope(config: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or the older two keys."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return float(base), None
    if kind != "llama3":
        raise ConfigError(
            f"{where}: rope scaling {kind!r} is not supported; default and llama3 are"
        )
    _require(parameters, _LLAMA3, f"{where}: rope scaling llama3")
    return float(base), parameters
