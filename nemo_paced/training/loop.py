"""The training loop: what every rank does, step by step.

Rank 0 alone reads problems, talks to the rollout server and keeps pass rates (``driver.py``); each
step it sends one message of token ids and weights to all ranks. While it samples, the others wait
on a key of the store, never inside a collective.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_paced.config import PacedConfig, ResponseSource, TeacherPlacement, WeightSwap
from nemo_paced.errors import PacedError, Stopped, WeightsLost
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import Parallel
from nemo_paced.run import checkpoint
from nemo_paced.run.checkpoint_files import newest_checkpoint
from nemo_paced.run.environment import record_preparation, record_start
from nemo_paced.run.progress import RunLog
from nemo_paced.run.throughput import Throughput
from nemo_paced.student.step import StepResult
from nemo_paced.teacher.build import serve_teacher
from nemo_paced.teacher.cache import SignalCache
from nemo_paced.training import schedule, stop
from nemo_paced.training.batches import Batch
from nemo_paced.training.certify import certificate_due, certify
from nemo_paced.training.driver import Driver
from nemo_paced.training.exchange import BatchExchange
from nemo_paced.training.faults import Guard, RunStopped, Watch
from nemo_paced.training.schedule import Stage
from nemo_paced.training.send_weights import Refit
from nemo_paced.training.setup import Models, build_models

logger = logging.getLogger(__name__)

T = TypeVar("T")


def train(config: PacedConfig, run_dir: Path) -> None:
    """Train to ``trainer.max_steps``, going on from the newest checkpoint of ``run_dir``.

    Called on every rank, with torch.distributed's environment variables set or none of them.

    Raises:
        Stopped: on request, before ``trainer.max_steps``; a checkpoint of the last step is there.
    """
    all_stages = schedule.stages(config.stages, config.trainer.max_steps)
    parallel = groups.initialize(
        config.model,
        accelerator=config.trainer.accelerator,
        timeout_s=config.training.collective_timeout_s,
        teacher=config.teacher_model,
        separate_ranks=config.teacher.separate_ranks,
    )
    config = with_cache_folder(config, run_dir)
    try:
        if parallel.link is not None and parallel.link.is_teacher:
            serve_teacher(config, parallel)
            return
        resume_from = agreed_checkpoint(config, run_dir, parallel)
        driver_context = Driver(config, run_dir) if parallel.rank == 0 else nullcontext()
        with driver_context as driver:
            models = build_models(
                config, parallel, certify_fp8=certificate_due(config, run_dir, parallel)
            )
            loop = Loop(config, run_dir, all_stages, models, driver, parallel)
            finished = loop.run(resume_from)
            if models.step.teacher.remote is not None:
                models.step.teacher.remote.close()
        if not finished:
            # until rank 0 has ended its server: a rank that leaves with this status ends the others
            stop.leave()
            torch.distributed.barrier()
            raise Stopped(
                f"stopped on request after step {loop.step}: the same command goes on from there"
                if parallel.rank == 0
                else ""
            )
    finally:
        groups.shutdown()


def with_cache_folder(config: PacedConfig, run_dir: Path) -> PacedConfig:
    """``teacher.placement=cached`` keeps its signals in the run unless a folder is named."""
    teacher = config.teacher
    if teacher.placement is not TeacherPlacement.cached or teacher.cache_dir is not None:
        return config
    return replace(config, teacher=replace(teacher, cache_dir=str(run_dir / "teacher_cache")))


def agreed_checkpoint(config: PacedConfig, run_dir: Path, parallel: Parallel) -> Path | None:
    """Rank 0's :func:`newest_checkpoint`, on every rank: file systems may show different ones.

    It is collective.
    """
    chosen: list[Path | None] = [None]
    if parallel.rank == 0:
        chosen = [newest_checkpoint(config, run_dir)]
    if parallel.world_size > 1:
        torch.distributed.broadcast_object_list(chosen, src=0, device=parallel.device)
    return chosen[0]


class Loop:
    """The training loop of one rank, with how far it is and which weights the servers have."""

    def __init__(
        self,
        config: PacedConfig,
        run_dir: Path,
        all_stages: list[Stage],
        models: Models,
        driver: Driver | None,
        parallel: Parallel,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.stages = all_stages
        self.models = models
        self.driver = driver
        self.parallel = parallel
        self.step = 0  # optimizer steps taken
        self.consumed = 0  # problems of those steps
        self.guard = Guard(config, speaks=parallel.rank == 0)
        self.throughput = Throughput(config, parallel)
        self.watch = Watch(parallel, config.training.collective_timeout_s)
        self.accuracy: float | None = None  # of the last validation, at step ``validated``
        self.validated: int | None = None
        async_save = config.exp_manager.checkpoint_callback_params.async_save
        self.background = AsyncCallsQueue() if async_save else None
        self.served_step: int | None = None  # optimizer steps behind the server's weights
        self.saved_step: int | None = None  # step of the last checkpoint
        self.exchange = BatchExchange(
            config, all_stages, driver, parallel, models.step.teacher.remote
        )
        self.refit = Refit(models.student.chunks, parallel, driver, self.exchange.tell)
        self.times: dict[str, float] = {}  # seconds of the current step by part
        # the servers' sampling time up to the end of the last step, where there are servers
        self._sampled_s: float | None = 0.0

    def run(self, resume_from: Path | None) -> bool:
        """Take all steps; returns ``False`` where the run was asked to stop before.

        Args:
            resume_from: a checkpoint to go on from.

        Raises:
            RunStopped: a bound on faults was passed.
        """
        if resume_from is not None:
            self._restore(resume_from)
        max_steps = self.config.trainer.max_steps
        if self.step >= max_steps:
            logger.info("%s is trained to step %d already", self.run_dir, self.step)
            return True
        record_start(self.run_dir, self.parallel, self.step)
        with self.watch:
            try:
                with (
                    self.exchange,
                    RunLog(
                        self.config, self.run_dir, self.step, enabled=self.parallel.rank == 0
                    ) as log,
                ):
                    self._prepare(log, resume_from)
                    while self.step < max_steps:
                        log.step(self._one_step())
                    self._save_whole()
                    log.finished()
            except RunStopped:
                self._finish_saving()  # on every rank: what is being written is not lost
                raise
            except stop.StopRequested:
                logger.info("asked to stop after step %d", self.step)
                if self.step > 0:
                    self._save_whole()
                return False
        return True

    def _prepare(self, log: RunLog, resume_from: Path | None) -> None:
        """Do what comes before the first step of this start: references, servers, pass rates."""
        spent: dict[str, float] = {}
        with timed(spent, "references"):
            self.exchange.on_rank_0("references", lambda driver: driver.find_references(log))
        with timed(spent, "servers"):
            resumed = resume_from is not None
            self.exchange.on_rank_0("started", lambda driver: driver.start_servers(resumed=resumed))
            self.exchange.on_rank_0("servers", lambda driver: driver.check_servers())
        held = self.models.step.teacher.held
        if held is not None and held.to_be_quantized:
            with timed(spent, "fp8_certificate"):
                self._certify_teacher()
        with timed(spent, "pass_rates"):
            self.exchange.on_rank_0(
                "first_pass_rates", lambda driver: driver.first_pass_rates(resume_from)
            )
        with timed(spent, "teacher_cache"):
            self._fill_teacher_cache()
        if self.driver is not None:
            record_preparation(self.run_dir, spent)
            self._sampled_s = self.driver.sampling_s

    def _finish_saving(self) -> None:
        if self.background is not None:
            checkpoint.finish(self.background, wait=True)

    def _one_step(self) -> dict[str, Any]:
        """Take one step and do what is due after it; returns the log line."""
        self.times = {}
        begin = time.perf_counter()
        stage = schedule.stage_at(self.stages, self.step)
        self._enter(stage)
        self.watch.reached(self.step, "batch")
        on_policy = stage.config.responses is ResponseSource.rollouts
        if on_policy and not self.exchange.is_sampled(self.step):
            self._refit_if_due()
        with self._timed("rollout"):
            batch = self._sampled(
                lambda: self.exchange.batch(self.step, self.consumed, stage, self.served_step)
            )
        if on_policy and self.config.rollout.steps_ahead:
            self._refit_if_due()
            assert self.served_step is not None, "it has just been refit, or not long ago"
            self.exchange.sample_ahead(self.step, self.consumed, stage, self.served_step)
        self.watch.reached(self.step, "training")
        rate = schedule.learning_rate(
            self.config.model.optim, self.step, self.config.trainer.max_steps
        )
        result = self.models.step(batch.items, stage.config, rate) if batch.items else None
        if result is not None:
            self.exchange.read_everywhere()
        fresh = on_policy and batch.metrics.get("rollout/staleness", 0) == 0
        odd = self.guard.check(self.step, stage, batch, result, fresh=fresh)
        self.step += 1
        self.consumed += self.config.model.global_batch_size
        validation = self._validate_if_due()
        self._checkpoint_if_due()
        return {
            "step": self.step,
            "stage": stage.config.name,
            "learning_rate": rate,
            **self._result_metrics(result),
            **(self.throughput.metrics(batch.items, result) if result is not None else {}),
            "weights/active_problems": len(batch.items),
            **batch.metrics,
            **validation,
            **({"problems": odd} if odd else {}),
            **{f"time/{name}_s": seconds for name, seconds in self.times.items()},
            **self._waits(on_policy, time.perf_counter() - begin),
            "time/step_s": time.perf_counter() - begin,
        }

    def _waits(self, on_policy: bool, step_s: float) -> dict[str, float]:
        """Shares of a step for which trainer and servers waited for each other; on rank 0."""
        if self.driver is None:
            return {}
        before, now = self._sampled_s, self.driver.sampling_s
        self._sampled_s = now
        if not on_policy or before is None or now is None:
            return {}
        return {
            "rollout/trainer_wait": min(1.0, self.times["rollout"] / step_s),
            "rollout/server_wait": max(0.0, 1 - (now - before) / step_s),
        }

    def _enter(self, stage: Stage) -> None:
        """Do what a stage asks for at its first step, and estimate pass rates when they are due."""
        first = self.step == stage.first_step
        if first and stage.config.reset_optimizer and self.step > 0:
            self.models.student.reset_optimizer()
        if schedule.reestimation_due(self.config.weights, stage, self.step):
            self._refit()
            self.exchange.settle()
            key = f"pass_rates/{self.step}"
            with self._timed("pass_rates"):
                self._sampled(
                    lambda: self.exchange.on_rank_0(key, lambda d: d.estimate_pass_rates(self.step))
                )
                self._fill_teacher_cache()  # of problems that had no weight before

    def _certify_teacher(self) -> None:
        """Measure what FP8 does to the teacher before anything is trained on it; leave it in FP8.

        On stored responses, or in a run that has none on what the student samples first.
        """
        responses = ResponseSource.references
        if all(stage.config.responses is ResponseSource.rollouts for stage in self.stages):
            responses = ResponseSource.rollouts
            self._refit()

        def make() -> Batch:
            assert self.driver is not None, "rank 0 has one"
            return self.driver.certificate_batch(self.step, self.consumed)

        batch = self._sampled(lambda: self.exchange.give_all(make))
        stage = schedule.stage_at(self.stages, self.step)
        divergence = self.config.loss.divergence(stage.config.divergence)
        certify(self.models, batch.items, responses, divergence, self.run_dir)

    def _fill_teacher_cache(self) -> None:
        """With ``teacher.placement=cached``, make all missing signals and let the teacher go."""
        if self.config.teacher.placement is not TeacherPlacement.cached:
            return
        source = self.models.step.teacher
        assert source.cache is not None, "with_cache_folder named one"
        chunks: Iterator[Batch] = iter(())
        if self.driver is not None:
            chunks = self.driver.uncached_references(source.cache)
        while True:
            batch = self.exchange.give_all(lambda: next(chunks, Batch([], {})))
            if not batch.items:
                break
            source.fill(batch.items)
            self.exchange.read_everywhere()
        source.release()
        self._check_cache(source.cache)

    def _check_cache(self, cache: SignalCache) -> None:
        """Check that no signal is missing: with a full disk every step would load the teacher."""
        if self.driver is not None:
            lacking, _ = self.driver.without_signal(cache)
            if lacking:
                raise PacedError(
                    f"{len(lacking)} signals of the teacher could not be written to "
                    f"{cache.folder}: free space or set teacher.cache_dir to another disk, then "
                    "start the same command again (what is there is kept)"
                )

    def _refit_if_due(self) -> None:
        every = self.config.rollout.refit_every_n_steps
        if self.served_step is None or self.step - self.served_step >= every:
            self._refit()

    def _refit(self) -> None:
        """Bring the server to the current weights; collective over the ranks that hold them."""
        if self.served_step == self.step:
            return
        if self.config.rollout.swap is WeightSwap.between_requests:
            self.exchange.settle()
        with self._timed("refit"):
            self.models.student.sync_parameters()
            self.refit(self.step)
        self.served_step = self.step

    def _sampled(self, ask: Callable[[], T]) -> T:
        """The answer of ``ask``; it is repeated where all servers had lost the weights."""
        while True:
            try:
                return ask()
            except WeightsLost as error:
                logger.warning("the rollout servers need the weights again: %s", error)
                self.served_step = None
                self._refit()

    def _result_metrics(self, result: StepResult | None) -> dict[str, Any]:
        if result is None:
            return {"loss": 0.0, "grad_norm": 0.0, "clipped": False, "skipped": False, "tokens": 0}
        self.times |= {"teacher": result.teacher_s, "student": result.student_s}
        clip = self.config.trainer.gradient_clip_val
        metrics = {
            "loss": result.loss,
            "token_divergence": result.token_divergence,
            "grad_norm": result.grad_norm,
            "clipped": bool(clip and result.grad_norm is not None and result.grad_norm > clip),
            "skipped": not result.finite,
            "tokens": result.tokens,
        }
        if self.config.teacher.cache_dir is not None:
            metrics["teacher/cached"] = result.cached
        if result.logprob_gap == result.logprob_gap:  # not NaN: on-policy
            metrics["rollout/logprob_gap"] = result.logprob_gap
        return metrics

    def _validate_if_due(self) -> dict[str, float]:
        every = self.config.trainer.val_check_interval
        if not every or self.step % every or not self.config.data.validation_problems:
            return {}
        key = f"validation/{self.step}"
        try:
            self._refit()
            self.exchange.settle()
            with self._timed("validation"):
                metrics = self._sampled(
                    lambda: self.exchange.on_rank_0(key, lambda driver: driver.validate(self.step))
                )
        except stop.StopRequested:  # the step itself is whole: it stops before the next one
            logger.info("asked to stop: the validation of step %d is left out", self.step)
            return {}
        if metrics is None:
            return {}
        self.validated, self.accuracy = self.step, metrics["validation/accuracy"]
        return metrics

    def _checkpoint_if_due(self) -> None:
        if self.background is not None:
            checkpoint.finish(self.background, wait=False)
        if self.step % self.config.exp_manager.checkpoint_callback_params.every_n_train_steps == 0:
            with self._timed("checkpoint"):
                self._save()

    def _save_whole(self) -> None:
        self._save()
        self._finish_saving()

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        self._finish_saving()  # one at a time
        if self.driver is not None:
            self.driver.save_pass_rates(self.step)
        self.models.save(
            self.run_dir,
            step=self.step,
            consumed_problems=self.consumed,
            skipped=self.guard.skipped,
            accuracy=self.accuracy if self.validated == self.step else None,
            background=self.background,
        )
        self.saved_step = self.step

    def _restore(self, directory: Path) -> None:
        state = checkpoint.load(directory, self.models.student, self.parallel)
        self.step = self.saved_step = state.step
        self.consumed = state.consumed_problems
        self.guard.skipped = state.skipped_steps
        logger.info("resumed from %s at step %d", directory, self.step)

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return timed(self.times, name)


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Context that adds its seconds to ``times[name]``; a part timed inside counts there alone."""
    begin, before = time.perf_counter(), sum(times.values())
    yield
    inside = sum(times.values()) - before
    passed = time.perf_counter() - begin - inside
    times[name] = times.get(name, 0.0) + passed
