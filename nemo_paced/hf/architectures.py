"""The shape of a Hugging Face model, read from its ``config.json``.

A family differs from another only in a few switches (bias on q, k and v; norms on q and k; experts
in place of MLPs), so one table of rows (``rows.py``) serves all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_paced.config import ModelConfig
from nemo_paced.errors import ConfigError
from nemo_paced.hf import rows
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.rows import ParameterRow


@dataclass(frozen=True, slots=True)
class Family:
    """Switches in which one model family differs from another.

    Attributes:
        qkv_bias: whether q, k and v have a bias where ``config.json`` has no ``attention_bias``.
        qk_norm: whether q and k of each head pass a norm.
        experts: whether layers have experts in place of an MLP.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False


FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "LlamaForCausalLM": Family(),
}


# keys of config.json without which a model is refused; those of experts; those of llama3's scaling
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_REQUIRED_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts layers of a model.

    Attributes:
        count: experts of a layer, over all ranks.
        per_token: how many of them a token is sent to.
        ffn_hidden_size: intermediate features of one expert.
        normalize: whether the weights of a token's experts are made to sum to 1.
        layers: which layers have experts, from 0; the others have an MLP.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalize: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of one model, read from its ``config.json``.

    Attributes:
        name: the class in ``architectures``, a key of ``FAMILIES``.
        ffn_hidden_size: intermediate features of an MLP (of a layer without experts).
        num_kv_heads: key-value heads, each shared by num_heads / num_kv_heads query heads.
        vocab_size: rows of its embedding (which may exceed the tokenizer's highest id).
        max_positions: the longest sequence that the model was made for.
        rope_base: RoPE's theta.
        rope_scaling: ``None`` or the ``llama3`` parameters.
        tied: whether the LM head is the embedding.
        experts: ``None``: every layer has an MLP.
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
    experts: Experts | None = None

    @staticmethod
    def from_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
        """The architecture that a parsed ``config.json`` describes.

        Args:
            where: name of the file, for the messages.

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
            experts=_experts(config, where) if family.experts else None,
        )

    @staticmethod
    def read(hf_dir: str | Path, key: str) -> Architecture:
        """Read the ``config.json`` of a directory; its weights need not be there.

        Args:
            key: the setting that names the directory, for the message.

        Raises:
            ConfigError: no such file, no JSON, or not supported.
        """
        if not str(hf_dir):
            raise ConfigError(f"{key} is empty: give a Hugging Face model directory")
        try:
            config = load_hf_config(hf_dir)
        except ConfigError as error:
            raise ConfigError(f"{key} is {str(hf_dir)!r}: {error}") from error
        return Architecture.from_config(config, str(Path(hf_dir) / "config.json"))

    @property
    def q_width(self) -> int:
        """Output features of the query projection, over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output features of the key projection, and of the value projection, over all heads."""
        return self.num_kv_heads * self.head_dim

    def check_layout(
        self,
        tensor: int,
        pipeline: int,
        *,
        virtual: int = 1,
        expert: int = 1,
        sequence_parallel: bool = False,
        prefix: str = "model",
    ) -> None:
        """Refuse a layout that does not divide the model, naming key, value and model.

        Args:
            tensor, pipeline: the parallel sizes.
            virtual: chunks of layers a pipeline stage.
            expert: the expert-parallel size; not looked at for a model without experts.
            sequence_parallel: needed by experts beside tensor parallelism: each rank routes its own
                part of the sequence, else all of them would route and train on all of it.

        Raises:
            ConfigError: names the key under ``prefix``.
        """
        divided = [(self.num_heads, "attention heads"), (self.num_kv_heads, "key-value heads")]
        if self.has_mlp:
            divided.append((self.ffn_hidden_size, "MLP columns"))
        for size, of in divided:
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
        if self.num_layers % (pipeline * virtual):
            raise ConfigError(
                f"{prefix}.virtual_pipeline_model_parallel_size is {virtual}, which does not "
                f"divide the {self.num_layers // pipeline} layers of a pipeline stage of this "
                f"{self.name}"
            )
        if self.experts is None:
            return
        if self.experts.count % expert:
            raise ConfigError(
                f"{prefix}.expert_model_parallel_size is {expert}, which does not divide the "
                f"{self.experts.count} experts of this {self.name}"
            )
        if tensor > 1 and not sequence_parallel:
            raise ConfigError(
                f"{prefix}.sequence_parallel is false with {prefix}.tensor_model_parallel_size "
                f"{tensor}, and this {self.name} has experts: set {prefix}.sequence_parallel=true"
            )

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has an MLP and no experts."""
        return self.experts is None or len(self.experts.layers) < self.num_layers

    def rows(self) -> Iterator[tuple[ParameterRow, int | None]]:
        """Every Megatron parameter of the whole model with its layer, in one fixed order.

        Layers are counted from 0 over all stages; ``None`` for a parameter of no layer.
        """
        yield rows.EMBEDDING, None
        attention: tuple[ParameterRow, ...] = rows.ATTENTION
        if self.qkv_bias:
            attention += rows.QKV_BIAS
        if self.qk_norm:
            attention += rows.QK_NORMS
        sparse: tuple[ParameterRow, ...] = rows.ROUTER
        for expert in range(self.experts.count if self.experts else 0):
            sparse += tuple(row.of_expert(expert) for row in rows.EXPERT)
        for layer in range(self.num_layers):
            has_experts = self.experts is not None and layer in self.experts.layers
            for row in attention + (sparse if has_experts else rows.MLP):
                yield row, layer
        yield rows.FINAL_NORM, None
        if not self.tied:
            yield rows.OUTPUT, None

    def sizes(self) -> dict[str, int]:
        """The size that each letter of ``Row.shapes`` stands for, over all ranks."""
        return {
            "v": self.vocab_size,
            "h": self.hidden_size,
            "q": self.q_width,
            "k": self.kv_width,
            "d": self.head_dim,
            "f": self.ffn_hidden_size,
            "e": self.experts.count if self.experts else 0,
            "m": self.experts.ffn_hidden_size if self.experts else 0,
        }

    def hf_shapes(self, row: ParameterRow) -> list[tuple[int, ...]]:
        """Whole shapes of a row's Hugging Face tensors, in the order of ``row.hf``."""
        sizes = self.sizes()
        return [tuple(sizes[letter] for letter in shape.split()) for shape in row.shapes]


def _experts(config: dict[str, Any], where: str) -> Experts:
    """The mixture-of-experts layers that a ``config.json`` describes.

    Some releases of transformers write ``num_experts`` as ``num_local_experts``.
    """
    _require(config, _REQUIRED_OF_EXPERTS, where)
    count = config.get("num_experts", config.get("num_local_experts"))
    if not count:
        raise ConfigError(f"{where}: num_experts is missing")
    dense, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if every < 1:
        raise ConfigError(f"{where}: decoder_sparse_step is {every}: it must be at least 1")
    layers = range(config["num_hidden_layers"])
    return Experts(
        count=count,
        per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize=config.get("norm_topk_prob", False),
        layers=frozenset(i for i in layers if i not in dense and (i + 1) % every == 0),
    )


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
    """RoPE's base and scaling, from ``rope_parameters`` (transformers 5) or the older two keys."""
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


def padded_vocab_size(rows: int, model: ModelConfig) -> int:
    """Rows of the padded embedding over all tensor-parallel ranks, which hold equally many.

    Args:
        rows: of the embedding before padding.
    """
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return -(-rows // multiple) * multiple
