"""Settings ``rollout``: the vLLM servers and how they sample."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_paced.settings.checks import positive, require
from nemo_paced.settings.choices import RefitBackend, RolloutPlacement, WeightSwap


@dataclass
class RolloutConfig:
    """The vLLM servers and how they sample."""

    temperature: float = 1.0  # sampling temperature of pass rates and on-policy stages
    top_p: float = 1.0  # nucleus of the sampling; on-policy stages need the whole distribution, 1
    # Servers of the same model, each on GPUs of its own, that share the requests.
    num_replicas: int = 1
    # GPUs of the servers. colocated: one node is enough; the servers sleep while the trainer works.
    placement: RolloutPlacement = RolloutPlacement.separate
    host: str = "127.0.0.1"  # address or network interface (ib0) that our servers listen on
    port: int = 0  # port of the first replica, the others take the next ones; 0: free ports
    # Running servers instead of our own; their key is in the variable NEMO_PACED_API_KEY.
    endpoints: list[str] = field(default_factory=list)
    dtype: str = "auto"  # the servers' dtype, float32 | bfloat16; auto: trainer.precision's
    # Responses that a server decodes at once; more samples of a problem go in several requests.
    max_num_seqs: int = 128
    max_in_flight: int = 32  # requests under way at a server
    kv_cache_gib: float = 1.0  # GiB of KV cache, CPU build of vLLM; GPU: gpu_memory_utilization
    gpu_memory_utilization: float = 0.3  # share of each GPU that a server takes
    tensor_parallel_size: int = 1  # GPUs of one server
    # How new weights reach the servers; rollout-server must be told the same.
    refit: RefitBackend = RefitBackend.auto
    refit_every_n_steps: int = 1  # optimizer steps between two sendings of the weights
    # When servers take new weights: after the responses under way, or in their midst (with
    # max_staleness).
    swap: WeightSwap = WeightSwap.between_requests
    # Optimizer steps that rollouts may lag behind the student trained on them. 0: strictly
    # on-policy, trainer and server wait for each other. Above: the server samples for the steps to
    # come while this one is trained on.
    max_staleness: int = 0
    # |trainer - server| log-probability, mean over the sampled tokens of a step, nats; above it the
    # run stops.
    max_logprob_gap: float = 0.1
    # Share of responses cut at their limit, in a pass-rate estimate or over five steps, above which
    # the run stops; 1: never.
    max_truncated_share: float = 1.0
    start_timeout_s: float = 600.0  # seconds until a server is healthy
    request_timeout_s: float = 1800.0  # seconds until a request is answered
    max_restarts: int = 2  # restarts of one server that died, before the run stops
    python: str | None = None  # interpreter that runs vLLM; None: this one

    def __post_init__(self) -> None:
        positive(
            "rollout",
            self,
            "temperature",
            "top_p",
            "num_replicas",
            "max_num_seqs",
            "max_in_flight",
            "kv_cache_gib",
            "refit_every_n_steps",
            "max_logprob_gap",
            "start_timeout_s",
            "request_timeout_s",
            "tensor_parallel_size",
        )
        require(
            0 <= self.max_truncated_share <= 1,
            f"rollout.max_truncated_share is {self.max_truncated_share}: it must lie in [0, 1]",
        )
        require(self.top_p <= 1, f"rollout.top_p is {self.top_p}: it must be at most 1")
        require(
            self.host not in ("", "0.0.0.0", "::"),
            f"rollout.host is {self.host!r}, every network of the machine: name an address or an "
            "interface that the trainer reaches it by",
        )
        require(
            not self.endpoints or self.num_replicas == 1,
            f"rollout.num_replicas is {self.num_replicas} and rollout.endpoints is set: no server "
            "of our own is started then; remove one of the two",
        )
        require(
            all(endpoint.startswith(("http://", "https://")) for endpoint in self.endpoints),
            f"rollout.endpoints is {self.endpoints}: each must be a URL, http://HOST:PORT",
        )
        require(
            self.max_staleness >= self.refit_every_n_steps - 1,
            f"rollout.max_staleness is {self.max_staleness} and rollout.refit_every_n_steps "
            f"{self.refit_every_n_steps}, with which rollouts are up to "
            f"{self.refit_every_n_steps - 1} steps old: raise the first or lower the second",
        )
        self._check_placement()

    def _check_placement(self) -> None:
        colocated = self.placement is RolloutPlacement.colocated
        require(
            not colocated or not self.max_staleness,
            f"rollout.placement is colocated and rollout.max_staleness {self.max_staleness}: a "
            "server that sleeps while the trainer works cannot sample ahead; set max_staleness to "
            "0 or placement to separate",
        )
        require(
            not colocated or not self.endpoints,
            "rollout.placement is colocated and rollout.endpoints is set: servers that somebody "
            "else runs do not sleep for this trainer; set placement to separate",
        )
        require(
            not colocated or self.refit not in (RefitBackend.nccl, RefitBackend.nccl_m2n),
            f"rollout.refit is {self.refit.value} and rollout.placement colocated: NCCL refuses "
            "two ranks on one GPU; set refit to ipc or file",
        )
        require(
            colocated or self.refit is not RefitBackend.ipc,
            "rollout.refit is ipc and rollout.placement separate: CUDA IPC shares the memory of "
            "one GPU; set placement to colocated, or refit to nccl",
        )
        require(
            self.swap is WeightSwap.between_requests or self.max_staleness > 0,
            "rollout.swap is in_flight and rollout.max_staleness 0, with which no response is "
            "under way when weights change: raise max_staleness or set swap to between_requests",
        )

    @property
    def steps_ahead(self) -> int:
        """Number of steps whose rollouts are sampled before their turn."""
        return self.max_staleness - (self.refit_every_n_steps - 1)
