"""Construction of the teacher: its own layout, FP8 or not, on the student's ranks or its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_paced.config import ModelConfig, PacedConfig, TeacherPlacement, to_dict
from nemo_paced.data.packing import Cut
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture, padded_vocab_size
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_head, load_hf_weights
from nemo_paced.hf.model import DTYPES, PacedGPTModel, build_chunks
from nemo_paced.parallel.groups import Parallel, RankGrid, beside
from nemo_paced.teacher.cache import SignalCache, model_identity
from nemo_paced.teacher.fp8.choice import Fp8Choice, choose_fp8, load_teacher_gpt, sequence_multiple
from nemo_paced.teacher.kind import SignalKind
from nemo_paced.teacher.model import HiddenStates, Teacher
from nemo_paced.teacher.placement import HeldTeacher
from nemo_paced.teacher.remote import RemoteTeacher, serve
from nemo_paced.teacher.source import TeacherSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightReader:
    """Functions that read a teacher's weights: from Hugging Face files, but in a dry run.

    Attributes:
        model: as :func:`~nemo_paced.hf.import_weights.load_hf_weights`.
        head: as :func:`~nemo_paced.hf.import_weights.load_hf_head`.
    """

    model: Callable[..., None] = load_hf_weights
    head: Callable[..., torch.Tensor] = load_hf_head


HF_FILES = WeightReader()


def build_teacher(
    config: PacedConfig,
    student: Parallel,
    vocab_size: int,
    *,
    certify_fp8: bool = False,
    weights: WeightReader = HF_FILES,
) -> TeacherSource:
    """Source of the teacher's signal, with the LM head cut in the student's layout; collective.

    Called on the student's ranks. The LM head is read at once, and so are the other weights, unless
    ``teacher.placement`` is ``cached`` or the teacher has ranks of its own.

    Args:
        student: the student's layout.
        vocab_size: tokens of the true vocabulary.
        certify_fp8: with ``teacher.fp8``, load the teacher in full precision first; it is in FP8
            from :meth:`HeldTeacher.quantize` on.
        weights: functions that read weights.

    Raises:
        ConfigError: ``teacher.top_k``, ``teacher.fp8`` or the layout do not fit the teacher.
        CheckpointError: its files do not fit its ``config.json``.
    """
    kind = SignalKind(config.teacher.top_k, config.loss.temperature, vocab_size)
    if kind.top_k > vocab_size:
        raise ConfigError(
            f"teacher.top_k is {kind.top_k} and the vocabulary has {vocab_size} tokens: it must "
            "be at most that, or 0 for the exact loss"
        )
    hf_dir = Path(config.teacher_hf_path)
    architecture = Architecture.read(hf_dir, "teacher.hf_path")
    dtype = DTYPES[config.trainer.compute_precision]
    fp8 = _fp8_choice(config, student, architecture.num_layers)
    parallel, held, remote = student, None, None
    placement = config.teacher.placement
    if student.link is not None:
        remote = RemoteTeacher(
            student.link, teacher_grid(config), config.training.collective_timeout_s
        )
    else:
        timeout_s = config.training.collective_timeout_s
        parallel = beside(student, config.teacher_model, timeout_s=timeout_s)
        load = partial(_load, config, parallel, fp8, weights)
        certify_fp8 = certify_fp8 and fp8 is not None
        later = partial(load, quantized=True) if certify_fp8 else None
        held = HeldTeacher(partial(load, quantized=not certify_fp8), placement, later)
    head = None
    if student.is_last_stage:
        # both heads are cut alike, so that student and teacher shards hold the same columns
        padded = padded_vocab_size(common_rows(config), config.model)
        head = weights.head(architecture, hf_dir, student, padded_vocab=padded, dtype=dtype)
    source = TeacherSource(
        held=held,
        remote=remote,
        parallel=parallel,
        student=student,
        kind=kind,
        head_weight=head,
        hidden_size=architecture.hidden_size,
        dtype=dtype,
        cut=teacher_cut(config, fp8, parallel),
        cache=_cache(config, kind, hf_dir, fp8),
        fp8=fp8,
        keep_loaded=placement is not TeacherPlacement.cached,
    )
    if held is not None and source.keep_loaded:
        held.load()
    logger.info("teacher signal: %d bytes a response token", source.bytes_per_token)
    return source


def serve_teacher(config: PacedConfig, parallel: Parallel) -> None:
    """Load the teacher on one of ``teacher.separate_ranks`` and answer until the run ends."""
    link = parallel.link
    assert link is not None and link.is_teacher, "called on the teacher's own ranks"
    hf_dir = Path(config.teacher_hf_path)
    architecture = Architecture.read(hf_dir, "teacher.hf_path")
    fp8 = _fp8_choice(config, parallel, architecture.num_layers)
    serve(
        _load(config, parallel, fp8, HF_FILES, quantized=True),
        teacher_cut(config, fp8, parallel),
        link,
        student_grid(config),
        width=architecture.hidden_size,
        dtype=DTYPES[config.trainer.compute_precision],
    )


def student_grid(config: PacedConfig) -> RankGrid:
    """The student's rank grid, in the job's rank numbers: its ranks come first."""
    return _grid(config.model, config.student_ranks)


def teacher_grid(config: PacedConfig) -> RankGrid:
    """The rank grid of a teacher on ranks of its own, in the job's rank numbers."""
    return _grid(config.teacher_model, config.teacher_ranks).beginning_at(config.student_ranks)


def _grid(model: ModelConfig, ranks: int) -> RankGrid:
    return RankGrid(
        tensor=model.tensor_model_parallel_size,
        context=model.context_parallel_size,
        data=ranks // model.model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
    )


def _load(
    config: PacedConfig,
    parallel: Parallel,
    fp8: Fp8Choice | None,
    weights: WeightReader,
    *,
    quantized: bool,
) -> Teacher:
    hf_dir = Path(config.teacher_hf_path)

    def build(**options: Any) -> list[PacedGPTModel]:
        (gpt,) = build_chunks(
            load_hf_config(hf_dir),
            config.teacher_model,
            parallel,
            precision=config.trainer.compute_precision,
            **options,
        )
        if parallel.is_last_stage:
            HiddenStates.install(gpt, parallel)
        return [gpt]

    gpt = load_teacher_gpt(build, hf_dir, parallel, fp8, quantized=quantized, read=weights.model)
    return Teacher(gpt, parallel)


def teacher_cut(config: PacedConfig, fp8: Fp8Choice | None, parallel: Parallel) -> Cut:
    """How a global batch becomes the teacher's micro-batches, padded as FP8 GEMMs need."""
    multiple_of = sequence_multiple(
        fp8, tp_size=parallel.tp_size, sequence_parallel=config.teacher_model.sequence_parallel
    )
    return replace(cut_of(config.teacher_model), sequence_multiple_of=multiple_of)


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


def cut_of(model: ModelConfig) -> Cut:
    """How a global batch becomes the micro-batches of a model with these settings."""
    interleaved = model.virtual_pipeline_model_parallel_size > 1
    return Cut(
        model.micro_batch_size,
        model.packed_sequence_size,
        micro_batches_multiple_of=model.pipeline_model_parallel_size if interleaved else 1,
    )


def common_rows(config: PacedConfig) -> int:
    """Rows of the larger of the student's and the teacher's embeddings, before padding."""
    paths = (config.student.hf_path, config.teacher_hf_path)
    return max(load_hf_config(path)["vocab_size"] for path in paths)
