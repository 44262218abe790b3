"""Signals in a process of their own: what they break off, and what they leave alone."""

import subprocess
import sys
import time

import pytest

from nemo_paced.config import ExpManagerSettings, PacedConfig
from nemo_paced.run.loggers import exp_manager_block

PROGRAM = """
import asyncio, os, signal, subprocess, sys, threading, time
from nemo_paced.training import stop
stop.listen()

def signal_soon(number):
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

async def many():
    async def one():
        while True:
            await asyncio.sleep(0)  # callbacks nearly all the time
    await asyncio.gather(*(one() for _ in range(20)))
"""
WORK = {
    "sleeping": "time.sleep(30)",
    "in a lock": "threading.Event().wait(30)",
    "in asyncio": "asyncio.run(many())",
}


def run(program):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, timeout=25
    )


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("work", WORK)
def test_interruptible_work_is_broken_off_at_once(work, number):
    done = run(f"""
signal_soon(signal.{number})
began = time.monotonic()
try:
    with stop.interruptible():
        {WORK[work]}
except stop.StopRequested:
    print("stopped", time.monotonic() - began < 5)
""")
    assert done.stdout == "stopped True\n", done.stderr


def test_other_work_goes_on_and_the_next_interruptible_one_does_not_begin():
    done = run("""
signal_soon(signal.SIGUSR1)
time.sleep(0.1)
before = stop.requested()
deadline = time.monotonic() + 1.0
while time.monotonic() < deadline:
    time.sleep(0.05)
print(before, stop.requested())
try:
    with stop.interruptible():
        print("never")
except stop.StopRequested:
    print("stopped")
""")
    assert done.stdout == "False True\nstopped\n", done.stderr


def test_helpers_outlive_a_warning_to_every_process():
    done = run("""
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
time.sleep(0.5)
helper.send_signal(signal.SIGUSR1)
print(helper.wait())
""")
    assert done.stdout == "0\n", done.stderr


def test_a_second_sigterm_ends_the_process():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + "print('up', flush=True)\ntime.sleep(30)\ntime.sleep(30)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None, "the first one is a request"
    process.terminate()
    assert process.wait(5) == -15


def test_a_wandb_run_keeps_its_id_over_starts(tmp_path):
    def kwargs(**given):
        settings = ExpManagerSettings(create_wandb_logger=True, wandb_logger_kwargs=given)
        block = exp_manager_block(PacedConfig(exp_manager=settings), tmp_path)
        return block["wandb_logger_kwargs"]

    first = kwargs(project="distillation")
    assert len(first["id"]) == 8 and kwargs(project="distillation") == first
    assert first == {
        "name": "paced", "id": first["id"], "resume": "allow", "project": "distillation",
    }  # fmt: skip
    assert kwargs(id="mine")["id"] == "mine"
