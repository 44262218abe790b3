"""Construction of Megatron-Core's GPTModel for a Hugging Face configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    get_transformer_layer_offset,
)

from nemo_paced.config import ModelConfig, Precision, Recompute
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture, padded_vocab_size
from nemo_paced.hf.attention import CoreAttention
from nemo_paced.hf.experts import experts_config
from nemo_paced.hf.rows import ParameterLayout, ParameterRow
from nemo_paced.parallel.groups import Parallel

logger = logging.getLogger(__name__)

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm of [..., h] as Hugging Face computes it: in float32, cast, then scaled.

    Megatron's wrapper of torch's norm refuses sequence parallelism, which needs no more than a mark
    on the weight: Megatron then sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class PacedGPTModel(GPTModel):
    """A chunk of layers of a GPTModel that knows which Hugging Face model it is."""

    architecture: Architecture

    @cached_property
    def first_layer(self) -> int:
        """Number of this chunk's first layer, counted from 0 over all stages."""
        return self.decoder.layers[0].layer_number - 1

    @property
    def ep_group(self) -> torch.distributed.ProcessGroup:
        return self.pg_collection.ep

    @property
    def experts_per_rank(self) -> int:
        """Experts of a layer that each rank of the expert-parallel group holds."""
        assert self.architecture.experts is not None, "asked of a model without experts"
        return self.architecture.experts.count // self.ep_group.size()

    def expert_owner(self, expert: int) -> int:
        """The rank of the expert-parallel group that holds an expert."""
        return expert // self.experts_per_rank


def build_chunks(
    hf_config: dict[str, Any],
    model: ModelConfig,
    parallel: Parallel,
    *,
    precision: Precision,
    vocab_size_hint: int | None = None,
    transformer_engine: bool | None = None,
    device: torch.device | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[PacedGPTModel]:
    """Build this rank's pipeline stage of a model, with uninitialised values: load weights next.

    Args:
        model: the layout; ``virtual_pipeline_model_parallel_size`` is the number of chunks.
        vocab_size_hint: pad the vocabulary as if it had at least so many rows, so that student and
            teacher are cut alike.
        transformer_engine: whether layers are Transformer Engine's and not Megatron's local ones;
            ``None``: where it is installed and this rank has a GPU.
        device: where the values lie; ``None``: this rank's device.
        overrides: fields of Megatron's TransformerConfig that differ from a trained model's.

    Returns:
        The chunks of layers that this rank holds, in their order in the model. The last chunk of
        the last stage returns logits [b, s, v/tp] when called without labels.

    Raises:
        ConfigError: an unsupported architecture, or a layout that does not divide it.
    """
    architecture = Architecture.from_config(hf_config)
    architecture.check_layout(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        virtual=model.virtual_pipeline_model_parallel_size,
        expert=model.expert_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
    )
    on_gpu = parallel.device.type == "cuda"
    if transformer_engine is None:
        transformer_engine = on_gpu and has_transformer_engine()
        if parallel.rank == 0 and on_gpu:
            _tell_layers(transformer_engine)
    config = replace(
        _transformer_config(architecture, model, precision),
        **fusions(on_gpu=on_gpu, transformer_engine=transformer_engine),
        **overrides or {},
    )
    rows = max(architecture.vocab_size, vocab_size_hint or 0)
    count = model.virtual_pipeline_model_parallel_size
    chunks = []
    for number in range(count):
        gpt = PacedGPTModel(
            config,
            _block_spec(architecture, config, parallel, number, transformer_engine),
            vocab_size=padded_vocab_size(rows, model),
            max_sequence_length=architecture.max_positions,
            pre_process=parallel.is_first_stage and number == 0,
            post_process=parallel.is_last_stage and number == count - 1,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_base,
            pg_collection=parallel.groups,
            vp_stage=number if count > 1 else None,
        )
        gpt.architecture = architecture
        _mark_parallel(gpt)
        if architecture.rope_scaling:
            _scale_rope(gpt, architecture.rope_scaling)
        chunks.append(gpt.to(device or parallel.device))
    return chunks


def local_parameters(
    chunks: Sequence[PacedGPTModel],
) -> Iterator[tuple[torch.nn.Parameter, ParameterRow, int | None]]:
    """This rank's parameters, each with its row of the table and its layer, chunk by chunk.

    Layers are counted from 0 over all stages; ``None`` for a parameter of no layer. With tied
    embeddings and several stages the last one holds a copy of the embedding too.
    """
    for gpt in chunks:
        yield from _parameters_of(gpt)


def _parameters_of(
    gpt: PacedGPTModel,
) -> Iterator[tuple[torch.nn.Parameter, ParameterRow, int | None]]:
    named = dict(gpt.named_parameters())
    seen = set()
    first, count = gpt.first_layer, len(gpt.decoder.layers)
    for row, layer in gpt.architecture.rows():
        if layer is not None and not first <= layer < first + count:
            continue
        if row.expert is not None and gpt.expert_owner(row.expert) != gpt.ep_group.rank():
            continue
        local_layer = None if layer is None else layer - first
        local_expert = None if row.expert is None else row.expert % gpt.experts_per_rank
        for name in row.local_names(local_layer, local_expert):
            if name in named:
                seen.add(name)
                yield named[name], row, layer
        is_embedding = row.megatron == "embedding.word_embeddings.weight"
        if is_embedding and gpt.architecture.tied and "output_layer.weight" in named:
            seen.add("output_layer.weight")
            yield named["output_layer.weight"], row, layer
    assert seen == named.keys(), f"parameters without a row: {sorted(named.keys() - seen)}"


def _transformer_config(
    architecture: Architecture, model: ModelConfig, precision: Precision
) -> TransformerConfig:
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        qk_layernorm=architecture.qk_norm,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,  # losses are sums; divided once, globally
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        **_interleaving(model),
        context_parallel_size=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.bf16,
        **_recompute(model),
        use_cpu_initialization=True,
        perform_initialization=False,  # every value is loaded
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # Megatron asks for Apex; see student/model.py
        persist_layer_norm=False,
        **experts_config(architecture, model),
    )


