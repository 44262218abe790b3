"""Building of what a rank trains with: student, teacher, and the step between them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.model import build_chunks
from nemo_paced.hf.tokenizer import tokenizer_vocab_size
from nemo_paced.parallel.groups import Parallel
from nemo_paced.run import checkpoint
from nemo_paced.run.checkpoint_files import RunState
from nemo_paced.student.model import Student, build_student
from nemo_paced.student.output_layer import DivergenceOutputLayer
from nemo_paced.student.step import Step
from nemo_paced.teacher.build import HF_FILES, WeightReader, build_teacher, common_rows, cut_of

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


def build_models(
    config: PacedConfig,
    parallel: Parallel,
    *,
    certify_fp8: bool = False,
    weights: WeightReader = HF_FILES,
) -> Models:
    """Load both Hugging Face checkpoints into this rank's shards.

    Args:
        certify_fp8: first load a teacher that is to run in FP8 unquantised, to be compared.
        weights: reads the weights out of the Hugging Face directories.
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
