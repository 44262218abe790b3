"""One call of Megatron's forward-backward schedule, with process groups passed explicitly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from nemo_paced.parallel import Parallel


def run_schedule(
    forward_step: Callable[..., Any],
    micro_batches: Sequence[Any],
    model: torch.nn.Module,
    parallel: Parallel,
    *,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run every micro-batch through all pipeline stages.

    Args:
        forward_step: Megatron's ``forward_step_func(data_iterator, model)``.
        micro_batches: of equal shape, each with ``tokens_BS``.
        model: this rank's stage (wrapped in DDP for training).

    Returns:
        What the loss function reported, one entry a micro-batch; empty on all but the last stage.
    """
    rows, length = micro_batches[0].tokens_BS.shape
    return get_forward_backward_func(pp_size=parallel.pp_size, vp_size=None)(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        p2p_communicator=P2PCommunicator(
            pp_group=parallel.pp_group, config=get_model_config(model)
        ),
        pg_collection=parallel.groups,
    )
