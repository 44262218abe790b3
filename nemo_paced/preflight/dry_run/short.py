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

import json
import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_paced.config import Fp8Config, OptimBackend, PacedConfig, TeacherPlacement
from nemo_paced.data.packing import TrainItem
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.preflight.dry_run.world import (
    RANDOM,
    as_rank,
    chosen_ranks,
    failures_named,
    refuse_separate_teacher,
    stage_of,
    tokens,
)
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.training.setup import Models, build_models

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


def shortened(config: PacedConfig, folder: Path) -> PacedConfig:
    """A configuration for a dry run: models of few layers, on CPU tensors, no teacher cache.

    Args:
        folder: takes the model directories.

    Raises:
        ConfigError: the teacher has ranks of its own.
    """
    refuse_separate_teacher(config)
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
    began, stage = time.monotonic(), stage_of(config, rank)
    with failures_named(rank, stage), as_rank(config, rank) as parallel:
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
            parameters=sum(p.numel() for gpt in models.student.chunks for p in gpt.parameters()),
            problems=len(items),
            seconds=time.monotonic() - began,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _items(config: PacedConfig, vocab_size: int) -> list[TrainItem]:
    """Short training items, enough for a pipeline's steady state unless a batch has fewer."""
    model = config.model
    micro_batches = model.pipeline_model_parallel_size + 1
    count = config.data_parallel_size * model.micro_batch_size * micro_batches
    return [
        TrainItem(
            response_id=f"r{index}",
            problem_id=f"p{index}",
            student_prompt_ids=tokens(PROMPT, index, vocab_size),
            teacher_prompt_ids=tokens(2 * PROMPT, index, vocab_size),
            response_ids=tokens(RESPONSE, index + 1, vocab_size),
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
