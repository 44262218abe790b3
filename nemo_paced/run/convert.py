"""Conversion of Hugging Face directories to Megatron checkpoints and back, on the CPU.

It runs on one or several ranks.

A rank holds its own shards and at most one file of the export beside them, never the whole model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nemo_paced.config import ModelConfig, PacedConfig, Precision
from nemo_paced.errors import ConfigError
from nemo_paced.hf import export_weights
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import PacedGPTModel, build_chunks
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import Parallel
from nemo_paced.run import checkpoint
from nemo_paced.run.checkpoint_files import find_checkpoint
from nemo_paced.run.progress import progress_bar

logger = logging.getLogger(__name__)
LOG_EVERY_S = 10.0


def import_hf(config: PacedConfig, hf_dir: Path, directory: Path) -> None:
    """Write the weights of ``hf_dir`` as a checkpoint that any layout can read; collective.

    Args:
        config: ``model`` is the layout that converts, ``trainer.precision`` what is written.

    Raises:
        ConfigError: an unsupported architecture, or ranks that do not fit the layout.
        CheckpointError: ``directory`` is not empty, or ``hf_dir`` is damaged.
    """
    with _model(config, hf_dir, config.trainer.compute_precision) as (chunks, parallel):
        export_weights.check_new_directory(directory, parallel)
        with _progress(f"reading {hf_dir.name}", parallel) as progress:
            load_hf_weights(chunks, hf_dir, parallel, progress=progress)
        checkpoint.save_model(directory, chunks, hf_dir, parallel)
    logger.info("written: %s", directory)


def export_hf(config: PacedConfig, source: Path, out_dir: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face directory; collective.

    Args:
        config: ``model`` is the layout that converts, whatever layout wrote the checkpoint.
        source: a checkpoint directory, or a run directory (its newest checkpoint).

    Raises:
        ConfigError: ranks that do not fit the layout.
        CheckpointError: there is no checkpoint, it cannot be read, or ``out_dir`` is not empty.
    """
    directory = find_checkpoint(source)
    hf_dir = directory / checkpoint.HF_FOLDER
    with _model(config, hf_dir, _dtype(directory)) as (chunks, parallel):
        export_weights.check_new_directory(out_dir, parallel)
        checkpoint.load_model(directory, chunks)
        with _progress(f"writing {out_dir.name}", parallel) as progress:
            export_weights.export_hf(chunks, hf_dir, out_dir, parallel, progress=progress)
    logger.info("exported %s to %s", directory, out_dir)


def check_ranks(config: PacedConfig) -> None:
    """Check that a conversion has exactly the ranks of one copy of the model.

    Raises:
        ConfigError: more ranks, which would hold copies, or fewer.
    """
    model = config.model
    if model.context_parallel_size > 1:
        raise ConfigError(
            f"model.context_parallel_size is {model.context_parallel_size}: a conversion computes "
            "nothing, and its ranks would hold copies; set it to 1"
        )
    dense = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    needed = max(dense, model.expert_layout_size)
    if config.world_size != needed:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices is {config.world_size}, and the layout that "
            f"converts has {needed} ranks (tensor {model.tensor_model_parallel_size} x pipeline "
            f"{model.pipeline_model_parallel_size}, expert {model.expert_model_parallel_size}): "
            f"others would hold copies; set trainer.devices={needed}, or split the model further"
        )


@contextmanager
def _model(
    config: PacedConfig, hf_dir: Path, precision: Precision
) -> Iterator[tuple[list[PacedGPTModel], Parallel]]:
    check_ranks(config)
    # nothing is computed: stages are whole, sequence parallelism is set as experts ask for it
    layout: ModelConfig = replace(
        config.model,
        virtual_pipeline_model_parallel_size=1,
        sequence_parallel=config.model.tensor_model_parallel_size > 1,
    )
    parallel = groups.initialize(
        layout, accelerator="cpu", timeout_s=config.training.collective_timeout_s
    )
    if parallel.world_size != config.world_size:
        raise ConfigError(
            f"{parallel.world_size} ranks were started, and trainer.num_nodes x trainer.devices is "
            f"{config.world_size}: set trainer.devices to the ranks of a node"
        )
    try:
        yield build_chunks(load_hf_config(hf_dir), layout, parallel, precision=precision), parallel
    finally:
        groups.shutdown()


@contextmanager
def _progress(what: str, parallel: Parallel) -> Iterator[Callable[[int, int], None]]:
    """Context with a function of (tensors done, tensors in all): draws a bar, or logs lines."""
    enabled = parallel.rank == 0
    bar = progress_bar(enabled=enabled)
    task = bar.add_task(what, total=None, note="")
    began = said = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if enabled and bar.disable and now - said > LOG_EVERY_S:
            said = now
            left = (now - began) / done * (total - done)
            logger.info("%s: %d of %d tensors, %.0f s left", what, done, total, left)

    with bar:
        yield advance


def _dtype(directory: Path) -> Precision:
    """The precision that the weights were written in."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(directory))
    dtype = str(tensors["embedding.word_embeddings.weight"].dtype)
    return Precision.bf16 if dtype == "torch.bfloat16" else Precision.fp32
