"""Detection of faults while training: NaN, loss spikes, a wrong server, a hung rank."""

from __future__ import annotations

import logging
import math
import socket
import statistics
import threading
import time
from collections import deque

import torch

from nemo_paced.config import PacedConfig
from nemo_paced.errors import PacedError
from nemo_paced.parallel.groups import Parallel
from nemo_paced.student.step import StepResult
from nemo_paced.training.batches import Batch
from nemo_paced.training.schedule import Stage

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 50  # steps of a stage that a loss is compared with
_ENOUGH = 10  # steps before the first loss that is compared
# Losses of small batches differ by factors from step to step, whatever the factor that is asked
# for: a spike is also so many deviations above them. Median and deviation are robust, and of the
# logarithm.
SPIKE_DEVIATIONS = 5.0
_DEVIATION_OF_MAD = 1.4826  # a normal distribution's, over its median absolute deviation


class RunStopped(PacedError):
    """The run passed a bound on its faults; raised on every rank at the same step."""


class Guard:
    """Judges each step's result, and counts skipped steps over the whole run.

    Args:
        speaks: whether this rank logs what all ranks see.
    """

    def __init__(self, config: PacedConfig, *, speaks: bool = True) -> None:
        self.config = config
        self._level = logging.WARNING if speaks else logging.DEBUG
        self.skipped = 0
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)  # logarithms of losses
        self._stage = ""

    def check(
        self, step: int, stage: Stage, batch: Batch, result: StepResult | None, *, fresh: bool
    ) -> list[str]:
        """Log what is odd about a step's result, and stop the run where a bound is passed.

        Args:
            result: ``None``: the batch had nothing to train on.
            fresh: whether the batch was sampled with the weights that the step began with.

        Returns:
            The batch's problems where its loss is a spike or no number, else none.

        Raises:
            RunStopped: too many skipped steps, or a server that does not sample from the student.
        """
        if result is None:
            logger.info("step %d: every problem of the batch has weight 0: no-op", step)
            return []
        problems = [item.problem_id for item in batch.items]
        if not result.finite:
            self._skip(step, result, ", ".join(problems))
        odd = not result.finite or self._is_spike(step, stage, result.loss)
        bound = self.config.rollout.max_logprob_gap
        if fresh and result.logprob_gap > bound:
            raise RunStopped(
                f"step {step}: rollout/logprob_gap is {result.logprob_gap:.4g} nats, above "
                f"rollout.max_logprob_gap {bound:g}: the server does not sample from the student "
                "being trained. Check that both have the same dtype (rollout.dtype, "
                "trainer.precision) and that the last refit reached the server"
            )
        return problems if odd else []

    def _skip(self, step: int, result: StepResult, problems: str) -> None:
        self.skipped += 1
        logger.log(
            self._level, "step %d: loss %s, gradient norm not finite: update skipped (problems %s)",
            step, result.loss, problems,
        )  # fmt: skip
        if self.skipped > self.config.training.max_skipped_steps:
            raise RunStopped(
                f"{self.skipped} steps had NaN or Inf in loss or gradients, more than "
                f"training.max_skipped_steps {self.config.training.max_skipped_steps}; the last "
                f"one, step {step}, trained on problems {problems}"
            )

    def _is_spike(self, step: int, stage: Stage, loss: float) -> bool:
        if stage.config.name != self._stage:  # another divergence: another scale
            self._stage = stage.config.name
            self._recent.clear()
        factor = self.config.training.loss_spike_factor
        found = False
        if factor and len(self._recent) >= _ENOUGH and loss > 0:
            usual = statistics.median(self._recent)
            spread = statistics.median(abs(x - usual) for x in self._recent) * _DEVIATION_OF_MAD
            above = math.log(loss) - usual
            if found := above > max(math.log(factor), SPIKE_DEVIATIONS * spread):
                logger.log(
                    self._level,
                    "step %d: loss %.4g is %.1f times the median of the last %d steps",
                    step, loss, math.exp(above), len(self._recent),
                )  # fmt: skip
        if loss > 0:  # rounding can take a divergence near 0 below it
            self._recent.append(math.log(loss))
        return found


class Watch:
    """Watch over the ranks: each tells how far it is, and rank 0 names those that stay behind.

    A rank that hangs shows as an error of all the others, each in another collective. They tell
    through the store, which needs no collective. While it is entered as a context manager, a thread
    of rank 0 looks.

    Args:
        timeout_s: of a collective; a rank is behind once it has not moved for half of it.
    """

    def __init__(self, parallel: Parallel, timeout_s: float) -> None:
        self.parallel = parallel
        self.patience_s = timeout_s / 2
        self._passed = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self.reached(0, "start")
        if self.parallel.rank == 0 and self.parallel.world_size > 1:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if error is not None and _is_lost_connection(error):
            text = str(error).strip().splitlines()[0][:200]
            raise PacedError(
                f"rank {self.parallel.rank}: a collective failed ({text}); {self._try_describing()}"
            ) from error

    def reached(self, step: int, phase: str) -> None:
        """Tell that this rank begins a phase of a step; all ranks go through the same ones."""
        self._passed += 1
        if self.parallel.world_size > 1:
            state = [self._passed, step, phase, socket.gethostname(), time.time()]
            self.parallel.messages.publish(f"reached/{self.parallel.rank}", state)

    def _look(self) -> None:
        warned = False
        while not self._ended.wait(self.patience_s / 5):
            try:
                description = self._described()
            except (RuntimeError, torch.distributed.DistError):
                return  # the store is gone: the run ends
            if description and not warned:
                logger.warning("%s", description)
            warned = bool(description)

    def _try_describing(self) -> str:
        try:
            return self._described() or "no rank is behind the others: a peer has ended"
        except (RuntimeError, torch.distributed.DistError):
            return "the store is gone as well: rank 0's node has ended"

    def _described(self) -> str:
        """Ranks that are behind the others and have not moved for a while; empty: none."""
        ranks = range(self.parallel.world_size)
        if not self.parallel.messages.are_there([f"reached/{rank}" for rank in ranks]):
            return ""  # some are still loading
        states = [self.parallel.messages.wait(f"reached/{rank}", 1.0) for rank in ranks]
        furthest = max(passed for passed, *_ in states)
        behind = [
            f"rank {rank} ({host}) is at step {step}, {phase}, since {time.time() - since:.0f} s"
            for rank, (passed, step, phase, host, since) in enumerate(states)
            if passed < furthest and time.time() - since > self.patience_s
        ]
        return f"behind the others: {'; '.join(behind)}" if behind else ""


def _is_lost_connection(error: BaseException) -> bool:
    """A timeout or a closed connection, as gloo, NCCL and the store report them."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("timed out", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
