"""One step of a whole job in one process: every group and shape of the layout, two layers a stage.

The process takes the part of one rank of the full world on torch's fake process groups, whose
collectives and sends return at once with whatever the buffers hold. So what is exercised is real:
all process groups, both models at their true widths (only the number of layers is cut), Megatron's
schedule with its sends and receives, the teacher's signal, each stage's loss, gradient reduction,
clipping, the optimizer, and the gathering of weights for the rollout server. What is computed means
nothing, and is not looked at; a collective whose ranks disagree among themselves is not noticed,
and experts get the tokens that their own rank routes.

Not covered: that ranks reach each other (``preflight``), memory and speed (``plan``), attention and
kernels of a GPU, more than a short sequence, checkpoints, the rollout server.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_paced.config import Fp8Config, OptimBackend, PacedConfig, TeacherPlacement
from nemo_paced.data.packing import TrainItem
from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.teacher.build import WeightReader
from nemo_paced.training.setup import Models, build_models

logger = logging.getLogger(__name__)

LAYERS_A_STAGE = 2
PROMPT, RESPONSE = 8, 8  # tokens


@dataclass(frozen=True, slots=True)
class DryRank:
    """What a dry run built and ran as one rank of the job.

    Attributes:
        rank: of the full world.
        stage: the rank's pipeline stage.
        layers, parameters: of the rank's part of the student.
        problems: in the global batch that was run.
        seconds: wall time.
        peak_bytes: most resident memory of this process so far.
    """

    rank: int
    stage: int
    layers: int
    parameters: int
    problems: int
    seconds: float
    peak_bytes: int


def dry_run(config: PacedConfig, folder: Path) -> list[DryRank]:
    """Run a training step as the first rank of the first, a middle and the last pipeline stage.

    Args:
        folder: takes two model directories without weights.

    Raises:
        ConfigError: the teacher has ranks of its own.
        PacedError: a rank failed; its traceback is in the log.
    """
    short = shortened(config, folder)
    return [_run_rank(short, rank) for rank in chosen_ranks(config)]


def chosen_ranks(config: PacedConfig) -> list[int]:
    """The first ranks of the first, the second and the last pipeline stage, each once.

    Stages are the slowest axis of Megatron's order of ranks.
    """
    stages = config.model.pipeline_model_parallel_size
    a_stage = config.world_size // stages
    return [a_stage * stage for stage in sorted({0, min(1, stages - 1), stages - 1})]


def shortened(config: PacedConfig, folder: Path) -> PacedConfig:
    """A configuration for a dry run: models of few layers, on CPU tensors, no teacher cache.

    Args:
        folder: takes the model directories.

    Raises:
        ConfigError: the teacher has ranks of its own.
    """
    if config.teacher.separate_ranks:
        raise ConfigError(
            "train --dry-run runs one world of ranks, and teacher.placement is separate: run it "
            "once for the student (placement=colocated with its ranks), once for the teacher"
        )
    both = (config.model, config.teacher_model)
    stages = math.lcm(
        *(m.pipeline_model_parallel_size * m.virtual_pipeline_model_parallel_size for m in both)
    )
    student = _short_model(stages, Path(config.student.hf_path), folder / "student")
    teacher = ""
    if config.teacher.hf_path:
        teacher = _short_model(stages, Path(config.teacher.hf_path), folder / "teacher")
    own = replace(config.teacher, hf_path=teacher, cache_dir=None)
    if own.placement is TeacherPlacement.cached:  # what would fill the cache is run each time
        own.placement = TeacherPlacement.colocated
    if own.fp8.enabled:  # PyTorch's GEMM runs on a CPU; there are fewer layers to keep in BF16
        own = replace(own, fp8=Fp8Config(enabled=True))
    torch_adam = replace(config.model.optim, backend=OptimBackend.torch)
    return replace(
        config,
        trainer=replace(config.trainer, accelerator="cpu"),
        model=replace(config.model, optim=torch_adam),
        student=replace(config.student, hf_path=student),
        teacher=own,
    )


def _short_model(stages: int, source: Path, target: Path) -> str:
    """Make a model directory: ``config.json`` of fewer layers, links to other small files.

    Args:
        stages: a number that the layers must divide into.
    """
    target.mkdir()
    hf_config = load_hf_config(source)
    whole = hf_config["num_hidden_layers"]
    layers = stages * max(1, min(LAYERS_A_STAGE, whole // stages))
    cut = {
        key: value[:layers]  # lists of one entry a layer (`layer_types`)
        for key, value in hf_config.items()
        if isinstance(value, list) and len(value) == whole
    }
    (target / "config.json").write_text(
        json.dumps({**hf_config, **cut, "num_hidden_layers": layers})
    )
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and "safetensors" not in path.name:
            (target / path.name).symlink_to(path.resolve())
    return str(target)


def _run_rank(config: PacedConfig, rank: int) -> DryRank:
    began = time.monotonic()
    stages = config.model.pipeline_model_parallel_size
    stage = rank * stages // config.world_size
    try:
        with _as_rank(config, rank) as parallel:
            models = build_models(config, parallel, weights=RANDOM)
            items = _items(config, models.step.vocab_size)
            for each in config.stages:  # their divergences and responses differ
                models.step(items, each, config.model.optim.lr)
            _update(models)
            models.student.sync_parameters()
            for _ in MegatronWeightSource(models.student.chunks, parallel):  # what a refit gathers
                pass
            return DryRank(
                rank=rank,
                stage=stage,
                layers=sum(len(gpt.decoder.layers) for gpt in models.student.chunks),
                parameters=sum(
                    p.numel() for gpt in models.student.chunks for p in gpt.parameters()
                ),
                problems=len(items),
                seconds=time.monotonic() - began,
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, PacedError):
            raise
        logger.exception("rank %d", rank)
        raise PacedError(
            f"dry run: rank {rank} (pipeline stage {stage}) failed: {type(error).__name__}: "
            f"{error}; the traceback is above"
        ) from error


@contextmanager
def _as_rank(config: PacedConfig, rank: int) -> Iterator[Parallel]:
    """Make this process one rank of the full world, on fake process groups."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=config.world_size
    )
    try:
        yield groups.initialize(config.model, accelerator="cpu")
    finally:
        groups.shutdown()
        gc.collect()  # hooks and models refer to each other: the next rank needs the memory


