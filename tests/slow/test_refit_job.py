"""New weights from two ranks, and a server that dies with them in the midst of a run.

The gloo transport has the shape of vLLM's NCCL one: what is tested of the loop here holds for both.
The jobs of tests/refit_jobs.py are started on GPUs too, by tests/gpu/test_refit_gpu.py.
"""

import re
import time

import pytest

from nemo_paced.serving.client import RolloutClient
from tests.jobs import command, metrics, train_arguments
from tests.refit_jobs import CPU_JOBS, asleep, check_job, kill_a_server
from tests.rollout_servers import make_sidecar
from tests.tiny import make_hf_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("refit", "replicas", "in_an_update"),
    [("gloo", 1, True), ("file", 2, False)],  # of two the other one goes on meanwhile
)
def test_a_server_that_lost_its_weights_is_sent_them_by_all_ranks_again(
    tmp_path, refit, replicas, in_an_update
):
    arguments = train_arguments(
        tmp_path, "run", f"rollout.refit={refit}", "trainer.devices=2",
        f"rollout.num_replicas={replicas}",
        "model.tensor_model_parallel_size=2", "trainer.max_steps=12",
    )  # fmt: skip
    process = command(*arguments)
    path = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or '"stage": "reverse_kl"' not in path.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill_a_server(process, in_an_update=in_an_update)
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


@pytest.mark.parametrize("name", CPU_JOBS)
def test_servers_hold_the_weights_of_the_checkpoint(name, tmp_path):
    look = check_job(tmp_path, CPU_JOBS[name])
    assert look.version >= 2, "the group of the first update stood for a second one"


def test_a_server_tells_whether_it_sleeps(tmp_path):
    """The CPU build keeps its memory; its states and routes are those of the GPU build."""
    model = make_hf_model("qwen3", tmp_path / "model", vocab_size=128, hidden_size=64)
    with make_sidecar(model, tmp_path) as sidecar:
        sidecar.start()
        client = RolloutClient([sidecar.endpoint], sidecar.served.api_key)
        assert not asleep(client)
        client.call("POST", "/pause", params={"mode": "wait"})
        assert not asleep(client), "it waits for an update"
        client.call("POST", "/resume")
        client.call("POST", "/sleep", params={"level": 1, "mode": "wait"})
        assert asleep(client)
        client.call("POST", "/wake_up")
        assert not asleep(client)
        client.call("POST", "/wake_up")  # of a server that is awake changes nothing
        assert not any(answer["is_paused"] for answer in client.call("GET", "/is_paused"))
