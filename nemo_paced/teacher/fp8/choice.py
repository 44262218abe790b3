"""The frozen teacher in FP8: which backend and recipe, and how such a model is loaded.

A model in FP8 is never made from one in BF16 that lies beside it: weights are quantised as they are
read. ``linear.py`` is the backend on PyTorch alone, ``transformer_engine.py`` the other one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.fp8_utils import get_fp8_align_size

from nemo_paced.config import Fp8Backend, Fp8Config, Fp8Recipe, Precision
from nemo_paced.errors import ConfigError
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import PacedGPTModel, has_transformer_engine
from nemo_paced.parallel.groups import Parallel
from nemo_paced.teacher.fp8 import transformer_engine as fp8_transformer_engine
from nemo_paced.teacher.fp8.linear import LinearQuantizer

logger = logging.getLogger(__name__)

# the CUDA compute capability from which a recipe runs, and the one below which (None: no end)
_CAPABILITIES = {
    Fp8Recipe.rowwise: ((8, 9), None),
    Fp8Recipe.tensorwise: ((8, 9), None),
    Fp8Recipe.blockwise: ((9, 0), None),
    Fp8Recipe.mxfp8: ((10, 0), (12, 0)),
}
BLOCK_TOKENS = 128  # of Transformer Engine's block-wise recipe
Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fp8Choice:
    """The settings of ``teacher.fp8`` with every ``auto`` decided.

    Attributes:
        bf16_layers: how many layers at the start and at the end of the whole model stay out of FP8.
    """

    backend: Fp8Backend
    recipe: Fp8Recipe
    bf16_layers: tuple[int, int]

    @property
    def uses_transformer_engine(self) -> bool:
        return self.backend is Fp8Backend.transformer_engine


def choose_fp8(
    settings: Fp8Config,
    *,
    precision: Precision,
    device: torch.device,
    num_layers: int,
    pp_size: int,
) -> Fp8Choice | None:
    """Decide backend and recipe for this rank's device; ``None`` where FP8 is off.

    Args:
        precision: the run's, of activations and of all that is not in FP8.
        num_layers: of the teacher, over all of its ``pp_size`` pipeline stages.

    Raises:
        ConfigError: what was asked for is not there, this GPU cannot run it, or no layer would be
            in FP8.
    """
    if not settings.enabled:
        return None
    on_gpu = device.type == "cuda"
    if on_gpu and precision is not Precision.bf16:
        raise ConfigError(
            f"teacher.fp8.enabled is true and trainer.precision is {precision.value}: FP8 on a GPU "
            "hands its results on in BF16; set trainer.precision=bf16"
        )
    choice = resolve(
        settings,
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        transformer_engine=on_gpu and has_transformer_engine(),
    )
    _check_layers(choice.bf16_layers, num_layers)
    if choice.uses_transformer_engine:
        fp8_transformer_engine.check_supported(choice.recipe)
        fp8_transformer_engine.check_bf16_layers(
            choice.bf16_layers, num_layers=num_layers, pp_size=pp_size
        )
    return choice


def resolve(
    settings: Fp8Config, *, capability: Capability | None, transformer_engine: bool
) -> Fp8Choice:
    """Decide FP8 backend and recipe from a GPU's compute capability, without looking at the GPU.

    Args:
        capability: (major, minor); ``None``: a CPU.
        transformer_engine: whether it can be used: it is installed, and there is a GPU.

    Raises:
        ConfigError: the backend is not there, or the GPU lacks the recipe.
    """
    backend, recipe = settings.backend, settings.recipe
    if backend is Fp8Backend.auto:
        rows = recipe is Fp8Recipe.rowwise or not transformer_engine
        backend = Fp8Backend.torch if rows else Fp8Backend.transformer_engine
    if backend is Fp8Backend.transformer_engine and not transformer_engine:
        raise ConfigError(
            "teacher.fp8.backend is transformer_engine, which needs a GPU and the package "
            "transformer-engine[pytorch]: install it, or set teacher.fp8.backend=torch"
        )
    available = [Fp8Recipe.rowwise]
    if backend is Fp8Backend.transformer_engine:
        available = [Fp8Recipe.mxfp8, Fp8Recipe.blockwise, Fp8Recipe.tensorwise]  # finest first
    runs = [r for r in available if capability is None or _runs(r, capability)]
    if recipe is Fp8Recipe.auto and runs:
        recipe = runs[0]
    if recipe not in runs:
        raise ConfigError(_cannot_run(backend, recipe, runs, capability))
    ends = settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16
    return Fp8Choice(backend, recipe, ends)


def sequence_multiple(choice: Fp8Choice | None, *, tp_size: int, sequence_parallel: bool) -> int:
    """The number of tokens that a teacher's padded sequence length must be a multiple of.

    Transformer Engine's GEMMs want 16 tokens on each rank, 32 for MXFP8 (Megatron's
    ``get_fp8_align_size``). Before its ranks gather their parts of a sequence they quantise them,
    block-wise only where each holds whole blocks (up to release 2.13: "is_quantizable").
    ``torch._scaled_mm`` takes any number, as do all layers in BF16.
    """
    if choice is None or not choice.uses_transformer_engine:
        return 1
    multiple = get_fp8_align_size(choice.recipe.value)
    if not sequence_parallel:
        return multiple
    if choice.recipe is Fp8Recipe.blockwise:
        multiple = BLOCK_TOKENS
    return multiple * tp_size


def load_teacher_gpt(
    build: Callable[..., list[PacedGPTModel]],
    hf_dir: Path,
    parallel: Parallel,
    choice: Fp8Choice | None,
    *,
    quantized: bool = True,
    read: Callable[..., None] = load_hf_weights,
) -> PacedGPTModel:
    """Build a teacher and load its weights, in FP8 where ``choice`` says so.

    Args:
        build: ``build_chunks`` with all its arguments bound but ``transformer_engine``, ``device``
            and ``overrides``.
        quantized: ``False``: the same layers in full precision, to compare with.
        read: fills the model's parameters, as ``load_hf_weights``.

    Raises:
        ConfigError: a layer has features that FP8 cannot take.
        CheckpointError: the files do not fit.
    """
    if choice is None:
        (gpt,) = build()
        read([gpt], hf_dir, parallel)
        return gpt
    if not quantized:
        (gpt,) = build(transformer_engine=choice.uses_transformer_engine)
        read([gpt], hf_dir, parallel)
        return gpt
    if choice.uses_transformer_engine:
        return _load_transformer_engine(build, hf_dir, parallel, choice, read)
    (gpt,) = build(transformer_engine=False, device=torch.device("cpu"))
    quantizer = LinearQuantizer(gpt, choice.bf16_layers, parallel.device)
    read([gpt], hf_dir, parallel, on_loaded=quantizer)
    return gpt.to(parallel.device)


@torch.no_grad()  # with gradients on, transposed copies of the weights would be kept
def _load_transformer_engine(
    build: Callable[..., list[PacedGPTModel]],
    hf_dir: Path,
    parallel: Parallel,
    choice: Fp8Choice,
    read: Callable[..., None],
) -> PacedGPTModel:
    fields = fp8_transformer_engine.transformer_config_fields(choice.recipe, choice.bf16_layers)
    (gpt,) = build(transformer_engine=True, overrides=fields)
    read([gpt], hf_dir, parallel)
    if choice.recipe is Fp8Recipe.tensorwise:
        fp8_transformer_engine.sum_in_full_precision(gpt)
    return gpt


def _check_layers(bf16_layers: tuple[int, int], num_layers: int) -> None:
    start, end = bf16_layers
    if start + end >= num_layers:
        raise ConfigError(
            f"teacher.fp8.num_layers_at_start_in_bf16 {start} and num_layers_at_end_in_bf16 {end} "
            f"leave none of the teacher's {num_layers} layers in FP8: choose fewer, or set "
            "teacher.fp8.enabled=false"
        )


def _runs(recipe: Fp8Recipe, capability: Capability) -> bool:
    first, end = _CAPABILITIES[recipe]
    return first <= capability and (end is None or capability < end)


def _cannot_run(
    backend: Fp8Backend, recipe: Fp8Recipe, runs: list[Fp8Recipe], capability: Capability | None
) -> str:
    where = "a CPU" if capability is None else "compute capability {}.{}".format(*capability)
    names = ", ".join(r.value for r in runs)
    remedy = f"choose {names} or auto" if runs else "set teacher.fp8.enabled=false"
    lacks = f"teacher.fp8.recipe is {recipe.value}, which backend {backend.value} lacks on {where}"
    if recipe in _CAPABILITIES:
        first, end = _CAPABILITIES[recipe]
        below = f", below {end[0]}.{end[1]}" if end else ""
        lacks += f" (it needs {first[0]}.{first[1]} or later{below})"
    return f"{lacks}: {remedy}"
