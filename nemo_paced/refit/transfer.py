"""Weights from the trainer's memory into the rollout servers', over one of several transports.

``nccl``, ``nccl_m2n`` and ``ipc`` are vLLM's own trainer-side engines, which need GPUs and vLLM in
the trainer's environment; ``gloo`` is ours (``gloo_transfer.py``) and has the same two methods.
``file`` goes through files instead (``file_transfer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_paced.config import RefitBackend
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.gloo_transfer import GlooSender
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.refit.weight_sync import WeightSync


def make_sender(
    meeting: Meeting,
    sync: WeightSync | None,
    chunks: Sequence[PacedGPTModel],
    parallel: Parallel,
) -> Sender:
    """Make this rank's sender and join the servers' group; collective over the trainer's ranks.

    Args:
        sync: rank 0's; ``None`` elsewhere.

    Raises:
        RolloutError: a server did not join.
    """
    if meeting.backend is not RefitBackend.gloo:
        from nemo_paced.refit.vllm_senders import make_vllm_sender

        return make_vllm_sender(meeting, sync, chunks, parallel)
    rendezvous = {
        "master_address": meeting.address,
        "master_port": meeting.port,
        "world_size": 1 + sum(meeting.workers),
    }
    return GlooSender(sync, MegatronWeightSource(chunks, parallel), rendezvous)
