"""Builds what a rank trains with: student, teacher, and the step between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.errors import ConfigError
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import PacedGPTModel, build_gpt, load_hf_config
from nemo_paced.hf.tokenizer import tokenizer_vocab_size
from nemo_paced.parallel import Parallel
from nemo_paced.rollout.refit import write_weights
from nemo_paced.rollout.weight_source import MegatronWeightSource
from nemo_paced.teacher.cache import TopKCache, model_identity
from nemo_paced.teacher.model import SignalKind, Teacher
from nemo_paced.training import checkpoint
from nemo_paced.training.output_layer import DivergenceOutputLayer
from nemo_paced.training.step import Step
from nemo_paced.training.student import Student, build_student

if TYPE_CHECKING:
    from nemo_paced.training.driver import Driver

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Models:
    """Student, teacher and step function of one rank, with what is collective over the student."""

    config: PacedConfig
    parallel: Parallel
    student: Student
    step: Step

    def push_weights(self, driver: Driver | None, step: int) -> None:
        """Send the student's weights to the rollout server; every rank takes part."""
        folder = driver.sampler.transfer_dir if driver is not None else None
        source = MegatronWeightSource(self.student.gpt, self.parallel)
        write_weights(source, folder, version=step)
        if driver is not None:
            driver.sampler.send_weights()

    def save(self, run_dir: Path, *, step: int, consumed_problems: int, skipped: int) -> None:
        """Write a checkpoint; collective."""
        checkpoint.save(
            run_dir,
            self.student,
            checkpoint.RunState(
                step=step,
                consumed_problems=consumed_problems,
                skipped_steps=skipped,
                config=to_dict(self.config),
                layout=(self.parallel.tp_size, self.parallel.pp_size),
            ),
            self.parallel,
            hf_dir=Path(self.config.student.hf_path),
            keep=self.config.exp_manager.checkpoint_callback_params.save_top_k,
        )


def build_models(
    config: PacedConfig,
    parallel: Parallel,
    *,
    load_weights: Callable[[PacedGPTModel, Path, Parallel], None] = load_hf_weights,
) -> Models:
    """Load both Hugging Face checkpoints into this rank's shards.

    Args:
        load_weights: fills a model from its directory; a dry run has no weights to read.
    """
    student_dir, teacher_dir = Path(config.student.hf_path), Path(config.teacher_hf_path)
    student_hf, teacher_hf = load_hf_config(student_dir), load_hf_config(teacher_dir)
    # both heads are cut alike, so that student and teacher shards hold the same columns
    rows = max(student_hf["vocab_size"], teacher_hf["vocab_size"])

    def gpt_of(hf_config: dict[str, Any], directory: Path) -> Any:
        gpt = build_gpt(
            hf_config,
            config.model,
            parallel,
            precision=config.trainer.compute_precision,
            vocab_size_hint=rows,
        )
        load_weights(gpt, directory, parallel)
        return gpt

    student_gpt = gpt_of(student_hf, student_dir)
    if parallel.is_last_stage:
        DivergenceOutputLayer.install(student_gpt)
    student = build_student(student_gpt, config, parallel)
    vocab_size = tokenizer_vocab_size(student_dir)
    signal = SignalKind(config.teacher.top_k, config.loss.temperature, vocab_size)
    if signal.top_k > vocab_size:
        raise ConfigError(
            f"teacher.top_k is {signal.top_k} and the vocabulary has {vocab_size} tokens: it must "
            "be at most that, or 0 for the exact loss"
        )
    teacher = Teacher(gpt_of(teacher_hf, teacher_dir), parallel, signal)
    logger.info("teacher signal: %d bytes a response token", teacher.bytes_per_token)
    cache = None
    if config.teacher.cache_dir is not None:
        identity = {
            **asdict(signal),
            "teacher": model_identity(teacher_dir),
            "precision": config.trainer.compute_precision.value,
        }
        cache = TopKCache(Path(config.teacher.cache_dir), identity)
    step = Step(
        student=student,
        teacher=teacher,
        model=config.model,
        loss=config.loss,
        teacher_micro_batch_size=config.teacher.micro_batch_size or config.model.micro_batch_size,
        vocab_size=vocab_size,
        parallel=parallel,
        cache=cache,
    )
    return Models(config, parallel, student, step)
