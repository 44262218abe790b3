"""What both dry runs share: one rank of the full world on fake groups, and random weights."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import Parallel
from nemo_paced.teacher.build import WeightReader

logger = logging.getLogger(__name__)


def chosen_ranks(config: PacedConfig) -> list[int]:
    """The first ranks of the first, the second and the last pipeline stage, each once.

    Stages are the slowest axis of Megatron's order of ranks.
    """
    stages = config.model.pipeline_model_parallel_size
    a_stage = config.world_size // stages
    return [a_stage * stage for stage in sorted({0, min(1, stages - 1), stages - 1})]


def stage_of(config: PacedConfig, rank: int) -> int:
    """A rank's pipeline stage."""
    return rank * config.model.pipeline_model_parallel_size // config.world_size


def refuse_separate_teacher(config: PacedConfig) -> None:
    """Refuse a teacher with ranks of its own.

    Raises:
        ConfigError: the teacher has some.
    """
    if config.teacher.separate_ranks:
        raise ConfigError(
            "train --dry-run runs one world of ranks, and teacher.placement is separate: run it "
            "once for the student (placement=colocated with its ranks), once for the teacher"
        )


@contextmanager
def as_rank(config: PacedConfig, rank: int) -> Iterator[Parallel]:
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


@contextmanager
def failures_named(rank: int, stage: int) -> Iterator[None]:
    """Context whose failures say which rank of the job failed.

    Raises:
        PacedError: the rank failed; its traceback is in the log.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, PacedError):
            raise
        logger.exception("rank %d", rank)
        raise PacedError(
            f"dry run: rank {rank} (pipeline stage {stage}) failed: {type(error).__name__}: "
            f"{error}; the traceback is above"
        ) from error


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


def tokens(count: int, first: int, vocab_size: int) -> tuple[int, ...]:
    """Consecutive token ids, for a prompt or a response that means nothing."""
    return tuple((first + position) % vocab_size for position in range(count))
