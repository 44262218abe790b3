"""Detection of faults while training: NaN, loss spikes, a wrong server, a hung rank."""

from __future__ import annotations

import logging
import math
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.config import PacedConfig
from nemo_paced.errors import PacedError
from nemo_paced.parallel.groups import Parallel
from nemo_paced.student.step import StepResult
from nemo_paced.training.batches import Batch
from nemo_paced.training.prepare import WHY_CUT
from nemo_paced.training.schedule import Stage

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 50  # steps of a stage that a loss is compared with
_ENOUGH = 10  # steps before the first loss that is compared
# Losses of small batches differ by factors from step to step, whatever the factor that is asked
# for: a spike is also so many deviations above them. Median and deviation are robust, and of the
# logarithm.
SPIKE_DEVIATIONS = 5.0
_DEVIATION_OF_MAD = 1.4826  # a normal distribution's, over its median absolute deviation


LENGTH_WINDOW = 50  # steps within which responses may not double unnoticed
_BEFORE, _NOW = 10, 5  # steps at the window's two ends that are compared
_LEAST_TRUNCATED = 0.1  # below it a doubled share is left alone


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
        self._lengths: deque[tuple[float, float]] = deque(maxlen=LENGTH_WINDOW)

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
            RunStopped: too many skipped steps, too many responses cut at their limit, or a server
                that does not sample from the student.
        """
        if "rollout/mean_length" in batch.metrics:
            self._check_lengths(step, batch.metrics)
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

    def _check_lengths(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn where responses grow, or more of them are cut, to the double within a window."""
        self._lengths.append((metrics["rollout/truncated"], metrics["rollout/mean_length"]))
        lengths = list(self._lengths)
        truncated, length = (statistics.fmean(each) for each in zip(*lengths[-_NOW:], strict=True))
        bound = self.config.rollout.max_truncated_share
        if truncated > bound and len(lengths) >= _NOW:
            raise RunStopped(
                f"step {step}: {truncated:.0%} of the last {_NOW} steps' responses were cut at "
                f"data.max_response_length {self.config.data.max_response_length}, above "
                f"rollout.max_truncated_share {bound:g}. {WHY_CUT}"
            )
        if len(lengths) < _BEFORE + _NOW:
            return
        before, were = (statistics.fmean(each) for each in zip(*lengths[:_BEFORE], strict=True))
        grown = []
        if truncated >= max(2 * before, _LEAST_TRUNCATED):
            grown.append(f"{truncated:.0%} of the responses are cut, {before:.0%} were")
        if length >= 2 * were:
            grown.append(f"responses have {length:.0f} tokens in the mean, {were:.0f} had they")
        if grown:
            self._lengths.clear()  # told once; what is usual begins anew
            logger.log(
                self._level, "step %d: within %d steps %s. %s",
                step, len(lengths), "; ".join(grown), WHY_CUT,
            )  # fmt: skip

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
    of each rank tells how many collectives this one has begun in each group, and rank 0's looks
    at half the time after which NCCL ends the processes. Messages between pipeline stages are among
    gloo's numbers; NCCL numbers collectives alone.

    Args:
        timeout_s: of a collective; a rank is behind once it has not moved for half of it.
    """

    def __init__(self, parallel: Parallel, timeout_s: float) -> None:
        self.parallel = parallel
        self.patience_s = timeout_s / 2
        self._passed = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._groups = _groups_of(parallel)
        self._begun: dict[str, int] = {}  # collectives by group
        self._begun_since = time.time()

    def __enter__(self) -> Watch:
        self.reached(0, "start")
        if self.parallel.world_size > 1:
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
                self._tell()
                description = self._described() if self.parallel.rank == 0 else ""
            except (RuntimeError, torch.distributed.DistError):
                return  # the store is gone: the run ends
            if description and not warned:
                logger.warning("%s", description)
            warned = bool(description)

    def _tell(self) -> None:
        """Publish that this rank is alive, and where it stands in each group."""
        begun = {
            name: group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            for name, group in self._groups.items()
        }
        if begun != self._begun:
            self._begun, self._begun_since = begun, time.time()
        told = [time.time(), self._begun_since, begun]
        self.parallel.messages.publish(f"collectives/{self.parallel.rank}", told)

    def _try_describing(self) -> str:
        try:
            return self._described() or "no rank is behind the others: a peer has ended"
        except (RuntimeError, torch.distributed.DistError):
            return "the store is gone as well: rank 0's node has ended"

    def _described(self) -> str:
        """Ranks that the others wait for, and that have not moved for a while; empty: none."""
        states = self._published("reached")
        if states is None:
            return ""  # some are still loading
        now = time.time()
        still = {rank for rank, (*_, since) in enumerate(states) if now - since > self.patience_s}
        furthest = max(passed for passed, *_ in states)
        behind = {rank: "" for rank in still if states[rank][0] < furthest}
        if not behind and len(still) == len(states):
            behind = self._behind_in_a_phase(now)
        places = []
        for rank, more in behind.items():
            _, step, phase, host, since = states[rank]
            places.append(
                f"rank {rank} ({host}) is at step {step}, {phase}, since {now - since:.0f} s{more}"
            )
        return f"behind the others: {'; '.join(places)}" if places else ""

    def _behind_in_a_phase(self, now: float) -> dict[int, str]:
        """Ranks that keep others waiting in collectives of one phase, each with how that shows."""
        told = self._published("collectives")
        if told is None:
            return {}
        silent = [rank for rank, (beat, *_) in enumerate(told) if now - beat > self.patience_s]
        if silent:
            return dict.fromkeys(silent, " and does not answer")
        if any(now - since < self.patience_s for _, since, _ in told):
            return {}  # a long phase
        return waited_for([begun for *_, begun in told])

    def _published(self, key: str) -> list[Any] | None:
        """What each rank published under ``key``; ``None`` where one has not yet."""
        keys = [f"{key}/{rank}" for rank in range(self.parallel.world_size)]
        if not self.parallel.messages.are_there(keys):
            return None
        return [self.parallel.messages.wait(each, 1.0) for each in keys]


def waited_for(begun: Sequence[Mapping[str, int]]) -> dict[int, str]:
    """Ranks that others wait for, each with the group that it has not joined; empty: nobody waits.

    In a group whose ranks have begun unequal numbers of collectives, those with fewer keep the
    others waiting. Some of them wait themselves, in another group: they are left out, unless all
    do, which is a deadlock.

    Args:
        begun: by rank, the number of collectives that it has begun in each of its groups. Groups
            of different ranks have different names.
    """
    numbers: dict[str, dict[int, int]] = {}
    for rank, groups in enumerate(begun):
        for name, number in groups.items():
            numbers.setdefault(name, {})[rank] = number
    behind: dict[int, str] = {}
    waiting: set[int] = set()
    for name, by_rank in numbers.items():
        most = max(by_rank.values())
        late = [rank for rank, number in by_rank.items() if number < most]
        if late:
            waiting |= by_rank.keys() - set(late)
        for rank in late:
            behind.setdefault(rank, f" and has not joined the others in {name}")
    return {rank: how for rank, how in behind.items() if rank not in waiting} or behind


def _groups_of(parallel: Parallel) -> dict[str, ProcessGroup]:
    """Process groups of several ranks that this rank belongs to, by a name that says which."""
    found = {}
    for name, group in vars(parallel.groups).items():
        if isinstance(group, ProcessGroup) and group.size() > 1:
            ranks = torch.distributed.get_process_group_ranks(group)
            found[f"its {name} group {ranks}"] = group
    return found


def _is_lost_connection(error: BaseException) -> bool:
    """A timeout or a closed connection, as gloo, NCCL and the store report them."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("timed out", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
