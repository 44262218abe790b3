"""Transports of weights from the trainer's memory into the rollout servers', by their names.

``nccl``, ``nccl_m2n`` and ``ipc`` are vLLM's own trainer-side engines, which need GPUs and vLLM in
the trainer's environment; ``gloo`` and ``file`` are ours. No other module tells one from another.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_paced.config import RefitBackend
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel
from nemo_paced.refit.file_sender import FileSender
from nemo_paced.refit.gloo_transfer import GlooSender
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.server_weights import ServerWeights
from nemo_paced.refit.weight_source import MegatronWeightSource
from nemo_paced.serving.client import RolloutClient

ROUTE_TIMEOUT_S = 30.0  # of each call that checks a server


def make_sender(
    meeting: Meeting,
    weights: ServerWeights | None,
    chunks: Sequence[PacedGPTModel],
    parallel: Parallel,
) -> Sender:
    """Make this rank's sender and join the servers' group; collective over the trainer's ranks.

    Args:
        weights: rank 0's; ``None`` elsewhere.

    Raises:
        RolloutError: a server did not join.
    """
    sync = None if weights is None else weights.sync
    if meeting.backend is RefitBackend.file:
        folder = None if weights is None else weights.folder
        return FileSender(sync, MegatronWeightSource(chunks, parallel), folder)
    if meeting.backend is RefitBackend.gloo:
        return GlooSender(meeting, sync, MegatronWeightSource(chunks, parallel))
    from nemo_paced.refit.vllm_senders import VllmSender  # vLLM may be missing here

    return VllmSender(meeting, sync, chunks, parallel)


def check_weight_routes(client: RolloutClient, backend: RefitBackend) -> None:
    """Check that every server takes new weights over ``backend``, as far as it tells beforehand.

    Raises:
        ConfigError: names a server that does not.
    """
    for endpoint in client.endpoints:
        control = client.only(endpoint, timeout_s=ROUTE_TIMEOUT_S).control
        try:
            control.weight_versions()
            if backend is RefitBackend.file:  # a group of the server alone: nobody else has to join
                control.join_group({})
        except RolloutError as error:
            raise ConfigError(
                f"rollout.endpoints: {endpoint} does not take new weights, which this run has to "
                f"send ({error}): start it with `nemo-paced rollout-server "
                f"rollout.refit={backend.value}`, or keep to stages "
                "with responses=references, without new pass rates and validation"
            ) from error
