"""What decides the figures of ``snr``, and its samples: those of anything else are not reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_paced.config import PacedConfig, ResponseSource, to_dict
from nemo_paced.data.prompts import Prompts
from nemo_paced.files import digest
from nemo_paced.records import PassRate, Problem
from nemo_paced.rollout.sampler import served_dtype
from nemo_paced.rollout.sampling import SamplingSettings
from nemo_paced.snr.plan import is_hf, what_is_measured
from nemo_paced.teacher.cache import model_identity

CERTIFICATE = ("certificate", "certificate_problems", "max_kl")  # of teacher.fp8: a check alone


def measurement_identity(
    config: PacedConfig,
    model: Path,
    problems: Sequence[Problem],
    prompts: Prompts,
    rows: Sequence[PassRate],
) -> dict[str, Any]:
    """Names what the figures depend on, as JSON values.

    Args:
        problems: that are measured.
        rows: of the table that bins them.
    """
    kind, responses = what_is_measured(config)
    snr, fp8 = to_dict(config.snr), to_dict(config.teacher.fp8)
    counts = [(r.id, float(r.effective_correct), float(r.effective_rollouts)) for r in rows]
    asked = [(prompts.student(p), prompts.teacher(p)) for p in problems]
    sampled = responses is ResponseSource.rollouts
    return {
        **{name: value for name, value in snr.items() if name != "pass_rates"},
        "divergence": kind.value,
        "responses": responses.value,
        "loss": to_dict(replace(config.loss, chunk_size=None)),
        "model": _named(model),
        "teacher": model_identity(Path(config.teacher_hf_path)),
        "teacher_top_k": config.teacher.top_k,
        "teacher_fp8": {name: value for name, value in fp8.items() if name not in CERTIFICATE},
        "references": to_dict(config.references),
        "sampling": _sampling(config) if sampled else None,
        "max_response_length": config.data.max_response_length,
        "problems": digest([asdict(problem) for problem in problems]),
        "prompts": digest([prompts.stop_token_ids, asked]),
        "pass_rates": digest(counts),
        "precision": config.trainer.compute_precision.value,
    }


def rollout_purpose(
    config: PacedConfig, model: Path, problems: Sequence[Problem], prompts: Prompts
) -> str:
    """Names what the samples depend on: a store that was filled by another model or with other
    settings or prompts holds none of them. (Grading is not part of it: nothing asks for it.)"""
    asked = [(p.id, prompts.student(p)) for p in problems]
    return f"snr {digest([_named(model), _sampling(config), prompts.stop_token_ids, asked])}"


def sampling_settings(config: PacedConfig) -> SamplingSettings:
    """One response a problem, as training samples it."""
    return SamplingSettings(
        num_samples=1,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_tokens=config.data.max_response_length,
    )


def _sampling(config: PacedConfig) -> dict[str, Any]:
    dtype = "" if config.rollout.endpoints else served_dtype(config)
    return {**asdict(sampling_settings(config)), "seed": config.model.seed, "dtype": dtype}


def _named(model: Path) -> str:
    """A checkpoint's path is enough: what a step has written does not change."""
    return model_identity(model) if is_hf(model) else str(model)
