"""The training loop: what every rank does, step by step.

Rank 0 alone reads problems, talks to the rollout server and keeps pass rates (``driver.py``); each
step it sends one message of token ids and weights to all ranks. While it samples, the others wait
on a key of the store, never inside a collective. Under that key they may also hear that the run
stops (``stop.py``): all of them then save at the same step.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from nemo_paced import parallel as parallel_module
from nemo_paced.config import PacedConfig, ResponseSource, TeacherPlacement
from nemo_paced.errors import CheckpointError, PacedError, Stopped
from nemo_paced.losses.options import Divergence
from nemo_paced.parallel import Parallel
from nemo_paced.teacher.remote import RemoteTeacher
from nemo_paced.training import checkpoint, schedule, stop
from nemo_paced.training.batches import Batch
from nemo_paced.training.certify import certificate_due, certify
from nemo_paced.training.checkpoint_files import checkpoints, newest_whole, read_state
from nemo_paced.training.driver import Driver
from nemo_paced.training.faults import Guard, Watch
from nemo_paced.training.fingerprint import check_config
from nemo_paced.training.progress import RunLog
from nemo_paced.training.schedule import Stage
from nemo_paced.training.setup import Models, build_models
from nemo_paced.training.step import StepResult
from nemo_paced.training.teacher_setup import serve_teacher

logger = logging.getLogger(__name__)

# Rank 0 may sample pass rates of a whole data set before the first message; if it dies meanwhile,
# the launcher ends the other ranks.
MESSAGE_TIMEOUT_S = 7 * 24 * 3600.0
_STOP = "stop"  # rank 0's message in place of what the others wait for
_STOP_WANTED = "stop_wanted"  # a rank that was asked to stop tells rank 0

T = TypeVar("T")


def train(config: PacedConfig, run_dir: Path) -> None:
    """Train to ``trainer.max_steps``, going on from the newest checkpoint of ``run_dir``.

    Called on every rank, with torch.distributed's environment variables set or none of them.

    Raises:
        Stopped: on request, before ``trainer.max_steps``; a checkpoint of the last step is there.
    """
    all_stages = schedule.stages(config.stages, config.trainer.max_steps)
    parallel = parallel_module.initialize(
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
        parallel_module.shutdown()


def with_cache_folder(config: PacedConfig, run_dir: Path) -> PacedConfig:
    """``teacher.placement=cached`` keeps its signals in the run unless a folder is named."""
    teacher = config.teacher
    if teacher.placement is not TeacherPlacement.cached or teacher.cache_dir is not None:
        return config
    return replace(config, teacher=replace(teacher, cache_dir=str(run_dir / "teacher_cache")))


def newest_checkpoint(config: PacedConfig, run_dir: Path) -> Path | None:
    """The checkpoint to resume from, after checking that its run was configured alike."""
    if not checkpoints(run_dir):
        return None
    if not config.exp_manager.resume_if_exists:
        raise PacedError(
            f"{run_dir} holds checkpoints and exp_manager.resume_if_exists is false: choose "
            "another exp_manager.name, or let it resume"
        )
    found = newest_whole(run_dir)
    if found is None:
        raise CheckpointError(
            f"none of the checkpoints of {run_dir} is whole: remove them to start anew, or choose "
            "another exp_manager.name"
        )
    check_config(read_state(found).config, config, found)
    return found


def agreed_checkpoint(config: PacedConfig, run_dir: Path, parallel: Parallel) -> Path | None:
    """Rank 0's :func:`newest_checkpoint` on every rank: file systems may show them different ones.

    Collective.
    """
    chosen: list[Path | None] = [None]
    if parallel.rank == 0:
        chosen = [newest_checkpoint(config, run_dir)]
    if parallel.world_size > 1:
        torch.distributed.broadcast_object_list(chosen, src=0, device=parallel.device)
    return chosen[0]


class Loop:
    """State of a run on one rank: how far it is, and which weights the rollout server has."""

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
        self.step = 0
        self.consumed = 0
        self.guard = Guard(config)
        self.watch = Watch(parallel, config.training.collective_timeout_s)
        self.accuracy: float | None = None  # of the last validation, at step ``validated``
        self.validated: int | None = None
        async_save = config.exp_manager.checkpoint_callback_params.async_save
        self.background = AsyncCallsQueue() if async_save else None
        self.served_step: int | None = None  # optimizer steps behind the server's weights
        self.saved_step: int | None = None
        self.prepared: dict[int, Batch] = {}  # by step, made before their turn
        self.told_until = 0  # a teacher of its own ranks knows the batches below this step
        self.times: dict[str, float] = {}

    def run(self, resume_from: Path | None) -> bool:
        """Whether all steps are done; if not, it was asked to stop."""
        if resume_from is not None:
            self._restore(resume_from)
        max_steps = self.config.trainer.max_steps
        if self.step >= max_steps:
            logger.info("%s is trained to step %d already", self.run_dir, self.step)
            return True
        with (
            self.watch,
            RunLog(self.config, self.run_dir, self.step, enabled=self.parallel.rank == 0) as log,
        ):
            try:
                self._prepare(log, resume_from)
                while self.step < max_steps:
                    log.step(self._one_step())
            except stop.StopRequested:
                logger.info("asked to stop: saving step %d", self.step)
            if self.step > 0:
                self._save()
            if self.background is not None:
                checkpoint.finish(self.background, wait=True)
            if self.step == max_steps:
                log.finished()
        return self.step == max_steps

    def _prepare(self, log: RunLog, resume_from: Path | None) -> None:
        self._on_rank_0("prepared", lambda driver: driver.prepare(log))
        held = self.models.step.teacher.held
        if held is not None and held.to_be_quantized:
            self._certify_teacher()
        self._on_rank_0("pass_rates", lambda driver: driver.first_pass_rates(resume_from))
        self._fill_teacher_cache()

    def _one_step(self) -> dict[str, Any]:
        """Batch, teacher, student, update, and what is due after it; returns the log line."""
        self.times = {}
        begin = time.perf_counter()
        stage = schedule.stage_at(self.stages, self.step)
        self._enter(stage)
        self.watch.reached(self.step, "batch")
        if stage.config.responses is ResponseSource.rollouts:
            self._refit_if_due()
        with self._timed("rollout"):
            batch = self._batch(stage)
        self.watch.reached(self.step, "training")
        rate = schedule.learning_rate(
            self.config.model.optim, self.step, self.config.trainer.max_steps
        )
        result = self.models.step(batch.items, stage.config, rate) if batch.items else None
        if result is not None:
            self._forget(_batch_key(self.step))  # a step is collective: every rank has read it
        on_policy = stage.config.responses is ResponseSource.rollouts
        fresh = on_policy and self.served_step == self.step
        self.guard.check(self.step, stage, batch, result, fresh=fresh)
        staleness = self.step - self.served_step if self.served_step is not None else None
        self.step += 1
        self.consumed += self.config.model.global_batch_size
        validation = self._validate_if_due()
        self._checkpoint_if_due()
        return {
            "step": self.step,
            "stage": stage.config.name,
            "learning_rate": rate,
            **self._result_metrics(result),
            "weights/active_problems": len(batch.items),
            **batch.metrics,
            **({"rollout/staleness": staleness} if on_policy else {}),
            **validation,
            **{f"time/{name}_s": seconds for name, seconds in self.times.items()},
            "time/step_s": time.perf_counter() - begin,
        }

    def _enter(self, stage: Stage) -> None:
        """What a stage asks for at its first step."""
        if self.step != stage.first_step:
            return
        if stage.config.reset_optimizer and self.step > 0:
            self.models.student.reset_optimizer()
        if stage.config.reestimate_pass_rates and self.step > 0:
            self._refit()
            key = f"pass_rates/{self.step}"
            self._on_rank_0(key, lambda driver: driver.estimate_pass_rates(self.step))
            self._fill_teacher_cache()

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

        batch = self._exchange("fp8_certificate", make)
        stage = schedule.stage_at(self.stages, self.step)
        kind = Divergence(stage.config.divergence.value)
        certify(self.models, batch.items, responses, kind, self.run_dir)

    def _fill_teacher_cache(self) -> None:
        """``teacher.placement=cached``: all signals that are missing, then no teacher any more."""
        if self.config.teacher.placement is not TeacherPlacement.cached:
            return
        source = self.models.step.teacher
        assert source.cache is not None, "with_cache_folder named one"
        chunks: Iterator[Batch] = iter(())
        if self.driver is not None:
            chunks = self.driver.uncached_references(source.cache)
        for number in itertools.count():
            key = f"uncached/{self.step}/{number}"
            batch = self._exchange(key, lambda: next(chunks, Batch([], {})))
            if not batch.items:
                break
            source.fill(batch.items)
            self._forget(key)  # collective above: every rank has read it
        source.release()

    def _refit_if_due(self) -> None:
        every = self.config.rollout.refit_every_n_steps
        if self.served_step is None or self.step - self.served_step >= every:
            self._refit()

    def _refit(self) -> None:
        """Bring the server to the current weights; collective over the ranks that hold them."""
        if self.served_step == self.step:
            return
        with self._timed("refit"):
            self.models.push_weights(self.driver, self.step)
        self.served_step = self.step

    def _batch(self, stage: Stage) -> Batch:
        batch = self._exchange(_batch_key(self.step), lambda: self._make_batch(stage, self.step))
        remote = self.models.step.teacher.remote
        if remote is not None and self.driver is not None:
            self._tell_ahead(remote, batch, stage)
        return batch

    def _make_batch(self, stage: Stage, step: int) -> Batch:
        if step in self.prepared:
            return self.prepared.pop(step)
        assert self.driver is not None, "rank 0 has one"
        later = (step - self.step) * self.config.model.global_batch_size
        return self.driver.batch(step, self.consumed + later, stage.config)

    def _tell_ahead(self, remote: RemoteTeacher, batch: Batch, stage: Stage) -> None:
        """A teacher on ranks of its own gets this batch, and the next one if it is known."""
        if batch.items and self.told_until <= self.step:
            remote.announce(batch.items)
        self.told_until = max(self.told_until, self.step + 1)
        following = self.step + 1
        same = following < self.config.trainer.max_steps and (
            schedule.stage_at(self.stages, following) is stage
        )
        if same and stage.config.responses is ResponseSource.references:
            ahead = self._make_batch(stage, following)
            self.prepared[following] = ahead
            if ahead.items:
                remote.announce(ahead.items)
            self.told_until = following + 1

    def _exchange(self, key: str, make: Callable[[], Batch]) -> Batch:
        """What rank 0 makes, on every rank."""
        if self.driver is None:
            return Batch.from_message(self._await(key))
        batch = self._unless_stopped(key, make)
        self._publish(key, batch.to_message())
        return batch

    def _on_rank_0(self, key: str, work: Callable[[Driver], T]) -> T | None:
        """Its result, on rank 0; the others wait for its word, outside any collective."""
        driver = self.driver
        if driver is None:
            self._await(key)
            return None
        result = self._unless_stopped(key, lambda: work(driver))
        self._publish(key, "done")
        return result

    def _await(self, key: str) -> Any:
        if stop.requested():
            parallel_module.publish(_STOP_WANTED, self.parallel.rank)
        message = parallel_module.await_value(key, MESSAGE_TIMEOUT_S)
        if message == _STOP:
            raise stop.StopRequested
        return message

    def _unless_stopped(self, key: str, make: Callable[[], T]) -> T:
        """On rank 0: what the others wait for under ``key``, or all of them stop here."""
        try:
            with stop.interruptible():
                if self.parallel.world_size > 1 and parallel_module.is_published(_STOP_WANTED):
                    raise stop.StopRequested
                return make()
        except stop.StopRequested:
            self._publish(key, _STOP)
            raise

    def _publish(self, key: str, message: Any) -> None:
        if self.parallel.world_size > 1:
            parallel_module.publish(key, message)

    def _forget(self, key: str) -> None:
        if self.driver is not None:
            parallel_module.forget(key)

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
        self._refit()
        key = f"validation/{self.step}"
        try:
            metrics = self._on_rank_0(key, lambda driver: driver.validate(self.step))
        except stop.StopRequested:  # the step itself is whole: it stops at the next one
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

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        if self.background is not None:  # one at a time
            checkpoint.finish(self.background, wait=True)
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

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begin


def _batch_key(step: int) -> str:
    return f"batch/{step}"
