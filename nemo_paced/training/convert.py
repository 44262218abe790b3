"""Hugging Face directories to Megatron checkpoints and back, in one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from nemo_paced import parallel as parallel_module
from nemo_paced.config import ModelConfig, PacedConfig, Precision
from nemo_paced.errors import CheckpointError
from nemo_paced.hf import export_weights
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_gpt, load_hf_config
from nemo_paced.training import checkpoint

logger = logging.getLogger(__name__)


def import_hf(config: PacedConfig, hf_dir: Path, directory: Path) -> None:
    """Write the weights of ``hf_dir`` as a checkpoint that any layout can read."""
    parallel = parallel_module.initialize(ModelConfig(), accelerator="cpu")
    try:
        model = replace(config.model, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        hf_config = load_hf_config(hf_dir)
        gpt = build_gpt(hf_config, model, parallel, precision=config.trainer.compute_precision)
        load_hf_weights(gpt, hf_dir, parallel)
        checkpoint.save_model(directory, gpt, hf_dir, parallel)
    finally:
        parallel_module.shutdown()
    logger.info("written: %s", directory)


def export_hf(source: Path, out_dir: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face directory.

    Args:
        source: a checkpoint directory, or a run directory (its newest checkpoint).

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    directory = find_checkpoint(source)
    hf_dir = directory / checkpoint.HF_FOLDER
    parallel = parallel_module.initialize(ModelConfig(), accelerator="cpu")
    try:
        gpt = build_gpt(
            load_hf_config(hf_dir), ModelConfig(), parallel, precision=_dtype(directory)
        )
        checkpoint.load_model(directory, gpt)
        export_weights.export_hf(gpt, hf_dir, out_dir, parallel)
    finally:
        parallel_module.shutdown()
    logger.info("exported %s to %s", directory, out_dir)


def find_checkpoint(source: Path) -> Path:
    """``source`` itself if it is a checkpoint, else the newest one of the run directory."""
    if (source / "metadata.json").exists():  # Megatron's; a run directory may hold an export hf/
        return source
    found = checkpoint.checkpoints(source)
    if not found:
        raise CheckpointError(
            f"{source} is no checkpoint and holds none: give RUN/checkpoints/step_... or a run "
            "directory"
        )
    return found[-1]


def _dtype(directory: Path) -> Precision:
    """The precision that the weights were written in."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_tensors_metadata(str(directory))
    dtype = str(tensors["embedding.word_embeddings.weight"].dtype)
    return Precision.bf16 if dtype == "torch.bfloat16" else Precision.fp32
