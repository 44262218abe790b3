"""What is made ahead of its turn, with which weights, and what waits for it."""

import threading
import time

import pytest

from nemo_paced.config import (
    ModelConfig,
    PacedConfig,
    Reestimation,
    RolloutConfig,
    TrainerConfig,
    WeightsConfig,
)
from nemo_paced.data.packing import TrainItem
from nemo_paced.training import schedule
from nemo_paced.training.batches import Batch
from nemo_paced.training.exchange import BatchExchange

STEPS = 8  # forward KL until step 4, then reverse KL


class OneRank:
    rank, world_size = 0, 1


class ScriptedDriver:
    """Makes batches that say when they were asked for; a rollout takes a while."""

    def __init__(self):
        self.calls = []
        self.running = 0
        self.threads = set()

    def batch(self, step, consumed, stage):
        assert self.running == 0, "the server is asked for one batch at a time"
        self.running += 1
        self.threads.add(threading.current_thread().name)
        if stage.responses.value == "rollouts":
            time.sleep(0.02)
        self.calls.append((step, consumed))
        self.running -= 1
        return Batch([TrainItem(f"r{step}", f"p{step}", (1,), (1,), (2,), 1.0)], {})


class Remote:
    def __init__(self):
        self.announced = []

    def announce(self, items):
        self.announced.append(items[0].response_id)


def run(max_staleness=0, refit_every=1, remote=None, steps=STEPS, driver=None, weights=None):
    """As the loop does: (step, staleness) of each batch, and the driver."""
    config = PacedConfig(
        trainer=TrainerConfig(max_steps=STEPS),
        model=ModelConfig(global_batch_size=4),
        rollout=RolloutConfig(max_staleness=max_staleness, refit_every_n_steps=refit_every),
        weights=weights or WeightsConfig(),
    )
    stages = schedule.stages(config.stages, STEPS)
    driver, served, told = driver or ScriptedDriver(), None, []

    def refit_if_due(step):
        nonlocal served
        if served is None or step - served >= refit_every:
            exchange.settle()
            assert driver.running == 0, "weights change while nothing is sampled"
            served = step

    with BatchExchange(config, stages, driver, OneRank(), remote) as exchange:
        for step in range(steps):
            stage = schedule.stage_at(stages, step)
            on_policy = stage.config.name == "reverse_kl"
            if on_policy and not exchange.is_sampled(step):
                refit_if_due(step)
            batch = exchange.batch(step, 4 * step, stage, served)
            if on_policy and config.rollout.steps_ahead:
                refit_if_due(step)
                exchange.sample_ahead(step, 4 * step, stage, served)
            assert batch.items[0].response_id == f"r{step}"
            told.append(batch.metrics.get("rollout/staleness"))
    return told, driver


@pytest.mark.parametrize(
    ("max_staleness", "refit_every", "expected"),
    [
        (0, 1, [0, 0, 0, 0]),
        (1, 1, [0, 1, 1, 1]),
        (2, 1, [0, 1, 2, 2]),
        (1, 2, [0, 1, 0, 1]),  # nothing ahead: the refit comes every other step
        (2, 2, [0, 1, 2, 1]),
    ],
)
def test_staleness_is_bounded_and_told(max_staleness, refit_every, expected):
    told, driver = run(max_staleness, refit_every)
    assert told[:4] == [None] * 4, "stored responses have none"
    assert told[4:] == expected and max(expected) <= max_staleness
    # each step once, in order, at its place in the data; nothing beyond the run
    assert driver.calls == [(step, 4 * step) for step in range(STEPS)]


def test_nothing_is_made_with_weights_that_are_about_to_be_estimated_anew():
    every_three = WeightsConfig(reestimate=Reestimation.every_n_steps, reestimate_every_n_steps=3)
    told, _ = run(max_staleness=1, weights=every_three)
    assert told[4:] == [0, 1, 0, 1], "step 6 waits for the estimate"
    remote = Remote()
    run(remote=remote, steps=3, weights=every_three)
    assert remote.announced == ["r0", "r1", "r2"], "and step 3 is not announced at step 2"


def test_only_what_is_ahead_is_sampled_in_the_thread():
    _, driver = run(max_staleness=0)
    assert driver.threads == {"MainThread"}
    _, driver = run(max_staleness=1)
    assert any(name.startswith("sampler") for name in driver.threads)


def test_a_remote_teacher_is_told_each_batch_once_and_stored_ones_a_step_ahead():
    remote = Remote()
    run(remote=remote, steps=2)
    assert remote.announced == ["r0", "r1", "r2"]
    remote = Remote()
    run(max_staleness=1, remote=remote)
    assert remote.announced == [f"r{step}" for step in range(STEPS)]


class FailingDriver(ScriptedDriver):
    def batch(self, step, consumed, stage):
        if step == 6:
            raise RuntimeError("the server is gone")
        return super().batch(step, consumed, stage)


def test_what_fails_in_the_thread_is_raised_where_it_is_needed():
    with pytest.raises(RuntimeError, match="the server is gone"):
        run(max_staleness=1, driver=FailingDriver())
