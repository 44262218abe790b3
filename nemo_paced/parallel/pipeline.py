"""Calls of a model and of Megatron's forward-backward schedule, with explicit process groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from nemo_paced.parallel.groups import Parallel
from nemo_paced.parallel.row_length import GPU_STEP, round_up


def call_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """What the model gives on this pipeline stage for a padded or packed micro-batch.

    Args:
        batch: with int64 ``tokens_BS`` and ``position_ids_BS`` [b, s / cp] and ``sequences``.
    """
    packed = _packed_seq_params(batch.sequences, batch.tokens_BS.device)
    return model(
        batch.tokens_BS, batch.position_ids_BS, attention_mask=None, packed_seq_params=packed
    )


def _packed_seq_params(sequences: Sequence[int], device: torch.device) -> PackedSeqParams | None:
    """Megatron's description of a packed row with these lengths; ``None``: one sequence a row.

    Padding counts to the sequence before it: under causal attention nothing reads it.
    """
    if not sequences:
        return None
    ends = torch.tensor([0, *itertools.accumulate(sequences)], dtype=torch.int32, device=device)
    longest = round_up(max(sequences), GPU_STEP if device.type == "cuda" else 1)  # few of them
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def run_schedule(
    forward_step: Callable[..., Any],
    micro_batches: Sequence[Any],
    chunks: Sequence[torch.nn.Module],
    parallel: Parallel,
    *,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run every micro-batch through all pipeline stages.

    Args:
        forward_step: Megatron's ``forward_step_func(data_iterator, model)``.
        micro_batches: each with ``tokens_BS``; of equal shape where there are several stages; with
            several chunks their number is a multiple of the pipeline stages.
        chunks: this rank's stage (each chunk wrapped in DDP for training); several are interleaved.

    Returns:
        What the loss function reported, one entry a micro-batch; empty on all but the last stage.
    """
    rows, held = micro_batches[0].tokens_BS.shape
    interleaved = len(chunks) > 1
    vp_size = len(chunks) if interleaved else None
    return get_forward_backward_func(pp_size=parallel.pp_size, vp_size=vp_size)(
        forward_step_func=forward_step,
        # every chunk walks the micro-batches for itself
        data_iterator=[iter(micro_batches) for _ in chunks] if interleaved else iter(micro_batches),
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=held * parallel.cp_size,  # Megatron divides it again
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        p2p_communicator=P2PCommunicator(
            pp_group=parallel.pp_group, config=get_model_config(chunks[0])
        ),
        pg_collection=parallel.groups,
    )
