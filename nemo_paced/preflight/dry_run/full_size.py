"""One step of a recipe at its full size on fake tensors: shapes, and peak memory beside the plan's.

Widths, layers, layout and lengths are the recipe's; models are read from ``config.json`` alone. As
in the short dry run, one process takes the part of one rank after another on torch's fake process
groups. Its tensors are fake too: they have shapes and sizes and no memory, so a 70B model needs
none. What each phase of the step holds at most is counted storage by storage, with what a GPU's
kernels keep in place of a CPU's (``gpu_kernels.py``), and shown beside what ``plan`` says of the
same rank. A wrong shape ends in an error; a wrong plan shows as a difference.

The batch is short, the rows in it are full: as many as fill the pipeline once. The plan's figures
are for that batch. Routers give all experts alike. A teacher in FP8 has PyTorch's layers.

Not covered: whether the kernels keep what the stand-ins keep, communication buffers, workspaces, an
allocator's holes, keys and values that pass between context-parallel ranks, time.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch

from nemo_paced.config import (
    Fp8Backend,
    Fp8Recipe,
    OptimBackend,
    PacedConfig,
    ResponseSource,
    TeacherPlacement,
)
from nemo_paced.data.packing import TrainItem
from nemo_paced.hf.architectures import Architecture
from nemo_paced.parallel.groups import Parallel
from nemo_paced.preflight.dry_run.fake_tensors import like_a_gpu, replaced
from nemo_paced.preflight.dry_run.storages import Storages
from nemo_paced.preflight.dry_run.world import (
    RANDOM,
    as_rank,
    chosen_ranks,
    failures_named,
    refuse_separate_teacher,
    stage_of,
)
from nemo_paced.sizing.memory import Memory, stage_memory
from nemo_paced.sizing.shapes import (
    Accelerator,
    student_layout,
    teacher_plan,
    work_of,
)
from nemo_paced.student.model import Student
from nemo_paced.student.optimizer import chained, complete_state
from nemo_paced.student.step import Step
from nemo_paced.teacher.source import TeacherSource
from nemo_paced.training.setup import Models, build_models

logger = logging.getLogger(__name__)

TOLERANCE = 0.1  # of what plan says
HELD = "held before the step"
TEACHER = "teacher's forward"
STUDENT = "student's forward and backward"
OPTIMIZER = "optimizer"
SHORTEST = 2  # tokens of a prompt and response that fill a packed row
GPU = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Phase:
    """Most bytes of a rank in a phase of the step, counted and as planned."""

    name: str
    counted: float
    planned: float

    @property
    def ratio(self) -> float:
        return self.counted / self.planned

    @property
    def agrees(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class FullRank:
    """What a rank of the recipe at its full size holds.

    Attributes:
        rank: of the full world.
        stage: the rank's pipeline stage.
        layers: of the rank's part of the student.
        problems: in the global batch that was run.
        operations: operators of the steps, one of each training stage.
        seconds: wall time.
        phases: in the order of the step.
        more_signal: bytes of the teacher's signal that the recipe's whole batch has beyond this
            one's, as planned.
    """

    rank: int
    stage: int
    layers: int
    problems: int
    operations: int
    seconds: float
    phases: tuple[Phase, ...]
    more_signal: float


def full_run(config: PacedConfig) -> Iterator[FullRank]:
    """Run a training step as the first rank of the first, a middle and the last pipeline stage.

    Raises:
        ConfigError: the teacher has ranks of its own, or a ``config.json`` cannot be read.
        PacedError: a rank failed; its traceback is in the log.
    """
    refuse_separate_teacher(config)
    for rank in chosen_ranks(config):
        yield _run_rank(config, rank)


def _on_fakes(config: PacedConfig) -> PacedConfig:
    """The configuration with what a CPU has: PyTorch's Adam and FP8, no cache on disk.

    A teacher that comes for its phase alone is made to come and go by :func:`_trained_before`.
    """
    teacher = replace(config.teacher, cache_dir=None, placement=TeacherPlacement.colocated)
    if teacher.fp8.enabled:
        teacher.fp8 = replace(teacher.fp8, backend=Fp8Backend.torch, recipe=Fp8Recipe.rowwise)
    optim = replace(config.model.optim, backend=OptimBackend.torch)
    return replace(config, model=replace(config.model, optim=optim), teacher=teacher)


def _run_rank(config: PacedConfig, rank: int) -> FullRank:
    began, stage = time.monotonic(), stage_of(config, rank)
    items, storages = _items(config), Storages()
    logger.info("rank %d of %d (stage %d) on fake tensors ...", rank, config.world_size, stage)
    with (
        failures_named(rank, stage),
        as_rank(config, rank) as parallel,
        like_a_gpu(),
        storages,
        _phases_of(storages),
    ):
        models, step = _trained_before(config, replace(parallel, device=GPU))
        gc.collect()
        storages.enter_phase(HELD)
        storages.operations = 0
        for each in config.stages:  # their divergences and responses differ
            batch = _sampled(items) if each.responses is ResponseSource.rollouts else items
            assert step(batch, each, config.model.optim.lr).finite, "the optimizer has run"
        layers = sum(len(gpt.decoder.layers) for gpt in models.student.chunks)
    planned = _memory(config, items, stage)
    return FullRank(
        rank=rank,
        stage=stage,
        layers=layers,
        problems=len(items),
        operations=storages.operations,
        seconds=time.monotonic() - began,
        phases=tuple(
            Phase(name, storages.peaks[name], size) for name, size in _by_phase(planned).items()
        ),
        more_signal=max(0.0, _memory(config, None, stage).signal - planned.signal),
    )


def _trained_before(config: PacedConfig, parallel: Parallel) -> tuple[Models, Step]:
    """Both models as after a first step: Adam has its moments, and one kernel for all of them.

    A teacher that is on its devices for its phase alone is loaded in it and freed behind it.
    """
    models = build_models(_on_fakes(config), parallel, weights=RANDOM)
    complete_state(models.student.optimizer)
    for each in chained(models.student.optimizer):
        if each.optimizer is not None:
            for group in each.optimizer.param_groups:
                group["fused"] = True
    step = models.step
    if config.teacher.placement is not TeacherPlacement.colocated:
        step.teacher.release()
        step = replace(step, teacher=replace(step.teacher, keep_loaded=False))
    return models, step


@contextmanager
def _phases_of(storages: Storages) -> Iterator[None]:
    """Context in which a step tells its phases to ``storages``."""
    signal, update = TeacherSource.signal, Student.update

    @wraps(signal)
    def teacher_phase(*args: Any, **kwargs: Any) -> Any:
        storages.enter_phase(TEACHER)
        result = signal(*args, **kwargs)
        storages.enter_phase(STUDENT)
        return result

    @wraps(update)
    def optimizer_phase(student: Student) -> float | None:
        storages.enter_phase(OPTIMIZER)
        return update(student)

    with ExitStack() as stack:
        stack.enter_context(replaced(TeacherSource, "signal", teacher_phase))
        stack.enter_context(replaced(Student, "update", optimizer_phase))
        yield


def _items(config: PacedConfig) -> list[TrainItem]:
    """Items of the longest prompts and responses, which fill the pipeline once.

    A packed row takes as many of the longest as it holds, and a short one that fills it.
    """
    model, data = config.model, config.data
    longest = data.max_prompt_length + data.max_response_length
    rows = config.data_parallel_size * (model.pipeline_model_parallel_size + 1)
    lengths = [(data.max_prompt_length, data.max_response_length)] * rows
    lengths *= max(1, model.packed_sequence_size // longest) if model.packed_sequence_size else (
        model.micro_batch_size
    )  # fmt: skip
    left = model.packed_sequence_size % longest if model.packed_sequence_size else 0
    if left >= SHORTEST:
        lengths += [(1, min(left - 1, data.max_response_length))] * rows
    return [_item(config, number, *of) for number, of in enumerate(lengths)]


def _item(config: PacedConfig, number: int, prompt: int, response: int) -> TrainItem:
    longer = config.data.max_teacher_prompt_length - config.data.max_prompt_length
    return TrainItem(
        response_id=f"r{number}",
        problem_id=f"p{number}",
        student_prompt_ids=(0,) * prompt,
        teacher_prompt_ids=(0,) * max(1, prompt + longer),
        response_ids=(0,) * response,
        token_weight=1.0,
    )


def _sampled(items: list[TrainItem]) -> list[TrainItem]:
    """The items as a rollout server gives them, with log-probabilities."""
    return [replace(item, server_logprobs=(0.0,) * len(item.response_ids)) for item in items]


def _by_phase(memory: Memory) -> dict[str, float]:
    """Bytes of each phase as ``plan`` counts them."""
    resident = memory.student_phase - memory.activations - memory.loss
    return {
        HELD: resident - memory.signal,
        TEACHER: memory.teacher_phase,
        STUDENT: memory.student_phase,
        OPTIMIZER: resident,
    }


def _memory(config: PacedConfig, items: list[TrainItem] | None, stage: int) -> Memory:
    """What ``plan`` says of a rank of this stage, for these items or the recipe's whole batch."""
    data, layout = config.data, student_layout(config)
    student = Architecture.read(config.student.hf_path, "student.hf_path")
    teacher = Architecture.read(config.teacher_hf_path, "teacher.hf_path")
    work = work_of(
        config,
        mean_prompt=data.max_prompt_length,
        mean_response=data.max_response_length,
        accelerator=Accelerator.gpu,
    )
    if items is None:
        return stage_memory(student, teacher, layout, teacher_plan(config), work, stage)
    work = replace(work, global_batch_size=len(items))
    memory = stage_memory(student, teacher, layout, teacher_plan(config), work, stage)
    longest = work.share(layout) * layout.data * work.response
    own = sum(len(item.response_ids) for item in items) / longest
    return replace(memory, signal=memory.signal * own)