def fusions(*, on_gpu: bool, transformer_engine: bool) -> dict[str, bool]:
    """Fields of Megatron's ``TransformerConfig`` for operations that run as one kernel.

    SwiGLU and the residual additions are compiled by torch. The rotary embedding's kernel is
    Transformer Engine's; without it Megatron asks the GPU for the lengths of packed sequences, four
    times a layer.
    """
    return {
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": transformer_engine,
    }


def _interleaving(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` for several chunks a pipeline stage.

    Messages between stages then overlap with computation. Batched messages would also be wrong at
    two stages, where the next stage is also the previous one, so that the sends and receives of one
    batch would be mixed up.
    """
    count = model.virtual_pipeline_model_parallel_size
    if count == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": count,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _recompute(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` for the activations that backward recomputes."""
    if model.recompute_granularity is Recompute.none:
        return {}
    if model.recompute_granularity is Recompute.selective:
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": model.recompute_num_layers,
    }


def _block_spec(
    architecture: Architecture,
    config: TransformerConfig,
    parallel: Parallel,
    chunk: int,
    transformer_engine: bool,
) -> TransformerBlockSubmodules:
    """Spec of one chunk's layers: Transformer Engine's, or Megatron's local ones."""
    make = _transformer_engine_layer if transformer_engine else _local_layer
    first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=parallel.pp_rank)
    count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=parallel.pp_rank)
    sparse = architecture.experts.layers if architecture.experts else ()
    return TransformerBlockSubmodules(
        layer_specs=[
            make(config, config.num_moe_experts if layer in sparse else None)
            for layer in range(first, first + count)
        ],
        layer_norm=LayerNormImpl if transformer_engine else RMSNorm,
    )


@cache
def _tell_layers(transformer_engine: bool) -> None:
    """Log, once for all models, whose layers a job on GPUs computes in."""
    if transformer_engine:
        logger.info("layers: Transformer Engine %s", version("transformer-engine"))
    else:
        logger.warning(
            "layers: Megatron's local ones, as Transformer Engine is not installed: no fused norms "
            "and no FP8 through it"
        )


def _transformer_engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
    )


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    assert layer.module is TransformerLayer, "the spec of another Megatron-Core than the pinned one"
    submodules = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if num_experts is not None:
        # checkpoints have Transformer Engine's keys, where this norm is a layer of its own
        del submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def _mark_parallel(gpt: PacedGPTModel) -> None:
    """Tell Megatron which parameters tensor-parallel ranks hold parts of, and which copies.

    Megatron marks them while initialising, which is left out here as every value is loaded. Without
    the marks the gradient norm (hence the clipping) would count one rank's parts alone. Experts are
    marked as reduced over their own data-parallel group even at expert-parallel size 1: Megatron
    does so only above 1, and under tensor parallelism the ranks have seen different parts of the
    sequence.
    """
    for parameter, row, _ in _parameters_of(gpt):
        if row.layout is not ParameterLayout.replicated:
            for name, value in (
                ("tensor_model_parallel", True),
                ("partition_dim", 1 if row.layout is ParameterLayout.row else 0),
                ("partition_stride", 1),
            ):
                setattr(parameter, name, value)
        if row.expert is not None:
            parameter.allreduce = False  # type: ignore[attr-defined]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed.

    Raises:
        ConfigError: it is installed and cannot be imported: training on without it would be slower
            and compute in other kernels, in silence.
    """
    if find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # of a missing library an OSError, of an unfit one a RuntimeError
        raise ConfigError(
            f"Transformer Engine is installed and cannot be imported ({error}): build its PyTorch "
            f"extension against this torch {torch.__version__} (pip install --no-build-isolation "
            "transformer-engine[pytorch]), or uninstall it"
        ) from error
    return True


def _scale_rope(gpt: GPTModel, scaling: dict[str, Any]) -> None:
    """Apply Llama 3's RoPE scaling with the model's own factors (Megatron fixes three of them)."""
    inv_freq = gpt.rotary_pos_emb.inv_freq
    factor, old_length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * torch.pi / inv_freq
    smooth = ((old_length / wavelength - low) / (high - low)).clamp(0, 1)
    gpt.rotary_pos_emb.inv_freq = (1 - smooth) * inv_freq / factor + smooth * inv_freq
