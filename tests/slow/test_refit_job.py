"""New weights over the network from two ranks, and a server that dies with them in the run's midst.

The gloo transport has the shape of vLLM's NCCL one: what is tested of the loop here holds for both.
"""

import os
import re
import signal
import time

import psutil
import pytest

from tests.slow.test_main_job import command, metrics, train_arguments

pytestmark = pytest.mark.slow


def server_of(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        if "vllm.entrypoints.openai.api_server" in child.cmdline() and (
            "nemo_paced.rollout.supervisor" not in child.cmdline()
        ):
            return child.pid
    raise AssertionError("no server runs")


@pytest.mark.parametrize("replicas", [1, 2])  # with two, the other one goes on meanwhile
def test_a_server_that_lost_its_weights_is_sent_them_by_all_ranks_again(tmp_path, replicas):
    arguments = train_arguments(
        tmp_path, "run", "rollout.refit=gloo", "trainer.devices=2",
        f"rollout.num_replicas={replicas}",
        "model.tensor_model_parallel_size=2", "trainer.max_steps=12",
    )  # fmt: skip
    process = command(*arguments)
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or '"stage": "reverse_kl"' not in path.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(server_of(process), signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-4000:]
    assert len(re.findall("died: starting it again", out)) == 1
    lines = metrics(tmp_path, "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    sampled = [line for line in lines if line["stage"] == "reverse_kl"]
    assert len(sampled) == 6
    for line in sampled:
        assert line["rollout/logprob_gap"] < 1e-4 and line["rollout/staleness"] == 0
        assert 0 < line["rollout/trainer_wait"] < 1 and 0 <= line["rollout/server_wait"] < 1
