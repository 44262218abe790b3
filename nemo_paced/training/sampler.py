"""Sampling that survives its servers: replicas, client, grader and store of one served model.

Lives on rank 0 (or in a command without ranks). When a server of ours dies, the others go on with
its requests; it is started again and gets the last weights that were sent from their file before
it is asked anything. What was finished is in the store.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from nemo_paced.config import PacedConfig, Precision
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.hf.directory import context_length
from nemo_paced.hf.tokenizer import Prompts
from nemo_paced.records import Problem, Rollout
from nemo_paced.rollout.api_key import API_KEY_VARIABLE
from nemo_paced.rollout.client import PROBE_TIMEOUT_S, RolloutClient
from nemo_paced.rollout.grading import Grader
from nemo_paced.rollout.refit import (
    check_weight_routes,
    send_weights,
    served_version,
    written_version,
)
from nemo_paced.rollout.replicas import Replicas
from nemo_paced.rollout.sampling import SamplingSettings, sample_rollouts
from nemo_paced.rollout.store import RolloutStore

logger = logging.getLogger(__name__)

DYING_S = 15.0  # between a broken connection and the end of the server's processes
RETURN_S = 60.0  # for servers that somebody else runs to answer again


class Sampler:
    """Context manager around a served model.

    Args:
        model_dir: Hugging Face directory to serve; ignored with ``rollout.endpoints``.
        store_dir: where finished rollouts are appended.
        prompt_limit: longest prompt in tokens; with the response limit the server's context.
        max_model_len: the server's context, instead.
    """

    def __init__(
        self,
        config: PacedConfig,
        model_dir: Path,
        *,
        prompts: Prompts,
        store_dir: Path,
        log_path: Path,
        prompt_limit: int,
        max_model_len: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.model_dir = model_dir
        self.prompts = prompts
        self.store_dir = store_dir
        self.log_path = log_path
        self.prompt_limit = prompt_limit
        self.max_model_len = max_model_len
        self.notify = notify
        self.replicas: Replicas | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Sampler:
        with ExitStack() as stack:
            self.store = stack.enter_context(RolloutStore(self.store_dir))
            self.grader = stack.enter_context(Grader(self.config.grading))
            self.transfer_dir = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo-paced-weights-"))
            )
            if self.config.rollout.endpoints:
                endpoints, self.api_key = list(self.config.rollout.endpoints), given_key()
            else:
                self.replicas = stack.enter_context(
                    make_replicas(
                        self.config,
                        self.model_dir,
                        self.prompt_limit,
                        self.log_path,
                        max_model_len=self.max_model_len,
                    )
                )
                self.replicas.start(progress=self.notify)
                endpoints, self.api_key = self.replicas.endpoints, self.replicas.api_key
            self.client = self._new_client(endpoints)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.sidecar = None  # a thread that still samples need not start it again
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
    ) -> list[Rollout]:
        """Graded rollouts of every problem, asking only for what the store lacks.

        Args:
            num_samples: by problem id, instead of ``settings.num_samples`` of each.
        """
        self._mend_weights()
        return sample_rollouts(
            problems,
            prompts=self.prompts,
            client=self.client,
            store=self.store,
            step=step,
            purpose=purpose,
            settings=settings,
            run_seed=self.config.model.seed,
            grader=self.grader,
            num_samples=num_samples,
            progress=progress,
        )

    def require_weight_routes(self) -> None:
        """Refuse servers of somebody else that cannot be sent the student's weights.

        Raises:
            ConfigError: names one.
        """
        if self.replicas is None:
            check_weight_routes(self.client)

    def send_weights(self) -> None:
        """Make every server load what was last written to ``transfer_dir``."""
        try:
            send_weights(self.client, self.transfer_dir)
        except RolloutError:
            ended = self.replicas.ended(within_s=DYING_S) if self.replicas is not None else []
            if self.replicas is None or not ended:
                raise
            for endpoint in ended:
                self.replicas.restart(endpoint, progress=self.notify)
            send_weights(self.client, self.transfer_dir)

    def _revive(self, endpoint: str) -> bool:
        """Bring one server back, with the weights it should have; ``False``: not yet.

        The client calls it in a thread. The trainer sends weights between samplings only.
        """
        if self.replicas is not None and endpoint in self.replicas.ended():
            self.replicas.restart(endpoint, progress=self.notify)
        return self.client.healthy(endpoint) and self._has_current_weights(endpoint)

    def _mend_weights(self) -> None:
        """A server that was started again by its owner has lost what it was sent."""
        if written_version(self.transfer_dir) is None:
            return
        for endpoint in self.client.endpoints:
            if not self._has_current_weights(endpoint):
                logger.warning("%s does not answer: its requests go to the others", endpoint)

    def _has_current_weights(self, endpoint: str) -> bool:
        """Send them if it has others; ``False`` where it does not answer."""
        version = written_version(self.transfer_dir)
        if version is None:
            return True
        try:
            served = served_version(self.client.only(endpoint, timeout_s=PROBE_TIMEOUT_S))
            if served != version:
                logger.warning("%s has weights %s, not %s: sent again", endpoint, served, version)
                timeout_s = self.config.rollout.request_timeout_s
                send_weights(self.client.only(endpoint, timeout_s=timeout_s), self.transfer_dir)
        except RolloutError:
            return False
        return True

    def _new_client(self, endpoints: list[str]) -> RolloutClient:
        rollout = self.config.rollout
        return RolloutClient(
            endpoints,
            self.api_key,
            max_in_flight=rollout.max_in_flight,
            request_timeout_s=rollout.request_timeout_s,
            revive=self._revive,
            patience_s=RETURN_S + (0 if self.replicas is None else rollout.start_timeout_s),
        )


def make_replicas(
    config: PacedConfig,
    model_dir: Path,
    prompt_limit: int,
    log_path: Path,
    *,
    max_model_len: int | None = None,
    api_key: str | None = None,
) -> Replicas:
    """The servers of a model as the configuration wants them, not started yet.

    Args:
        prompt_limit: longest prompt, tokens.
        max_model_len: longest prompt plus response; ``None``: what training needs.
    """
    return Replicas(
        model_dir,
        config.rollout,
        max_model_len=max_model_len or training_length(config, model_dir, prompt_limit),
        dtype=served_dtype(config),
        log_path=log_path,
        api_key=api_key,
    )


def served_dtype(config: PacedConfig) -> str:
    """What a server of ours computes in: ``rollout.dtype``, else the trainer's precision."""
    if config.rollout.dtype != "auto":
        return config.rollout.dtype
    names = {Precision.fp32: "float32", Precision.bf16: "bfloat16"}
    return names[config.trainer.compute_precision]


def training_length(config: PacedConfig, model_dir: Path, prompt_limit: int) -> int:
    """Longest prompt plus response that a server beside the trainer is asked for, tokens."""
    needed = prompt_limit + config.data.max_response_length
    if not config.trainer.val_check_interval:
        return needed
    return max(needed, prompt_limit + evaluation_length(config, model_dir, prompt_limit))


def evaluation_length(config: PacedConfig, model_dir: Path, prompt_limit: int) -> int:
    """Longest response when held-out problems are sampled, in tokens: as long as
    ``evaluation.max_response_length``, or what the model's context leaves beside a prompt."""
    wanted = config.evaluation.max_response_length or config.data.max_response_length
    context = context_length(model_dir)
    return wanted if context is None else max(1, min(wanted, context - prompt_limit))


def given_key() -> str:
    """The key of ``rollout.endpoints``.

    Raises:
        ConfigError: the environment has none.
    """
    key = os.environ.get(API_KEY_VARIABLE, "")
    if not key:
        raise ConfigError(
            f"rollout.endpoints is set but the environment variable {API_KEY_VARIABLE} is not: "
            "export the key that the server was started with"
        )
    return key
