"""What rollout servers have to be for a configuration: number format, context, key."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_paced.config import PacedConfig, Precision
from nemo_paced.errors import ConfigError
from nemo_paced.hf.directory import context_length
from nemo_paced.serving.api_key import API_KEY_VARIABLE


def served_dtype(config: PacedConfig) -> str:
    """The dtype of the servers that we start: ``rollout.dtype``, else the trainer's precision."""
    if config.rollout.dtype != "auto":
        return config.rollout.dtype
    names = {Precision.fp32: "float32", Precision.bf16: "bfloat16"}
    return names[config.trainer.compute_precision]


def training_length(config: PacedConfig, model_dir: Path, prompt_limit: int) -> int:
    """Longest prompt plus response that a server beside the trainer is asked for, tokens."""
    needed = prompt_limit + config.data.max_response_length
    if not config.trainer.val_check_interval:
        return needed
    return max(needed, prompt_limit + evaluation_length(config, model_dir, prompt_limit))


def evaluation_length(config: PacedConfig, model_dir: Path, prompt_limit: int) -> int:
    """Longest response when held-out problems are sampled, in tokens.

    It is ``evaluation.max_response_length``, or the part of the model's context that the longest
    prompt leaves, if that is less.
    """
    wanted = config.evaluation.max_response_length or config.data.max_response_length
    context = context_length(model_dir)
    return wanted if context is None else max(1, min(wanted, context - prompt_limit))


def given_key() -> str:
    """The API key of the servers of ``rollout.endpoints``, which the environment holds.

    Raises:
        ConfigError: the environment has none.
    """
    key = os.environ.get(API_KEY_VARIABLE, "")
    if not key:
        raise ConfigError(
            f"rollout.endpoints is set but the environment variable {API_KEY_VARIABLE} is not: "
            "export the key that the server was started with"
        )
    return key
