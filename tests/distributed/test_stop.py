"""A signal to one rank: all stop at the same place, whatever they wait for."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nemo_paced.config import PacedConfig, TrainerConfig
from nemo_paced.parallel import groups
from nemo_paced.training import schedule, stop
from nemo_paced.training.exchange import BatchExchange
from tests.distributed.harness import run_ranks
from tests.unit.training.test_exchange import ScriptedDriver

STEPS, SIGNALLED_AT = 40, 5


def _exchange(rank, world_size):
    stop.listen()
    config = PacedConfig(trainer=TrainerConfig(max_steps=STEPS, devices=world_size))
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=30)
    stages = schedule.stages(config.stages, STEPS)
    driver = ScriptedDriver() if rank == 0 else None
    return BatchExchange(config, stages, driver, parallel, None), stages


def _train(rank, world_size, signalled):
    exchange, stages = _exchange(rank, world_size)
    done = 0
    try:
        with exchange:
            for step in range(STEPS):
                if step == SIGNALLED_AT and rank == signalled:
                    os.kill(os.getpid(), signal.SIGUSR1)
                exchange.batch(step, step, schedule.stage_at(stages, step), step)
                torch.distributed.all_reduce(torch.ones(1))
                done += 1
    except stop.StopRequested:
        pass
    torch.distributed.all_reduce(torch.ones(1))  # none waits for a batch that never comes
    return done


@pytest.mark.parametrize("signalled", [0, 2])
def test_all_ranks_stop_at_the_same_step(signalled):
    done = run_ranks(3, _train, signalled)
    assert len(set(done)) == 1 and SIGNALLED_AT <= done[0] <= SIGNALLED_AT + 2


def _work_alone(rank, world_size):
    exchange, _ = _exchange(rank, world_size)

    def work(driver):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)

    begin = time.monotonic()
    with pytest.raises(stop.StopRequested), exchange:
        exchange.on_rank_0("work", work)
    torch.distributed.all_reduce(torch.ones(1))
    return time.monotonic() - begin


def test_rank_0_breaks_off_what_it_does_alone_and_the_others_hear_of_it():
    assert max(run_ranks(2, _work_alone)) < 20


def test_a_rank_that_was_suspended_and_goes_on_takes_that_for_no_request():
    program = (
        "import time; from nemo_paced.training import stop\n"
        "stop.listen(); print('up', flush=True)\n"
        "for _ in range(300): time.sleep(0.1); print(stop.requested(), flush=True)"
    )
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with rank:
        assert rank.stdout.readline() == "up\n"
        for _ in range(3):
            time.sleep(0.3)
            rank.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            rank.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        rank.send_signal(signal.SIGUSR1)
        time.sleep(1)
        rank.kill()
        said = rank.stdout.read().split()
    before, after = said[: said.index("True")], said[said.index("True") :]
    assert len(before) >= 10 and set(after) == {"True"}
