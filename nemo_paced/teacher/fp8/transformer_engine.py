"""The frozen teacher in FP8 through Transformer Engine, with Megatron's own switches.

What Megatron does once they are set (its ``fp8_utils.get_fp8_context``): each decoder layer but the
first and last few is built under ``fp8_model_init`` with the recipe, so that its weights exist in
FP8 only (built without gradients, no high-precision copy and no transposed copy is kept), and run
under ``fp8_autocast``. Values loaded into such a weight are quantised as they are copied.

This module adds to those switches: weights are built on the GPU, as Transformer Engine quantises
nowhere else; attention stays in BF16 (``fp8_dot_product_attention`` off, Megatron's default); and
the tensor-wise recipe, whose forward GEMM sums with Hopper's fast accumulation, is told not to
(``use_split_accumulator``). Block-wise scaling never uses that mode, and MXFP8's GPUs have none.

Delayed scaling is not offered: its scales come from earlier batches, so that a teacher's answer
would depend on what it was asked before.

``tests/unit/teacher/test_transformer_engine_contract.py`` checks the calls against the sources of
the oldest and the newest Transformer Engine; none of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.gpt import GPTModel

from nemo_paced.config import Fp8Recipe
from nemo_paced.errors import ConfigError

OLDEST = "2.9"  # the first release with all the names that are called here


def transformer_config_fields(recipe: Fp8Recipe, bf16_layers: tuple[int, int]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a teacher in FP8.

    Args:
        bf16_layers: how many layers at the start and at the end of the whole model stay out of FP8.
    """
    return {
        "fp8": "e4m3",
        "fp8_recipe": recipe.value,
        "fp8_param": True,
        "first_last_layers_bf16": any(bf16_layers),
        "num_layers_at_start_in_bf16": bf16_layers[0],
        "num_layers_at_end_in_bf16": bf16_layers[1],
        "use_cpu_initialization": False,
    }


def check_bf16_layers(bf16_layers: tuple[int, int], *, num_layers: int, pp_size: int) -> None:
    """Refuse what Megatron refuses: more BF16 layers at an end than a pipeline stage has.

    Raises:
        ConfigError: names the setting.
    """
    for name, count in zip(("start", "end"), bf16_layers, strict=True):
        if count > num_layers // pp_size:
            raise ConfigError(
                f"teacher.fp8.num_layers_at_{name}_in_bf16 is {count}, and Megatron keeps no more "
                f"than one pipeline stage's {num_layers // pp_size} layers in BF16 under "
                "Transformer Engine: choose fewer, or teacher.fp8.backend=torch"
            )


def check_supported(recipe: Fp8Recipe) -> None:
    """Refuse a recipe that this GPU, its CUDA or its Transformer Engine cannot run.

    Raises:
        ConfigError: with Transformer Engine's reason, or where it lacks a name that ``OLDEST`` has.
    """
    try:
        from transformer_engine.pytorch import (
            is_fp8_available,
            is_fp8_block_scaling_available,
            is_mxfp8_available,
        )
    except ImportError as error:
        raise ConfigError(
            f"teacher.fp8 needs Transformer Engine {OLDEST} or later ({error}): install it, or set "
            "teacher.fp8.backend=torch"
        ) from error
    if recipe is Fp8Recipe.mxfp8:
        supported, reason = is_mxfp8_available(return_reason=True)
    elif recipe is Fp8Recipe.blockwise:
        supported, reason = is_fp8_block_scaling_available(return_reason=True)
    else:
        supported, reason = is_fp8_available(return_reason=True)
    if not supported:
        raise ConfigError(f"teacher.fp8.recipe is {recipe.value}: {reason}")


def sum_in_full_precision(gpt: GPTModel) -> None:
    """Run a tensor-wise model's FP8 layers without fast accumulation.

    Megatron builds the recipe by itself and has no switch for this, so each layer's forward gets an
    autocast of its own: the innermost one counts.
    """
    from transformer_engine.common.recipe import Float8CurrentScaling, Format, MMParams

    recipe = Float8CurrentScaling(
        fp8_format=Format.E4M3,
        fp8_dpa=False,
        fp8_gemm_fprop=MMParams(use_split_accumulator=True),
    )
    for layer in gpt.decoder.layers:
        if not is_first_last_bf16_layer(gpt.config, layer.layer_number - 1):
            layer.forward = _under_recipe(layer.forward, recipe)


def _under_recipe(forward: Callable[..., Any], recipe: Any) -> Callable[..., Any]:
    from transformer_engine.pytorch import autocast

    def run(*args: Any, **kwargs: Any) -> Any:
        with autocast(enabled=True, recipe=recipe):
            return forward(*args, **kwargs)

    return run
