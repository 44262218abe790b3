"""Identity of an ``snr`` measurement and of its samples: all settings and inputs that decide them.

Figures and samples of another identity are not reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_paced.config import PacedConfig, ResponseSource, to_dict
from nemo_paced.data.prompts import Prompts
from nemo_paced.files import digest
from nemo_paced.records import PassRate, Problem
from nemo_paced.rollout.sampling import SamplingSettings
from nemo_paced.rollout.served import served_dtype
from nemo_paced.snr.plan import is_hf, what_is_measured
from nemo_paced.teacher.cache import model_identity

# settings of teacher.fp8 that only check the teacher, and change no figure
CERTIFICATE = ("certificate", "certificate_problems", "max_kl")


def measurement_identity(
    config: PacedConfig,
    model: Path,
    problems: Sequence[Problem],
    prompts: Prompts,
    rows: Sequence[PassRate],
) -> dict[str, Any]:
    """Everything that a measurement's figures depend on, as JSON values.

    Args:
        model: the student that is measured, a checkpoint or a Hugging Face directory.
        problems: those that are measured.
        rows: the pass-rate table that sorts them into bins.
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
        "problems": digest([problem.content() for problem in problems]),
        "prompts": digest([prompts.stop_token_ids, asked]),
        "pass_rates": digest(counts),
        "precision": config.trainer.compute_precision.value,
    }


def rollout_purpose(
    config: PacedConfig, model: Path, problems: Sequence[Problem], prompts: Prompts
) -> str:
    """Key of the samples in the rollout store, which names all that they depend on.

    Samples of another model, or with other settings or prompts, have another key. How responses are
    graded is not part of it, as ``snr`` grades none.
    """
    asked = [(p.id, prompts.student(p)) for p in problems]
    return f"snr {digest([_named(model), _sampling(config), prompts.stop_token_ids, asked])}"


def sampling_settings(config: PacedConfig) -> SamplingSettings:
    """Settings that sample one response a problem, as training samples it."""
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
    """Identity of a model; a checkpoint's path is enough, as what a step wrote does not change."""
    return model_identity(model) if is_hf(model) else str(model)
