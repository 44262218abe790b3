"""Measurement of the FP8 certificate before the first step, on responses that are trained on.

The teacher is in memory once: its hidden states of these responses are kept on the host while it is
let go of and loaded again in FP8. The student is only asked for its own hidden states, to see what
becomes of its gradient. So the teacher must fit beside the student once in BF16, at a time when the
student's optimizer has no moments yet; where it does not, ``teacher.fp8.certificate=false`` loads
it in FP8 from the start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_paced.config import PacedConfig, ResponseSource, to_dict
from nemo_paced.data.packing import MicroBatch, TrainItem, cut_batch
from nemo_paced.losses.kinds import Divergence
from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.pipeline import call_model, run_schedule
from nemo_paced.run.environment import installed_versions
from nemo_paced.student.step import Step
from nemo_paced.teacher.cache import model_identity
from nemo_paced.teacher.fp8.certificate import Certificate
from nemo_paced.teacher.fp8.drift import Drift, DriftMeter
from nemo_paced.teacher.model import HiddenStates
from nemo_paced.training.setup import Models

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "megatron-core", "transformer-engine")


def certificate_due(config: PacedConfig, run_dir: Path, parallel: Parallel) -> bool:
    """Whether this run's FP8 teacher must be compared first; collective, the same on every rank.

    Raises:
        PacedError: an earlier start has measured it, above ``teacher.fp8.max_kl``.
        ConfigError: the file of an earlier start is damaged.
    """
    fp8 = config.teacher.fp8
    if not (fp8.enabled and fp8.certificate):
        return False
    message: list[Any] = [None, None]
    if parallel.rank == 0:
        found = Certificate.read(run_dir)
        message = [found, found is None or found.identity != _identity(config, parallel)]
    torch.distributed.broadcast_object_list(message, src=0)
    found, due = message
    if not due:
        found.require(fp8.max_kl)
        logger.info("FP8 teacher: certified before, mean KL %.3g nats a token", found.kl_mean)
    return due


def certify(
    models: Models,
    items: Sequence[TrainItem],
    responses: ResponseSource,
    divergence: Divergence,
    run_dir: Path,
) -> None:
    """Compare the teacher with itself in FP8, leave it in FP8, write the certificate; collective.

    Args:
        items: responses to compare on, the same list on every rank.
        responses: where they are from.
        divergence: that of the first stage that is run.

    Raises:
        PacedError: mean KL above ``teacher.fp8.max_kl``, on every rank.
    """
    begin = time.perf_counter()
    step, fp8 = models.step, models.step.teacher.fp8
    assert fp8 is not None, "called where it is due"
    exact = _teacher_hidden(step, items)
    assert step.teacher.held is not None, "a remote teacher is not certified"
    step.teacher.held.quantize()
    quantized = _teacher_hidden(step, items)
    drift = _drift(step, divergence, items, exact, quantized)
    certificate = Certificate(
        identity=_identity(models.config, models.parallel),
        backend=fp8.backend.value,
        recipe=fp8.recipe.value,
        versions=installed_versions(_LIBRARIES),
        responses=responses.value,
        problems=len({item.problem_id for item in items}),
        divergence=divergence.kind.value,
        **drift.figures(),
    )
    if models.parallel.rank == 0:
        certificate.write(run_dir)
    logger.info(
        "FP8 teacher: mean KL %.3g nats a token, top-1 agreement %.2f %%, gradient off by %.2g "
        "(%d tokens, %.1f s)",
        certificate.kl_mean,
        100 * certificate.top1_agreement,
        certificate.gradient_difference,
        certificate.tokens,
        time.perf_counter() - begin,
    )
    certificate.require(models.config.teacher.fp8.max_kl)


def _teacher_hidden(step: Step, items: Sequence[TrainItem]) -> dict[str, torch.Tensor]:
    """Final hidden states [tokens, h] of this rank's responses, on the host; no top-k, no cache."""
    source = replace(step.teacher, kind=replace(step.teacher.kind, top_k=0), cache=None)
    signal, _ = source.signal(items, stored=False)
    parts = signal.by_response.items()
    return {name: part.cpu() for name, part in parts if isinstance(part, torch.Tensor)}


@torch.no_grad()
def _student_hidden(step: Step, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """The student's final hidden states [N, h] of micro-batches, on the last stage; else none.

    The output layer stands aside meanwhile.
    """
    chunks, parallel = step.student.chunks, step.parallel
    if not parallel.is_last_stage:
        run_schedule(
            _forward_step, batches, chunks, parallel, forward_only=True, collect_non_loss_data=True
        )
        return []
    gpt = chunks[-1]
    loss_layer = gpt.output_layer
    HiddenStates.install(gpt, parallel)
    try:
        return run_schedule(
            _forward_step, batches, chunks, parallel, forward_only=True, collect_non_loss_data=True
        )
    finally:
        gpt.output_layer = loss_layer


def _forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch: MicroBatch = next(data_iterator)

    def keep_response_tokens(hidden_BSH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return hidden_BSH[batch.rows_N, batch.positions_N]

    return call_model(model, batch), keep_response_tokens


def _drift(
    step: Step,
    divergence: Divergence,
    items: Sequence[TrainItem],
    exact: dict[str, torch.Tensor],
    quantized: dict[str, torch.Tensor],
) -> Drift:
    """The drift over all ranks' responses, the same on every rank."""
    batches = cut_batch(items, step.cut, step.parallel, teacher=False)
    student = _student_hidden(step, batches)
    own: list[Drift] = []
    if step.parallel.is_last_stage:
        meter = _meter(step, divergence)
        own = [
            meter.measure(
                _tokens(batch, exact), _tokens(batch, quantized), hidden_NH, batch.token_weights_N
            )
            for batch, hidden_NH in zip(batches, student, strict=True)
            if batch.spans
        ]
    if step.parallel.tp_rank != 0:
        own = []  # tensor-parallel ranks measure the same
    gathered: list[Any] = [None] * step.parallel.world_size
    torch.distributed.all_gather_object(gathered, Drift.total(own))
    return Drift.total(gathered)


def _tokens(batch: MicroBatch, hidden: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states [N, h] of the micro-batch's response tokens on this rank, in its order."""
    whole_NH = torch.cat([hidden[name] for name, _ in batch.spans])
    return whole_NH if batch.local_N is None else whole_NH[batch.local_N.cpu()]


def _student_head(step: Step) -> torch.Tensor:
    gpt = step.student.chunks[-1]
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def _meter(step: Step, divergence: Divergence) -> DriftMeter:
    assert step.teacher.head_weight is not None, "the last stage holds the teacher's head"
    return DriftMeter(
        teacher_head_VH=step.teacher.head_weight,
        student_head_VH=_student_head(step),
        divergence=divergence,
        tp_group=step.parallel.tp_group,
        vocab_size=step.vocab_size,
        chunk_size=step.loss.chunk_size,
    )


def _identity(config: PacedConfig, parallel: Parallel) -> dict[str, Any]:
    """What a certificate is valid for: teacher, settings, device; not the limit on its KL."""
    settings = to_dict(config.teacher.fp8)
    del settings["max_kl"]
    on_gpu = parallel.device.type == "cuda"
    return {
        "teacher": model_identity(Path(config.teacher_hf_path)),
        "fp8": settings,
        "precision": config.trainer.compute_precision.value,
        "temperature": config.loss.temperature,
        "device": torch.cuda.get_device_name(parallel.device) if on_gpu else "cpu",
    }
