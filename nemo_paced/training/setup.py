"""Builds what a rank trains with: student, teacher, and the step between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.model import build_chunks, load_hf_config
from nemo_paced.hf.tokenizer import tokenizer_vocab_size
from nemo_paced.parallel import Parallel
from nemo_paced.training import checkpoint
from nemo_paced.training.checkpoint_files import RunState
from nemo_paced.training.output_layer import DivergenceOutputLayer
from nemo_paced.training.step import Step
from nemo_paced.training.student import Student, build_student
from nemo_paced.training.teacher_setup import (
    HF_FILES,
    WeightReader,
    build_teacher,
    common_rows,
    cut_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Models:
    """Student, teacher and step function of one rank, with what is collective over the student."""

    config: PacedConfig
    parallel: Parallel
    student: Student
    step: Step

    def save(
        self,
        run_dir: Path,
        *,
        step: int,
        consumed_problems: int,
        skipped: int,
        accuracy: float | None = None,
        background: AsyncCallsQueue | None = None,
    ) -> None:
        """Write a checkpoint; collective.

        Args:
            accuracy: on the validation problems, where they were sampled after this step.
            background: write there; this one is whole after ``checkpoint.finish`` only.
        """
        checkpoint.save(
            run_dir,
            self.student,
            RunState(
                step=step,
                consumed_problems=consumed_problems,
                skipped_steps=skipped,
                config=to_dict(self.config),
                layout=(self.parallel.tp_size, self.parallel.pp_size),
                accuracy=accuracy,
            ),
            self.parallel,
            hf_dir=Path(self.config.student.hf_path),
            keep=self.config.exp_manager.checkpoint_callback_params,
            background=background,
        )


def check_layouts(config: PacedConfig) -> None:
    """Whether both models can be cut as asked; from their ``config.json`` alone.

    Raises:
        ConfigError: a size that does not divide a model, or a key for experts where there are none.
    """
    student, teacher = (
        Architecture.from_config(load_hf_config(path), f"{path}/config.json")
        for path in (config.student.hf_path, config.teacher_hf_path)
    )
    model, teacher_prefix = config.model, "teacher"
    if config.teacher_model == model:
        teacher_prefix = "model"
    for architecture, layout, prefix in (
        (student, model, "model"),
        (teacher, config.teacher_model, teacher_prefix),
    ):
        architecture.check_layout(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            virtual=layout.virtual_pipeline_model_parallel_size,
            expert=layout.expert_model_parallel_size,
            sequence_parallel=layout.sequence_parallel,
            prefix=prefix,
        )
    for architecture, size, key in (
        (student, model.expert_model_parallel_size, "model"),
        (teacher, config.teacher.expert_model_parallel_size, "teacher"),
    ):
        if size > 1 and not architecture.experts:
            raise ConfigError(
                f"{key}.expert_model_parallel_size is {size}, and this {architecture.name} has no "
                "experts: set it to 1 (student and teacher have a key each)"
            )
    if model.moe_aux_loss_coeff and not student.experts:
        raise ConfigError(
            f"model.moe_aux_loss_coeff is {model.moe_aux_loss_coeff}, and the student "
            f"({student.name}) has no experts: set it to 0"
        )


def build_models(
    config: PacedConfig,
    parallel: Parallel,
    *,
    certify_fp8: bool = False,
    weights: WeightReader = HF_FILES,
) -> Models:
    """Load both Hugging Face checkpoints into this rank's shards.

    Args:
        certify_fp8: load a teacher that is to run in FP8 as it is first, to be compared.
    """
    student_dir = Path(config.student.hf_path)
    vocab_size = tokenizer_vocab_size(student_dir)
    # before the student's large buffers: what is wrong with the teacher shows first
    teacher = build_teacher(config, parallel, vocab_size, certify_fp8=certify_fp8, weights=weights)
    chunks = build_chunks(
        load_hf_config(student_dir),
        config.model,
        parallel,
        precision=config.trainer.compute_precision,
        vocab_size_hint=common_rows(config),
    )
    weights.model(chunks, student_dir, parallel)
    if parallel.is_last_stage:
        DivergenceOutputLayer.install(chunks[-1])
    student = build_student(chunks, config, parallel)
    step = Step(
        student=student,
        teacher=teacher,
        cut=cut_of(config.model),
        loss=config.loss,
        vocab_size=vocab_size,
        parallel=parallel,
    )
    return Models(config, parallel, student, step)
