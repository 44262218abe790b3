"""Sampling that survives its servers: replicas, client, grader and store of one served model.

It lives on rank 0 (or in a command without ranks). When a server of ours dies, the others go on
with its requests; it is started again, and asked nothing before it has the last weights that were
sent. What was finished is in the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from nemo_paced.config import GradingConfig, RolloutConfig
from nemo_paced.data.prompts import Prompts
from nemo_paced.errors import RolloutError
from nemo_paced.grading.grader import Grader
from nemo_paced.records import Problem, Rollout
from nemo_paced.refit.file_transfer import transfer_folder
from nemo_paced.refit.meeting import Meeting, Sender
from nemo_paced.refit.server_weights import ServerWeights
from nemo_paced.rollout.sampling import SamplingSettings, sample_rollouts
from nemo_paced.rollout.served import given_key
from nemo_paced.rollout.store import RolloutStore
from nemo_paced.serving.backends import choose_backend
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.replicas import Replicas
from nemo_paced.serving.vllm_engine import gpu_count

logger = logging.getLogger(__name__)

T = TypeVar("T")

DYING_S = 15.0  # wait, after a broken connection, for the end of the server's processes
RETURN_S = 60.0  # patience while no server answers; for ours, on top of their start_timeout_s


class Sampler:
    """Context manager that serves a model, or reaches servers that run, and samples from it.

    Args:
        model_dir: Hugging Face directory to serve; with ``rollout.endpoints`` it only tells how
            large the weights are.
        rollout: the servers, ours or somebody else's, and how they are asked.
        grading: how responses are graded.
        seed: the run's; each response has a seed of its own from it.
        dtype: of the servers that we start, in vLLM's words.
        max_model_len: their context, tokens.
        store_dir: where finished rollouts are appended.
        log_path: log of the first server.
        notify: called with what starting servers say.
        meanwhile: called while servers of ours start, or at once where others run.
        trainer_gpus: how many GPUs of this node a trainer uses beside the servers.
    """

    def __init__(
        self,
        model_dir: Path,
        rollout: RolloutConfig,
        grading: GradingConfig,
        *,
        seed: int,
        dtype: str,
        max_model_len: int,
        prompts: Prompts,
        store_dir: Path,
        log_path: Path,
        notify: Callable[[str], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
        trainer_gpus: int = 0,
    ) -> None:
        self.model_dir = model_dir
        self.rollout = rollout
        self.grading = grading
        self.seed = seed
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.prompts = prompts
        self.store_dir = store_dir
        self.log_path = log_path
        self.notify = notify
        self.meanwhile = meanwhile
        self.trainer_gpus = trainer_gpus
        self.replicas: Replicas | None = None
        self._stack = ExitStack()
        self._busy_s, self._busy_since = 0.0, 0.0

    def __enter__(self) -> Sampler:
        with ExitStack() as stack:
            self.store = stack.enter_context(RolloutStore(self.store_dir))
            self.grader = stack.enter_context(Grader(self.grading))
            folder = Path(stack.enter_context(transfer_folder(_size(self.model_dir))))
            if self.rollout.endpoints:
                if self.meanwhile:
                    self.meanwhile()
                endpoints, self.api_key = list(self.rollout.endpoints), given_key()
                hosts = [urlsplit(endpoint).hostname or "" for endpoint in endpoints]
                backend = choose_backend(self.rollout, gpu_count(), hosts)
            else:
                self.replicas = stack.enter_context(
                    Replicas(
                        self.model_dir,
                        self.rollout,
                        max_model_len=self.max_model_len,
                        dtype=self.dtype,
                        log_path=self.log_path,
                        trainer_gpus=self.trainer_gpus,
                    )
                )
                self.replicas.start(progress=self.notify, meanwhile=self.meanwhile)
                endpoints, self.api_key = self.replicas.endpoints, self.replicas.api_key
                backend = self.replicas.backend
            self.client = self._new_client(endpoints)
            self.weights = ServerWeights(self.client, backend, self.rollout.swap, folder)
            self._sleep()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        purpose: str,
        step: int,
        settings: SamplingSettings,
        num_samples: Mapping[str, int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Rollout]:
        """Graded rollouts of every problem, asking only for what the store lacks.

        The arguments are those of :func:`sample_rollouts`. They are read from disk each time that
        they are looked at, while this sampler lasts.

        Raises:
            RolloutError: a server refused, or could not be brought back.
            WeightsLost: no server has the weights that were sent last.
        """
        self._busy_since = time.monotonic()
        try:
            self._wake()
            rollouts = sample_rollouts(
                problems,
                prompts=self.prompts,
                client=self._client_of(self.weights.usable()),
                store=self.store,
                step=step,
                purpose=purpose,
                settings=settings,
                samples_per_request=self.rollout.max_num_seqs,
                run_seed=self.seed,
                grader=self.grader,
                num_samples=num_samples,
                progress=progress,
            )
            self._sleep()
            return rollouts
        finally:
            self._busy_s, self._busy_since = self.busy_s(), 0.0

    def busy_s(self) -> float:
        """Seconds for which the servers have been sampling, since this object was made."""
        since = self._busy_since
        return self._busy_s + (time.monotonic() - since if since else 0.0)

    def require_weight_routes(self) -> None:
        """Refuse servers of somebody else that cannot be sent the student's weights.

        Raises:
            ConfigError: names one.
        """
        from nemo_paced.refit.transfer import check_weight_routes  # imports torch

        if self.replicas is None:
            check_weight_routes(self.client, self.weights.backend)

    def begin_update(self, version: str) -> Meeting | None:
        """Announce new weights to the servers, which are there: see :meth:`ServerWeights.begin`."""
        self._wake()
        return self._with_restart(lambda: self.weights.begin(version))

    def update(self, sender: Sender) -> None:
        """Bring the servers the weights of ``sender``: see :meth:`ServerWeights.update`.

        A server of ours that dies on the way is started again, and sent them where rank 0 can do so
        alone. Where only all ranks together can, the other servers, which may hold half an update,
        are started again too; none of them then has the weights (``WeightsLost`` follows).
        """
        if sender.again is not None:
            sender.prepare()
            self._with_restart(lambda: self.weights.update(sender))
            return
        try:
            sender.prepare()
            self.weights.update(sender)
        except RolloutError as error:
            replicas = self.replicas
            if replicas is None or not replicas.ended(within_s=DYING_S) or not sender.abandon():
                raise
            logger.warning("an update of the rollout servers' weights broke off: %s", error)
            self.weights.give_up_update()
            replicas.restart_all(progress=self.notify)

    def _with_restart(self, work: Callable[[], T]) -> T:
        """Do ``work``, a second time after starting servers of ours again where some have died."""
        try:
            return work()
        except RolloutError:
            ended = self.replicas.ended(within_s=DYING_S) if self.replicas is not None else []
            if self.replicas is None or not ended:
                raise
            for endpoint in ended:
                self.replicas.restart(endpoint, progress=self.notify)
            return work()

    def _revive(self, endpoint: str) -> bool:
        """Bring one server back, with the weights it should have; ``False``: not yet.

        The client calls it in a thread.
        """
        if self.replicas is not None and endpoint in self.replicas.ended():
            self.replicas.restart(endpoint, progress=self.notify)
        return self.client.healthy(endpoint) and self.weights.current(endpoint)

    def _wake(self) -> None:
        """Servers on the trainer's GPUs take their memory again; nothing where they have it."""
        if self.replicas is not None and self.replicas.sleep:
            self.client.control.wake()

    def _sleep(self) -> None:
        """Servers on the trainer's GPUs move their weights to host memory and drop cached keys."""
        if self.replicas is not None and self.replicas.sleep:
            self.client.control.sleep()

    def _client_of(self, endpoints: Sequence[str]) -> RolloutClient:
        every = endpoints is self.weights.client.endpoints
        return self.client if every else self._new_client(endpoints)

    def _new_client(self, endpoints: Sequence[str]) -> RolloutClient:
        return RolloutClient(
            endpoints,
            self.api_key,
            max_in_flight=self.rollout.max_in_flight,
            request_timeout_s=self.rollout.request_timeout_s,
            revive=self._revive,
            patience_s=RETURN_S + (0 if self.replicas is None else self.rollout.start_timeout_s),
        )


def _size(folder: Path) -> int:
    """Bytes of a model's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
