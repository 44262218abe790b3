"""Builds what a rank trains with: student, teacher, and the step between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_paced.config import ModelConfig, PacedConfig, TeacherPlacement, to_dict
from nemo_paced.data.packing import Cut
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.import_weights import load_hf_head, load_hf_weights
from nemo_paced.hf.model import (
    DTYPES,
    PacedGPTModel,
    build_chunks,
    load_hf_config,
    padded_vocab_size,
)
from nemo_paced.hf.tokenizer import tokenizer_vocab_size
from nemo_paced.parallel import Parallel, beside
from nemo_paced.rollout.refit import write_weights
from nemo_paced.rollout.weight_source import MegatronWeightSource
from nemo_paced.teacher.cache import SignalCache, model_identity
from nemo_paced.teacher.fp8 import (
    Fp8Choice,
    choose_fp8,
    load_teacher_gpt,
    sequence_multiple,
)
from nemo_paced.teacher.model import HiddenStates, Teacher
from nemo_paced.teacher.placement import HeldTeacher
from nemo_paced.teacher.signal import SignalKind
from nemo_paced.teacher.source import TeacherSource
from nemo_paced.training import checkpoint
from nemo_paced.training.checkpoint_files import RunState
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
        self.student.sync_parameters()
        source = MegatronWeightSource(self.student.chunks, self.parallel)
        write_weights(source, folder, version=step)
        if driver is not None:
            driver.sampler.send_weights()

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


@dataclass(frozen=True, slots=True)
class WeightReader:
    """Where weights come from: Hugging Face files, but in a dry run.

    Attributes:
        model: as :func:`~nemo_paced.hf.import_weights.load_hf_weights`.
        head: as :func:`~nemo_paced.hf.import_weights.load_hf_head`.
    """

    model: Callable[..., None] = load_hf_weights
    head: Callable[..., torch.Tensor] = load_hf_head


HF_FILES = WeightReader()


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
        vocab_size_hint=_common_rows(config),
    )
    weights.model(chunks, student_dir, parallel)
    if parallel.is_last_stage:
        DivergenceOutputLayer.install(chunks[-1])
    student = build_student(chunks, config, parallel)
    step = Step(
        student=student,
        teacher=teacher,
        cut=_cut(config.model),
        loss=config.loss,
        vocab_size=vocab_size,
        parallel=parallel,
    )
    return Models(config, parallel, student, step)


def build_teacher(
    config: PacedConfig,
    student: Parallel,
    vocab_size: int,
    *,
    certify_fp8: bool = False,
    weights: WeightReader = HF_FILES,
) -> TeacherSource:
    """The teacher in its own layout, and its LM head in the student's.

    Args:
        student: the student's layout.
        vocab_size: the true vocabulary.
    """
    kind = SignalKind(config.teacher.top_k, config.loss.temperature, vocab_size)
    if kind.top_k > vocab_size:
        raise ConfigError(
            f"teacher.top_k is {kind.top_k} and the vocabulary has {vocab_size} tokens: it must "
            "be at most that, or 0 for the exact loss"
        )
    hf_dir = Path(config.teacher_hf_path)
    hf_config = load_hf_config(hf_dir)
    architecture = Architecture.from_config(hf_config, f"{hf_dir}/config.json")
    dtype = DTYPES[config.trainer.compute_precision]
    fp8 = _fp8_choice(config, student, architecture.num_layers)
    parallel = beside(student, config.teacher_model, timeout_s=config.training.collective_timeout_s)

    def build(**options: Any) -> list[PacedGPTModel]:
        precision = config.trainer.compute_precision
        (gpt,) = build_chunks(
            hf_config, config.teacher_model, parallel, precision=precision, **options
        )
        if parallel.is_last_stage:
            HiddenStates.install(gpt, parallel)
        return [gpt]

    def load(quantized: bool) -> Teacher:
        gpt = load_teacher_gpt(
            build, hf_dir, parallel, fp8, quantized=quantized, read=weights.model
        )
        return Teacher(gpt, parallel)

    certify_fp8 = certify_fp8 and fp8 is not None

    head = None
    if student.is_last_stage:
        # both heads are cut alike, so that student and teacher shards hold the same columns
        padded = padded_vocab_size(_common_rows(config), config.model)
        head = weights.head(architecture, hf_dir, student, padded_vocab=padded, dtype=dtype)
    placement = config.teacher.placement
    source = TeacherSource(
        held=HeldTeacher(
            partial(load, not certify_fp8), placement, partial(load, True) if certify_fp8 else None
        ),
        parallel=parallel,
        student=student,
        kind=kind,
        head_weight=head,
        hidden_size=architecture.hidden_size,
        dtype=dtype,
        cut=replace(
            _cut(config.teacher_model),
            sequence_multiple_of=sequence_multiple(
                fp8,
                tp_size=parallel.tp_size,
                sequence_parallel=config.teacher_model.sequence_parallel,
            ),
        ),
        cache=_cache(config, kind, hf_dir, fp8),
        fp8=fp8,
        keep_loaded=placement is not TeacherPlacement.cached,
    )
    if source.keep_loaded:
        source.held.load()
    logger.info("teacher signal: %d bytes a response token", source.bytes_per_token)
    return source


def _fp8_choice(config: PacedConfig, student: Parallel, num_layers: int) -> Fp8Choice | None:
    choice = choose_fp8(
        config.teacher.fp8,
        precision=config.trainer.compute_precision,
        device=student.device,
        num_layers=num_layers,
        pp_size=config.teacher_model.pipeline_model_parallel_size,
    )
    offloaded = config.teacher.placement is TeacherPlacement.offloaded
    if offloaded and choice is not None and choice.uses_transformer_engine:
        raise ConfigError(
            "teacher.placement is offloaded and teacher.fp8.backend is transformer_engine, whose "
            "FP8 weights cannot be moved: set teacher.fp8.backend=torch, or another placement"
        )
    return choice


def _cache(
    config: PacedConfig, kind: SignalKind, hf_dir: Path, fp8: Fp8Choice | None
) -> SignalCache | None:
    folder = config.teacher.cache_dir
    if folder is None:
        return None
    identity = {
        **kind.identity(),
        "teacher": model_identity(hf_dir),
        "precision": config.trainer.compute_precision.value,
        "fp8": to_dict(fp8),
    }
    return SignalCache(Path(folder), identity)


def _cut(model: ModelConfig) -> Cut:
    interleaved = model.virtual_pipeline_model_parallel_size > 1
    return Cut(
        model.micro_batch_size,
        model.packed_sequence_size,
        micro_batches_multiple_of=model.pipeline_model_parallel_size if interleaved else 1,
    )


def _common_rows(config: PacedConfig) -> int:
    """Rows of the larger of both embeddings."""
    paths = (config.student.hf_path, config.teacher_hf_path)
    return max(load_hf_config(path)["vocab_size"] for path in paths)
