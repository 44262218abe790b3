"""Two real servers of one model: one dies mid-batch; the command that serves; refusals."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from nemo_paced.compose import ASSETS
from nemo_paced.config import (
    DataConfig,
    GradingConfig,
    PrivilegedContext,
    RolloutConfig,
)
from nemo_paced.data.problems import load_problems
from nemo_paced.data.prompts import Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.refit.file_sender import FileSender
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.sampling import SamplingSettings
from tests.unit.serving.wrong_server import Server

pytestmark = pytest.mark.slow

DATA = DataConfig(
    problems=str(ASSETS / "problems_train.jsonl"),
    prompt_template="{problem}",
    use_chat_template=False,
    max_prompt_length=16,
    max_response_length=16,
)
PROBLEMS = load_problems(DATA.problems)[:150]


def sampler(folder, **rollout):
    prompts = Prompts(ASSETS / "student", DATA, PrivilegedContext.none)
    return Sampler(
        ASSETS / "student",
        RolloutConfig(**rollout),
        GradingConfig(verifier="exact"),
        seed=1234,
        dtype="float32",
        max_model_len=32,
        prompts=prompts,
        store_dir=folder / "rollouts",
        log_path=folder / "sidecar.log",
    )


def sample(served, step, on_progress=None, num_samples=8):
    return served.sample(
        PROBLEMS,
        purpose="train",
        step=step,
        settings=SamplingSettings(num_samples, 1.0, 1.0, 16),
        progress=on_progress,
    )


def served_version(client):
    return client.control.weight_versions()[0]


def signal_server(sidecar, number=signal.SIGKILL):
    """The server itself; by default as the kernel's out-of-memory killer would."""
    (server,) = psutil.Process(sidecar._process.pid).children()
    os.killpg(server.pid, number)


def test_one_of_two_servers_killed_in_mid_batch_loses_nothing(tmp_path, monkeypatch):
    # 8 samples of a problem are more than a server decodes at once: two requests
    with sampler(tmp_path, num_replicas=2, max_in_flight=4, max_num_seqs=5) as served:
        first, second = served.replicas.sidecars.values()
        # weights are sent as in training, so that the one started again must get them again
        weights = load_file(ASSETS / "student" / "model.safetensors")
        sender = FileSender(served.weights.sync, weights.items(), served.weights.folder)
        served.begin_update("7")
        served.update(sender)
        finished = []
        ask = served.client.sample

        def ask_both(requests, on_result):
            # stands still with the requests that it has: where storing is slower than sampling, all
            # would be answered before the kill
            signal_server(first, signal.SIGSTOP)
            ask(requests, on_result)

        def kill_once(done, total):
            finished.append(done)
            if len(finished) == 30:
                signal_server(first)

        with monkeypatch.context() as patched:
            patched.setattr(served.client, "sample", ask_both)
            rollouts = sample(served, 0, kill_once)
        assert finished == list(range(1, len(PROBLEMS) + 1))
        assert [(r.problem_id, r.sample) for r in rollouts] == [
            (p.id, k) for p in PROBLEMS for k in range(8)
        ]
        lines = (tmp_path / "rollouts" / "rollouts.log").read_bytes().splitlines()
        assert len(lines) == len(rollouts), "none is stored twice"
        assert all(rollout.weight_versions for rollout in rollouts)
        assert served.replicas.restarts == {first.endpoint: 1, second.endpoint: 0}
        for endpoint in served.client.endpoints:
            one = served.client.only(endpoint, timeout_s=10)
            assert served_version(one) == "7", "also the one that was started again"
        # both have died when new weights come
        signal_server(second)
        served.update(sender)
        assert served.replicas.restarts[second.endpoint] == 1
        # and one that lost its weights unnoticed gets them before it is asked
        served.replicas.sidecars[second.endpoint].restart()
        assert served_version(served.client.only(second.endpoint, timeout_s=10)) != "7"
        assert len(sample(served, 1, num_samples=1)) == len(PROBLEMS)
        assert served_version(served.client.only(second.endpoint, timeout_s=10)) == "7"
        processes = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [p for p in alive if "vllm" in " ".join(p.cmdline())]


@pytest.fixture
def served_by_command(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "nemo_paced.cli", "rollout-server"),
            *("--config-name", "quickstart", "--model", "teacher", "rollout.host=lo"),
            *(f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, tmp_path / "run" / "servers" / "teacher"
    process.kill()
    process.wait()


def test_the_command_serves_until_it_is_told_to_stop(served_by_command, tmp_path, monkeypatch):
    process, folder = served_by_command
    endpoint = process.stdout.readline().strip()
    assert endpoint.startswith("http://127.0.0.1:"), "the address of the interface named lo"
    assert json.loads((folder / "endpoints.json").read_text()) == {"endpoints": [endpoint]}
    assert stat.S_IMODE((folder / "api_key").stat().st_mode) == 0o600
    key = (folder / "api_key").read_text().strip()
    assert key not in (folder / "server.log").read_text()
    family = psutil.Process(process.pid).children(recursive=True)
    assert not any(key in " ".join(p.cmdline()) for p in family), "other users see those"

    monkeypatch.setenv("NEMO_PACED_API_KEY", key)
    with sampler(tmp_path, endpoints=[endpoint]) as served:
        served.require_weight_routes()
        assert len(sample(served, 0, num_samples=1)) == len(PROBLEMS)

    (supervisor,) = psutil.Process(process.pid).children()
    os.killpg(supervisor.children()[0].pid, signal.SIGKILL)
    headers = {"Authorization": f"Bearer {key}"}
    deadline = time.monotonic() + 120
    time.sleep(2)
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            if httpx.get(f"{endpoint}/health", headers=headers, trust_env=False).is_success:
                break
        except httpx.TransportError:
            time.sleep(0.5)

    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "the whole tree is stopped"
    assert not (folder / "endpoints.json").exists()


def test_servers_without_weight_routes_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_PACED_API_KEY", "key")
    server = Server((404, {"detail": "Not Found"}))
    try:
        with (
            sampler(tmp_path, endpoints=[server.endpoint]) as served,
            pytest.raises(ConfigError, match=f"{server.endpoint} does not take new weights"),
        ):
            served.require_weight_routes()
    finally:
        server.stop()