def _random_model(
    chunks: Sequence[PacedGPTModel],
    hf_dir: Path,
    parallel: Parallel,
    *,
    on_loaded: Callable[[torch.nn.Parameter], None] | None = None,
) -> None:
    """Fill a model with random weights; its inputs from other stages will be random too."""
    for gpt in chunks:
        gpt.decoder.register_forward_pre_hook(_receive_values)
        with torch.no_grad():
            for parameter in list(gpt.parameters()):
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0, 0.02)
                if on_loaded is not None:
                    on_loaded(parameter)


def _receive_values(decoder: Any, _: object) -> None:
    """Forward pre-hook that fills the activations received from another stage with noise.

    A router must find tokens that differ, or experts would go without any.
    """
    if decoder.input_tensor is not None:
        with torch.no_grad():
            decoder.input_tensor.normal_()


def _random_head(
    architecture: Architecture,
    hf_dir: Path,
    parallel: Parallel,
    *,
    padded_vocab: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Random weights of an LM head, ``[v/tp, h]``."""
    shape = padded_vocab // parallel.tp_size, architecture.hidden_size
    return torch.randn(shape, dtype=dtype, device=parallel.device).mul_(0.02)


RANDOM = WeightReader(_random_model, _random_head)


def _tokens(count: int, first: int, vocab_size: int) -> tuple[int, ...]:
    return tuple((first + position) % vocab_size for position in range(count))


def _items(config: PacedConfig, vocab_size: int) -> list[TrainItem]:
    """Short training items, enough for a pipeline's steady state unless a batch has fewer."""
    model = config.model
    micro_batches = model.pipeline_model_parallel_size + 1
    count = config.data_parallel_size * model.micro_batch_size * micro_batches
    return [
        TrainItem(
            response_id=f"r{index}",
            problem_id=f"p{index}",
            student_prompt_ids=_tokens(PROMPT, index, vocab_size),
            teacher_prompt_ids=_tokens(2 * PROMPT, index, vocab_size),
            response_ids=_tokens(RESPONSE, index + 1, vocab_size),
            token_weight=1.0,
        )
        for index in range(min(count, model.global_batch_size))
    ]


def _update(models: Models) -> None:
    """One step of the optimizer, on gradients of zero.

    The gradients of the step may hold NaN, since received values are arbitrary here; the optimizer
    would skip them.
    """
    models.student.zero_grad()
    assert models.student.update() is not None, "gradients of zero are finite"
