"""Sampling that survives its server: sidecar, client, grader and store of one served model.

Lives on rank 0 (or in a command without ranks). When our own sidecar dies, it is started again, the
last weights that were sent are sent again from their file, and only the missing rollouts are asked
for: what was finished is in the store.
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
from nemo_paced.hf.tokenizer import Prompts
from nemo_paced.records import Problem, Rollout
from nemo_paced.rollout.api_key import API_KEY_VARIABLE
from nemo_paced.rollout.client import RolloutClient
from nemo_paced.rollout.grading import Grader
from nemo_paced.rollout.refit import send_weights
from nemo_paced.rollout.sampling import SamplingSettings, sample_rollouts
from nemo_paced.rollout.sidecar import Sidecar
from nemo_paced.rollout.store import RolloutStore

logger = logging.getLogger(__name__)

DYING_S = 15.0  # between a broken connection and the end of the server's processes


class Sampler:
    """Context manager around a served model.

    Args:
        model_dir: Hugging Face directory to serve; ignored with ``rollout.endpoints``.
        store_dir: where finished rollouts are appended.
        prompt_limit: longest prompt in tokens; with the response limit the server's context.
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
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.model_dir = model_dir
        self.prompts = prompts
        self.store_dir = store_dir
        self.log_path = log_path
        self.prompt_limit = prompt_limit
        self.notify = notify
        self.sidecar: Sidecar | None = None
        self.restarts = 0
        self._stack = ExitStack()

    def __enter__(self) -> Sampler:
        with ExitStack() as stack:
            self.store = stack.enter_context(RolloutStore(self.store_dir))
            self.grader = stack.enter_context(Grader(self.config.grading))
            self.transfer_dir = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo-paced-weights-"))
            )
            if self.config.rollout.endpoints:
                endpoints, key = list(self.config.rollout.endpoints), _key_from_environment()
            else:
                self.sidecar = stack.enter_context(self._new_sidecar())
                self.sidecar.start(progress=self.notify)
                endpoints, key = [self.sidecar.endpoint], self.sidecar.api_key
            self.api_key = key
            self.client = self._new_client(endpoints, key)
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
        while True:
            try:
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
            except RolloutError as error:
                self._recover(error)

    def send_weights(self) -> None:
        """Make the server load what was last written to ``transfer_dir``."""
        try:
            send_weights(self.client, self.transfer_dir)
        except RolloutError as error:
            self._recover(error)

    def _recover(self, error: RolloutError) -> None:
        """Start a dead sidecar again with the weights it had; anything else passes through."""
        if self.sidecar is None or not self.sidecar.ended(within_s=DYING_S):
            raise error
        if self.restarts >= self.config.rollout.max_restarts:
            raise RolloutError(
                f"the rollout server died {self.restarts + 1} times (rollout.max_restarts "
                f"{self.config.rollout.max_restarts}); see {self.log_path}"
            ) from error
        self.restarts += 1
        logger.warning("the rollout server died (%s): starting it again", error)
        self.sidecar.restart(progress=self.notify)
        send_weights(self.client, self.transfer_dir)

    def _new_sidecar(self) -> Sidecar:
        rollout, precision = self.config.rollout, self.config.trainer.compute_precision
        # the same server evaluates, and evaluation may ask for longer responses
        evaluated = self.config.evaluation.max_response_length or 0
        longest = max(self.config.data.max_response_length, evaluated)
        served = {Precision.fp32: "float32", Precision.bf16: "bfloat16"}[precision]
        return Sidecar(
            self.model_dir,
            rollout,
            max_model_len=self.prompt_limit + longest,
            dtype=served if rollout.dtype == "auto" else rollout.dtype,
            log_path=self.log_path,
        )

    def _new_client(self, endpoints: list[str], key: str) -> RolloutClient:
        return RolloutClient(
            endpoints,
            key,
            max_in_flight=self.config.rollout.max_in_flight,
            request_timeout_s=self.config.rollout.request_timeout_s,
        )


def _key_from_environment() -> str:
    key = os.environ.get(API_KEY_VARIABLE, "")
    if not key:
        raise ConfigError(
            f"rollout.endpoints is set but the environment variable {API_KEY_VARIABLE} is not: "
            "export the key that the server was started with"
        )
    return key
